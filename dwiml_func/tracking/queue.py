"""Which seed goes into which row, and which lines are finished: the bookkeeping of `track`, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SeedQueue"]

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
