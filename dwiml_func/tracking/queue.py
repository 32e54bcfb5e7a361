"""Which seed goes to which row of the model: any, or one of those whose results are bitwise identical."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dwiml_func.tracking.space import TrackingSpace
from dwiml_func.tracking.spec import TrackingSpec
from dwiml_func.tracking.state import StepModel, TrackState
from dwiml_func.tracking.step import chosen_directions, next_steps

__all__ = ["SeedQueue", "row_period"]

_WINDOW = 8  # times the number of rows: how far seeds may be ahead of the oldest one whose line still grows


class SeedQueue:
    """Seeds (N,) with ascending numbers; seed number k waits for any of the rows that are k modulo `period`.

    `period` divides `num_rows`. An index below is a seed's place among the N.
    """

    def __init__(self, numbers: Tensor, num_rows: int, period: int) -> None:
        kind = numbers % period
        self._period = period
        self._order = kind.argsort(stable=True)  # indices by kind, then by number
        ends = torch.bincount(kind, minlength=period).cumsum(0)
        self._next, self._ends = torch.cat([ends.new_zeros(1), ends[:-1]]), ends
        self._index = torch.full((num_rows,), -1)  # of the seed in each row
        self._is_done = torch.zeros(len(numbers), dtype=torch.bool)
        self.num_done = 0  # all seeds before this index are done

    @property
    def is_empty(self) -> bool:
        """Whether all lines are finished."""
        return self.num_done == len(self._is_done)

    def take(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Idle rows (L,) of first to end - 1, and the indices (L,) of the seeds that go there now."""
        rows = (self._index[first:end] < 0).nonzero()[:, 0] + first
        kind, order = (rows % self._period).sort(stable=True)
        rows = rows[order]
        place = self._next[kind] + torch.arange(len(rows)) - torch.searchsorted(kind, kind)  # one seed after the other
        is_there = place < self._ends[kind]
        rows, kind, indices = rows[is_there], kind[is_there], self._order[place[is_there]]
        is_near = indices < self.num_done + _WINDOW * len(self._index)
        rows, indices = rows[is_near], indices[is_near]
        self._index[rows] = indices
        self._next += torch.bincount(kind[is_near], minlength=self._period)
        return rows, indices

    def release(self, first: int, is_live: Tensor) -> Tensor:
        """Make the rows from `first` on idle whose lines ended, `is_live` (R,) false; returns them (L,)."""
        rows = ((self._index[first : first + len(is_live)] >= 0) & ~is_live).nonzero()[:, 0] + first
        self._is_done[self._index[rows]] = True
        self._index[rows] = -1
        near = self._is_done[self.num_done : self.num_done + _WINDOW * len(self._index)]
        self.num_done += len(near) if bool(near.all()) else int(near.int().argmin())
        return rows


_LEAST = 16  # rows of float32 lie alike in the lines of the cache, of 64 bytes, at the latest after as many
_NUM_LINES = 3
_NUM_STEPS = 4


def row_period(state: TrackState, *, model: StepModel, space: TrackingSpace, spec: TrackingSpec) -> int:
    """The smallest number p, at least 16, such that rows k and k + p of the model give bitwise identical results.

    It is measured: all rows get the same numbers, for some steps. Rows whose products add in another order differ in
    about every second sum, and there are thousands. It depends on the model, the number of rows R, and the machine.

    Args:
        state: R idle rows.
        model, space, spec: as in `track`.

    Returns:
        p, which divides R; R where that is no multiple of 16, and on other devices than the CPU.

    Example:
        >>> from dwiml_func.core.rng import Key
        >>> from dwiml_func.models import Learn2Track
        >>> from dwiml_func.tracking.state import init_track_state
        >>> model, spec = Learn2Track(28).eval(), TrackingSpec(step_size=1)
        >>> space = TrackingSpace(volume=torch.rand(9, 9, 9, 28), voxel_sizes=(2.0, 2.0, 2.0))
        >>> state = init_track_state(model, space, spec, key=Key(1), num_rows=8)
        >>> row_period(state, model=model, space=space, spec=spec)
        8
    """
    num_rows = len(state.line)
    if num_rows % _LEAST or state.points.device.type != "cpu":
        return num_rows
    periods = [period for period in range(_LEAST, num_rows + 1, _LEAST) if num_rows % period == 0]
    run_step = getattr(model, "run_step_in_place", model.run_step)
    numbers = torch.Generator().manual_seed(0)

    def same_rows(num_columns: int) -> Tensor:
        return torch.randn(1, num_columns, generator=numbers).repeat(num_rows, 1)

    with torch.no_grad():
        for line in range(_NUM_LINES):
            state, model_state = replace(state, line=torch.full_like(state.line, line)), None
            for _ in range(_NUM_STEPS):
                position = torch.tensor(space.volume.shape[:3]) * torch.rand(3, generator=numbers)
                inputs = space.read(position.repeat(num_rows, 1))
                dirs = same_rows(3 * max(1, model.nb_previous_dirs))
                outputs, model_state = run_step(
                    inputs + same_rows(inputs.shape[1]), dirs[:, : 3 * model.nb_previous_dirs], model_state
                )
                direction, _ = chosen_directions(outputs, state, model, spec)
                step, _ = next_steps(direction, dirs[:, :3], space, spec)
                for found in (inputs, outputs, direction, step):
                    while len(periods) > 1 and not _repeats(found, periods[0]):
                        del periods[0]
    return periods[0]


def _repeats(rows: Tensor, period: int) -> bool:
    groups = rows.unflatten(0, (-1, period))
    return torch.equal(groups, groups[:1].expand_as(groups))
