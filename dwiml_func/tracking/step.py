"""One step of all lines: the direction that each takes, and all rules by which a line ends."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dwiml_func.core.rng import Stream, fold_in
from dwiml_func.data.neighborhood import direction_units
from dwiml_func.data.streamlines import previous_directions
from dwiml_func.tracking.random_numbers import uniforms
from dwiml_func.tracking.space import TrackingSpace
from dwiml_func.tracking.spec import TrackingSpec
from dwiml_func.tracking.state import StepModel, TrackState, without_memory

__all__ = ["chosen_directions", "next_steps", "reads_at_once", "track_step", "with_first_halves_read"]

_DIRECTION = 2  # of the stream's random numbers, beside those of the seeds
_STRAIGHT_BACK = 180.0  # degrees: no angle is larger


def track_step(
    state: TrackState, *, model: StepModel, space: TrackingSpace, spec: TrackingSpec, donate: bool = False
) -> TrackState:
    """Let the model read one point of every line, and move the lines on.

    A line grows from its seed until it ends: at the limit of its length, at an angle above `theta`, where the model
    ends it, with a direction that is not a number, at the border of the volume or the mask. Then, unless
    `track_forward_only`, the model reads the first half again, from its end and without the seed: a point a step, or
    at once if it has `prefill`, on a CPU. From the seed on the line grows in the other direction. A row depends on that
    row of `state` alone.

    Args:
        state: R rows.
        model: the model, in evaluation mode.
        space: its volume, and the mask.
        spec: the options.
        donate: the result may overwrite the memory of `state`, which is not used again.

    Returns:
        The next state.

    Source: dwi_ml, `tracker.py` and `tracking_utils.py` (the order of the checks; reading the first half again).

    Example:
        >>> from dwiml_func.core.rng import Key
        >>> from dwiml_func.models import Learn2Track
        >>> from dwiml_func.tracking.state import init_track_state, with_lines
        >>> model, spec = Learn2Track(28).eval(), TrackingSpec(step_size=1)
        >>> space = TrackingSpace(volume=torch.zeros(9, 9, 9, 28), voxel_sizes=(2.0, 2.0, 2.0))
        >>> state = init_track_state(model, space, spec, key=Key(1), num_rows=8)
        >>> state = with_lines(state, torch.tensor([3]), torch.tensor([0]), torch.full((1, 3), 4.5))
        >>> state = track_step(state, model=model, space=space, spec=spec)
        >>> state.num_points.tolist()
        [0, 0, 0, 2, 0, 0, 0, 0]
    """
    with torch.no_grad():
        inputs, dirs = space.read(state.position), state.dirs[:, : 3 * model.nb_previous_dirs]
        run_step = getattr(model, "run_step_in_place", model.run_step) if donate else model.run_step
        outputs, model_state = run_step(inputs, _in_units(dirs, space), state.model_state)
        direction, ends = chosen_directions(outputs, state, model, spec)
        step, is_valid = next_steps(direction, state.dirs[:, :3], space, spec)
        target = state.position + step

        is_replay = state.is_replay
        is_asked = state.is_live & ~is_replay
        is_allowed = space.allows(target)
        moves = is_asked & is_valid & ~ends & space.contains(target)
        if spec.discard_last_point:
            moves = moves & is_allowed
        num_points = state.num_points + moves
        is_full = num_points > spec.max_steps
        ended = is_asked & ~(moves & is_allowed & ~is_full)
        turns = torch.zeros_like(ended) if spec.track_forward_only else ended & (state.turn == 0) & (num_points > 1)
        turns &= ~is_full
        is_live = state.is_live & ~(ended & ~turns)

        points = state.points if donate else state.points.clone()
        num_rows, num_columns, _ = points.shape
        first = torch.arange(0, num_rows * num_columns, num_columns, device=points.device)
        flat = points.view(-1, 3)
        flat.index_copy_(0, first + torch.where(moves, state.num_points, num_columns - 1), target)
        cursor = torch.where(is_replay, state.cursor - 1, torch.where(is_asked, num_points - 1, state.cursor))
        position = flat.index_select(0, first + cursor)
        walked = torch.cat([position - state.position, state.dirs], dim=1)[:, : state.dirs.shape[1]]
        after = TrackState(
            points=points,
            num_points=num_points,
            turn=torch.where(turns, num_points, state.turn),
            cursor=cursor,
            position=position,
            dirs=walked.masked_fill(turns[:, None], 0.0),
            model_state=without_memory(model_state, turns | ~is_live),  # or the memory of idle rows would grow
            line=state.line,
            is_live=is_live,
            key=state.key,
        )
        return with_first_halves_read(after, turns, model, space) if reads_at_once(model, space) else after


def reads_at_once(model: StepModel, space: TrackingSpace) -> bool:
    """Whether first halves are read again at once; on a GPU single lines would leave it idle."""
    return space.volume.device.type == "cpu" and hasattr(model, "prefill")


def with_first_halves_read(state: TrackState, turned: Tensor, model: Any, space: TrackingSpace) -> TrackState:
    """The state in which rows (R,) bool that turned are at their seeds again; it overwrites the model's.

    Each line by itself: in one product with others it would be rounded differently.
    """
    cursor, position, all_dirs = state.cursor.clone(), state.position.clone(), state.dirs.clone()
    model_state = state.model_state
    for row in turned.nonzero()[:, 0].tolist():
        num = int(state.turn[row])
        half = state.points[row, :num].flip(0)
        steps = torch.cat([half.diff(dim=0), half.new_zeros(1, 3)])
        dirs = previous_directions(steps, torch.tensor([0, num]), state.dirs.shape[1] // 3)
        given = _in_units(dirs[:-1, : 3 * model.nb_previous_dirs], space)
        with torch.no_grad():
            model_state = model.prefill(space.read(half[:-1]), given, model_state, row)
        cursor[row], position[row], all_dirs[row] = 0, half[-1], dirs[-1]
    return replace(state, cursor=cursor, position=position, dirs=all_dirs, model_state=model_state)


def chosen_directions(
    outputs: Tensor, state: TrackState, model: StepModel, spec: TrackingSpec
) -> tuple[Tensor, Tensor]:
    """Directions (R, 3), in the model's units, of any length, and whether the model ends the lines, (R,) bool."""
    getter = model.direction_getter
    if spec.algo == "prob":
        key = fold_in(state.key, Stream.TRACK, _DIRECTION)
        asked = 2 * state.num_points + (state.turn > 0)  # the end of the first half and the seed are two questions
        direction = getter.sample_from(outputs, uniforms(key, state.line.clamp(min=0), asked))
    else:
        direction = getter.directions(outputs)
    if not getter.add_eos:
        return direction, torch.zeros_like(state.is_live)
    if spec.eos_stop == "max":
        return direction, getter.eos_is_most_likely(outputs)
    return direction, getter.eos_probability(outputs) > (0.5 if spec.eos_stop is None else spec.eos_stop)


