"""Which seed goes into which row, and which lines are finished: the bookkeeping of `track`, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SeedQueue"]

_WINDOW = 8  # times the number of rows: how far seeds may be ahead of the oldest one whose line still grows


class SeedQueue:
    """Seeds (N,) with ascending numbers; seed number k waits for row k modulo `num_rows`.

    An index below is a seed's place among the N.
    """

    def __init__(self, numbers: Tensor, num_rows: int) -> None:
        row = numbers % num_rows
        self._order = row.argsort(stable=True)  # indices by row, then by number
        ends = torch.bincount(row, minlength=num_rows).cumsum(0)
        self._next, self._ends = torch.cat([ends.new_zeros(1), ends[:-1]]), ends
        self._index = torch.full((num_rows,), -1)  # of the seed in each row
        self._is_done = torch.zeros(len(numbers), dtype=torch.bool)
        self._num_done = 0  # all seeds before this index are done
        self.num_yielded = 0

    @property
    def is_empty(self) -> bool:
        """Whether all lines are finished."""
        return self._num_done == len(self._is_done)

    def take(self) -> tuple[Tensor, Tensor]:
        """Idle rows (L,), and the indices (L,) of the seeds that go there now."""
        rows = ((self._index < 0) & (self._next < self._ends)).nonzero()[:, 0]
        indices = self._order[self._next[rows]]
        is_near = indices < self._num_done + _WINDOW * len(self._index)
        rows, indices = rows[is_near], indices[is_near]
        self._index[rows] = indices
        self._next[rows] += 1
        return rows, indices

    def ended(self, is_live: Tensor) -> Tensor:
        """The rows (L,) whose lines ended."""
        return ((self._index >= 0) & ~is_live).nonzero()[:, 0]

    def release(self, rows: Tensor) -> tuple[int, int]:
        """Make rows idle; returns how many seeds were yielded, and up to which index all lines are finished."""
        self._is_done[self._index[rows]] = True
        self._index[rows] = -1
        near = self._is_done[self._num_done : self._num_done + (_WINDOW + 1) * len(self._index)]
        self._num_done += len(near) if bool(near.all()) else int(near.int().argmin())
        return self.num_yielded, self._num_done
