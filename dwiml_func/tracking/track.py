"""All lines of many seeds, a fixed number of them at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dwiml_func.core.rng import Key
from dwiml_func.data.streamlines import Streamlines, join_streamlines, offsets_of
from dwiml_func.tracking.queue import SeedQueue, row_period
from dwiml_func.tracking.space import TrackingSpace
from dwiml_func.tracking.spec import TrackingSpec
from dwiml_func.tracking.state import StepModel, TrackState, init_track_state, with_lines
from dwiml_func.tracking.step import track_step

__all__ = ["NUM_ROWS", "Tracked", "check_tracking", "in_order", "track"]

NUM_ROWS = {"cpu": 512, "cuda": 4096}
"""Lines that are followed at once, by type of device."""

_STEPS = 4  # between two looks at which lines ended: on a GPU each look waits for the device


class Tracked(NamedTuple):
    """Finished lines.

    seeds: (L,) int64, the numbers of their seeds, ascending.
    streamlines: L lines, voxel space, corner origin, on the CPU; tracked both ways, the second half comes last.
    num_done: how many of all seeds, from the first on, are done, with those whose lines were too short.

    Example:
        >>> Tracked(torch.tensor([4]), Streamlines.from_list([[[0, 0, 0], [1, 0, 0]]]), 5).seeds.tolist()
        [4]
    """

    seeds: Tensor
    streamlines: Streamlines
    num_done: int


def track(
    seeds: Tensor,
    *,
    model: StepModel,
    space: TrackingSpace,
    spec: TrackingSpec,
    key: Key,
    numbers: Tensor | None = None,
    num_rows: int | None = None,
    num_blocks: int = 1,
) -> Iterator[Tracked]:
    """Track from seeds, and yield lines as they finish, in the order of their seeds.

    The bytes of a line depend on its seed and its number alone, not on the others. Matrix products round differently
    in other shapes, and in some rows of one shape; so the model always runs `num_rows` rows, idle ones among them, and
    line k in a row that rounds as row k modulo `num_rows` does (`row_period`). At most eight times as many lines are in
    memory.

    Args:
        seeds: (N, 3) float32, voxel space, corner origin, within the volume.
        model: the model, in evaluation mode, on the device of the volume.
        space: its volume, and the mask.
        spec: the options.
        key: the run's key; it decides the samples of `algo="prob"`.
        numbers: (N,) int64, ascending, the numbers of the seeds; None: 0 to N - 1.
        num_rows: lines that the model reads at once; None: see `NUM_ROWS`. Other numbers may round differently.
        num_blocks: how many times as many lines are followed in turn. It does not change the lines.

    Yields:
        Lines of at least `min_length`, at every number of rows or so. Some may be empty sets.

    Raises:
        ValueError: the model is in training mode or has no distribution to sample from, or a seed lies outside.

    Example:
        >>> from dwiml_func.models import Learn2Track
        >>> space = TrackingSpace(volume=torch.zeros(9, 9, 9, 28), voxel_sizes=(2.0, 2.0, 2.0))
        >>> spec = TrackingSpec(step_size=1, min_length=0)
        >>> lines = track(torch.full((3, 3), 4.5), model=Learn2Track(28).eval(), space=space, spec=spec, key=Key(1))
        >>> [tracked.seeds.tolist() for tracked in lines]
        [[0, 1, 2]]
    """
    device = space.volume.device
    num_rows = NUM_ROWS.get(device.type, NUM_ROWS["cpu"]) if num_rows is None else num_rows
    check_tracking(seeds, model, space, spec)
    numbers = torch.arange(len(seeds)) if numbers is None else numbers
    blocks = [init_track_state(model, space, spec, key=key, num_rows=num_rows) for _ in range(num_blocks)]
    period = row_period(blocks[0], model=model, space=space, spec=spec)
    queue = SeedQueue(numbers, num_rows * num_blocks, period)  # rows of the second block follow those of the first
    finished: list[_Lines] = []
    num_yielded = 0
    while not queue.is_empty:
        for number, state in enumerate(blocks):
            first = number * num_rows
            rows, indices = queue.take(first, first + num_rows)
            if len(rows) > 0:
                lines, starts = numbers[indices].to(device), seeds[indices].to(device)
                state = with_lines(state, rows.to(device) - first, lines, starts, donate=True)
            for _ in range(_STEPS):
                state = track_step(state, model=model, space=space, spec=spec, donate=True)
            rows = queue.release(first, state.is_live.cpu())
            finished.append(_lines(state, rows.to(device) - first, spec))
            blocks[number] = state
        if queue.num_done - num_yielded >= num_rows or queue.is_empty:
            num_yielded = queue.num_done
            (seeds_ready, lines), finished = in_order(finished, int(numbers[num_yielded - 1]))
            yield Tracked(seeds_ready, lines, num_yielded)


_Lines = tuple[Tensor, Streamlines]  # the numbers of seeds, and their lines


def check_tracking(seeds: Tensor, model: StepModel, space: TrackingSpace, spec: TrackingSpec) -> None:
    """Raise ValueError for a model that cannot track so, and for seeds outside the volume."""
    if getattr(model, "training", False):
        raise ValueError("Expected a model in evaluation mode. Received: one in training mode. Call model.eval().")
    getter = model.direction_getter
    if spec.algo == "prob" and not getter.is_probabilistic:
        raise ValueError(
            f"algo: prob requires a direction getter with a distribution. Received: {getter.key}. Track with algo det."
        )
    if spec.eos_stop is not None and not getter.add_eos:
        raise ValueError(
            f"eos_stop: requires a model that learned where streamlines end (add_eos). Received: {spec.eos_stop} "
            "without it. Leave it out."
        )
    max_len = getattr(model, "max_len", None)
    if max_len is not None and max_len < spec.max_steps:
        raise ValueError(
            f"max_length: the model reads lines of at most {max_len} points (max_len), {max_len * spec.step_size:g} mm "
            f"at this step. Received: {spec.max_length:g} mm. Track shorter lines, or with a larger step."
        )
    if seeds.ndim != 2 or seeds.shape[1] != 3:
        raise ValueError(f"Expected seeds of shape (N, 3). Received: {tuple(seeds.shape)}.")
    outside = ~space.contains(seeds.to(space.volume.device))
    if outside.any():
        size = " x ".join(map(str, space.volume.shape[:3]))
        raise ValueError(
            f"Expected seeds in the volume of {size} voxels (voxel space, corner origin). "
            f"Received: {int(outside.sum())} of {len(seeds)} outside, the first {seeds[outside.cpu()][0].tolist()}."
        )


def _lines(state: TrackState, rows: Tensor, spec: TrackingSpec) -> _Lines:
    """The finished lines of some rows that are long enough: the first half turned round, then the second."""
    rows = rows[state.num_points[rows] > spec.min_steps]
    lengths, turn = state.num_points[rows], state.turn[rows]
    offsets = offsets_of(lengths)
    num_points = int(offsets[-1])
    line = torch.arange(len(rows), device=rows.device).repeat_interleave(lengths, output_size=num_points)
    place = torch.arange(num_points, device=rows.device) - offsets[line]
    column = torch.where(place < turn[line], turn[line] - 1 - place, place)
    points = state.points[rows[line], column]
    return state.line[rows].cpu(), Streamlines(points.cpu(), offsets.cpu())


def in_order(finished: list[_Lines], last: int) -> tuple[_Lines, list[_Lines]]:
    """Lines up to a number, in their order, and the others."""
    seeds = torch.cat([numbers for numbers, _ in finished])
    lines = join_streamlines([lines for _, lines in finished])
    order = seeds.argsort()
    is_ready = seeds[order] <= last
    ready, waiting = order[is_ready], order[~is_ready]
    return (seeds[ready], lines.select(ready)), [(seeds[waiting], lines.select(waiting))]