def next_steps(direction: Tensor, previous: Tensor, space: TrackingSpace, spec: TrackingSpec) -> tuple[Tensor, Tensor]:
    """Steps (R, 3), voxel space, as long in mm as asked for, and whether lines may take them, (R,) bool.

    Directions (R, 3) are in the model's units, previous ones in voxels.
    """
    sizes, is_cubic = _sizes(space.voxel_sizes, direction.device)
    direction_mm = direction * sizes if is_cubic else direction
    length = torch.linalg.vector_norm(direction_mm, dim=1)
    step = (direction if is_cubic else direction / sizes) * (spec.step_size / length)[:, None]
    is_valid = step.isfinite().all(dim=1)
    if spec.theta < _STRAIGHT_BACK:
        # Both sides times the lengths: a line without a previous direction has 0 >= 0.
        previous_mm = previous * sizes
        scale = length * torch.linalg.vector_norm(previous_mm, dim=1)
        is_valid &= (direction_mm * previous_mm).sum(dim=1) >= math.cos(math.radians(spec.theta)) * scale
    return step, is_valid


def _in_units(dirs: Tensor, space: TrackingSpace) -> Tensor:
    """Previous directions (R, 3 n), voxel space, in the model's units."""
    sizes, is_cubic = _sizes(space.voxel_sizes, dirs.device)
    return dirs if is_cubic else dirs * sizes.repeat(dirs.shape[1] // 3)


@lru_cache(maxsize=16)
def _sizes(voxel_sizes: tuple[float, float, float], device: torch.device) -> tuple[Tensor, bool]:
    """Voxel sizes as a tensor, which costs as much as a step's arithmetic, and whether directions are in voxels."""
    sizes = torch.tensor(voxel_sizes, device=device)
    return sizes, bool((direction_units(sizes) == 1).all())
