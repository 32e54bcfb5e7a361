"""The state of tracking: an immutable value, one row a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dwiml_func.core.rng import Key
from dwiml_func.models.direction_getters import DirectionGetter
from dwiml_func.tracking.space import TrackingSpace
from dwiml_func.tracking.spec import TrackingSpec

__all__ = ["StepModel", "TrackState", "init_track_state", "with_lines", "without_memory"]


class StepModel(Protocol):
    """A model that tracks: it predicts at one point of many lines at a time.

    Example:
        >>> from dwiml_func.models import Learn2Track
        >>> model: StepModel = Learn2Track(28)
    """

    @property
    def nb_previous_dirs(self) -> int:
        """How many previous directions it reads."""
        ...

    @property
    def direction_getter(self) -> DirectionGetter:
        """What its outputs mean."""
        ...

    def run_step(self, inputs: Tensor, dirs: Tensor, state: Any = None, /) -> tuple[Tensor, Any]:
        """Outputs (S, K) and the new state: any tree of tensors of S rows, in which zeros mean a new line; or None.

        `inputs` (S, F) are those at the lines' newest points, `dirs` (S, 3 * nb_previous_dirs) the previous directions.
        Where zeros everywhere would cost too much, the state may have a method `forget(rows)`, which gives the state
        with new lines in rows (S,) bool, and the model `run_step_in_place`, which may write into a state's memory, and
        `prefill(inputs, dirs, state, row)`, which may too: the state after a new line's first points, read at once.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrackState:
    """Lines that are followed, R rows; a row without a line is idle.

    Args:
        points: (R, T, 3) float32, voxel space, corner origin: each line's points in the order in which they were found,
            the seed first. The last of the T columns is scratch.
        num_points: (R,) int64, points found.
        turn: (R,) int64, points of the first half; 0 while it is tracked.
        cursor: (R,) int64, the point that the model reads next.
        position: (R, 3) float32, that point.
        dirs: (R, 3 * n) float32, the previous directions there, voxel space, the latest first, zeros where there is
            none; n is at least 1.
        model_state: the model's, see `StepModel.run_step`.
        line: (R,) int64, the number of each row's line, which addresses its random numbers; -1 in idle rows.
        is_live: (R,) bool, whether the row's line still grows.
        key: of the random numbers.

    Example:
        >>> TrackState.__slots__[:3]
        ('points', 'num_points', 'turn')
    """

    points: Tensor
    num_points: Tensor
    turn: Tensor
    cursor: Tensor
    position: Tensor
    dirs: Tensor
    model_state: Any
    line: Tensor
    is_live: Tensor
    key: Key

    @property
    def is_replay(self) -> Tensor:
        """(R,) bool: the model reads the first half again, from its end, before the second half starts at the seed."""
        return (self.cursor > 0) & (self.cursor < self.turn)


def init_track_state(
    model: StepModel, space: TrackingSpace, spec: TrackingSpec, *, key: Key, num_rows: int
) -> TrackState:
    """A state of idle rows.

    Args:
        model: the model, in evaluation mode.
        space: where it tracks.
        spec: the options; they bound the number of points.
        key: the run's key.
        num_rows: R.

    Returns:
        The state; `with_lines` gives its rows lines.

    Example:
        >>> from dwiml_func.models import Learn2Track
        >>> space = TrackingSpace(volume=torch.zeros(4, 4, 4, 28), voxel_sizes=(2.0, 2.0, 2.0))
        >>> state = init_track_state(Learn2Track(28), space, TrackingSpec(step_size=1), key=Key(1), num_rows=8)
        >>> state.points.shape, state.is_live.any().item()
        (torch.Size([8, 302, 3]), False)
    """
    device = space.volume.device
    count = torch.zeros(num_rows, dtype=torch.int64, device=device)
    position = torch.zeros(num_rows, 3, device=device)
    dirs = torch.zeros(num_rows, 3 * max(1, model.nb_previous_dirs), device=device)
    with torch.no_grad():
        _, model_state = model.run_step(space.read(position), dirs[:, : 3 * model.nb_previous_dirs], None)
    return TrackState(
        points=torch.zeros(num_rows, spec.max_steps + 2, 3, device=device),
        num_points=count,
        turn=count,
        cursor=count,
        position=position,
        dirs=dirs,
        model_state=None if model_state is None else tree_map(torch.zeros_like, model_state),
        line=torch.full_like(count, -1),
        is_live=torch.zeros_like(count, dtype=torch.bool),
        key=key,
    )


def with_lines(state: TrackState, rows: Tensor, lines: Tensor, seeds: Tensor, *, donate: bool = False) -> TrackState:
    """Start lines (L,) at seeds (L, 3) in rows (L,). With `donate` the points of `state` may be overwritten."""
    points = state.points if donate else state.points.clone()
    points[rows, 0] = seeds
    is_new = torch.zeros_like(state.is_live).index_fill(0, rows, True)
    zeros = torch.zeros_like(rows)
    return TrackState(
        points=points,
        num_points=state.num_points.index_copy(0, rows, zeros + 1),
        turn=state.turn.index_copy(0, rows, zeros),
        cursor=state.cursor.index_copy(0, rows, zeros),
        position=state.position.index_copy(0, rows, seeds),
        dirs=state.dirs.masked_fill(is_new[:, None], 0.0),
        model_state=without_memory(state.model_state, is_new),
        line=state.line.index_copy(0, rows, lines),
        is_live=state.is_live | is_new,
        key=state.key,
    )


def without_memory(model_state: Any, rows: Tensor) -> Any:
    """The model's state with zeros in rows (R,) bool: of new lines."""
    if model_state is None:
        return None
    if (forget := getattr(model_state, "forget", None)) is not None:
        return forget(rows)
    return tree_map(lambda leaf: leaf.masked_fill(rows.reshape(-1, *[1] * (leaf.ndim - 1)), 0), model_state)
