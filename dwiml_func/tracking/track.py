"""All lines of many seeds, a fixed number of them at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dwiml_func.core.rng import Key
from dwiml_func.data.streamlines import Streamlines, offsets_of
from dwiml_func.tracking.queue import SeedQueue
from dwiml_func.tracking.space import TrackingSpace
from dwiml_func.tracking.spec import TrackingSpec
from dwiml_func.tracking.state import StepModel, TrackState, init_track_state, with_lines
from dwiml_func.tracking.step import track_step

__all__ = ["NUM_ROWS", "Tracked", "track"]

NUM_ROWS = {"cpu": 512, "cuda": 4096}
"""Lines that are followed at once, by type of device."""

_STEPS = 8  # between two looks at which lines ended: on a GPU each look waits for the device


class Tracked(NamedTuple):
    """Finished lines.

    seeds: (L,) int64, the numbers of their seeds, ascending.
    streamlines: L lines, voxel space, corner origin, on the CPU; tracked both ways, the second half comes last.

    Example:
        >>> Tracked(torch.tensor([4]), Streamlines.from_list([[[0, 0, 0], [1, 0, 0]]])).seeds.tolist()
        [4]
    """

    seeds: Tensor
    streamlines: Streamlines


def track(
    seeds: Tensor,
    *,
    model: StepModel,
    space: TrackingSpace,
    spec: TrackingSpec,
    key: Key,
    numbers: Tensor | None = None,
    num_rows: int | None = None,
) -> Iterator[Tracked]:
    """Track from seeds, and yield lines as they finish, in the order of their seeds.

    The bytes of a line depend on its seed and its number alone, not on the others. Matrix products round differently
    in other shapes, and in other rows of one shape; so the model always runs `num_rows` rows, idle ones among them, and
    line k in row k modulo `num_rows`. At most eight times as many lines are in memory.

    Args:
        seeds: (N, 3) float32, voxel space, corner origin, within the volume.
        model: the model, in evaluation mode, on the device of the volume.
        space: its volume, and the mask.
        spec: the options.
        key: the run's key; it decides the samples of `algo="prob"`.
        numbers: (N,) int64, ascending, the numbers of the seeds; None: 0 to N - 1.
        num_rows: lines that are followed at once; None: see `NUM_ROWS`. Other numbers may round differently.

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
    _check(seeds, model, space, spec)
    numbers = torch.arange(len(seeds)) if numbers is None else numbers
    state = init_track_state(model, space, spec, key=key, num_rows=num_rows)
    queue = SeedQueue(numbers, num_rows)
    finished: list[Tracked] = []
    while not queue.is_empty:
        rows, indices = queue.take()
        if len(rows) > 0:
            lines, starts = numbers[indices].to(device), seeds[indices].to(device)
            state = with_lines(state, rows.to(device), lines, starts, donate=True)
        for _ in range(_STEPS):
            state = track_step(state, model=model, space=space, spec=spec, donate=True)
        rows = queue.ended(state.is_live.cpu())
        finished.append(_lines(state, rows.to(device), spec))
        num_before, num_done = queue.release(rows)
        if num_done - num_before >= num_rows or queue.is_empty:
            ready, finished = _in_order(finished, int(numbers[num_done - 1]))
            queue.num_yielded = num_done
            yield ready


def _check(seeds: Tensor, model: StepModel, space: TrackingSpace, spec: TrackingSpec) -> None:
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
    if seeds.ndim != 2 or seeds.shape[1] != 3:
        raise ValueError(f"Expected seeds of shape (N, 3). Received: {tuple(seeds.shape)}.")
    outside = ~space.contains(seeds.to(space.volume.device))
    if outside.any():
        size = " x ".join(map(str, space.volume.shape[:3]))
        raise ValueError(
            f"Expected seeds in the volume of {size} voxels (voxel space, corner origin). "
            f"Received: {int(outside.sum())} of {len(seeds)} outside, the first {seeds[outside.cpu()][0].tolist()}."
        )


def _lines(state: TrackState, rows: Tensor, spec: TrackingSpec) -> Tracked:
    """The finished lines of some rows that are long enough: the first half turned round, then the second."""
    rows = rows[state.num_points[rows] > spec.min_steps]
    lengths, turn = state.num_points[rows], state.turn[rows]
    offsets = offsets_of(lengths)
    num_points = int(offsets[-1])
    line = torch.arange(len(rows), device=rows.device).repeat_interleave(lengths, output_size=num_points)
    place = torch.arange(num_points, device=rows.device) - offsets[line]
    column = torch.where(place < turn[line], turn[line] - 1 - place, place)
    points = state.points[rows[line], column]
    return Tracked(state.line[rows].cpu(), Streamlines(points.cpu(), offsets.cpu()))


def _in_order(finished: list[Tracked], last: int) -> tuple[Tracked, list[Tracked]]:
    """Lines up to a number, in their order, and the others."""
    seeds = torch.cat([tracked.seeds for tracked in finished])
    points = torch.cat([tracked.streamlines.points for tracked in finished])
    lines = Streamlines(points, offsets_of(torch.cat([tracked.streamlines.lengths for tracked in finished])))
    order = seeds.argsort()
    is_ready = seeds[order] <= last
    ready, waiting = order[is_ready], order[~is_ready]
    return Tracked(seeds[ready], lines.select(ready)), [Tracked(seeds[waiting], lines.select(waiting))]
