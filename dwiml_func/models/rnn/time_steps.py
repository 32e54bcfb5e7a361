"""Where the rows of each time step lie in the packed layout, and blocks of time steps that fit a core's cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Block", "TimeSteps"]

_BLOCK_ROWS = 1024  # of 400 gates in float32 that is 1.6 MB


class Block(NamedTuple):
    """Consecutive time steps, and their rows."""

    steps: slice
    rows: slice


class TimeSteps:
    """The time steps of P packed rows: `batch_sizes` has the rows of each step, S in the first, and does not increase.

    `blocks` has all time steps, in blocks of about `_BLOCK_ROWS` rows.
    """

    def __init__(self, batch_sizes: Sequence[int]) -> None:
        self.sizes = list(batch_sizes)
        self.blocks: list[Block] = []
        first_step, first_row, end_row = 0, 0, 0
        for step, num_rows in enumerate(batch_sizes):
            end_row += num_rows
            if end_row - first_row >= _BLOCK_ROWS or step + 1 == len(batch_sizes):
                self.blocks.append(Block(slice(first_step, step + 1), slice(first_row, end_row)))
                first_step, first_row = step + 1, end_row

    @property
    def most_rows(self) -> int:
        """The rows of the largest block."""
        return max(rows.stop - rows.start for _, rows in self.blocks)

    def step_before(self, rows: Tensor, block: Block, first: Tensor) -> Tensor:
        """Of rows (P, H) those of the last time step before a block; `first` (S, H) precedes step 0."""
        if block.steps.start == 0:
            return first
        return rows[block.rows.start - self.sizes[block.steps.start - 1] : block.rows.start]

    def rows_before(self, rows: Tensor, block: Block, first: Tensor) -> Tensor:
        """For each row of a block the previous row of its sequence; `first` (S, H) precedes step 0."""
        sizes, end_row = self.sizes[block.steps], block.rows.stop - self.sizes[block.steps.stop - 1]
        if block.steps.start == 0:
            return torch.cat(_before(sizes, rows[:end_row].split(sizes[:-1]), first))
        size_before = self.sizes[block.steps.start - 1]
        rows = rows[block.rows.start - size_before : end_row]
        if sizes[-1] == size_before:  # none ended
            return rows
        first, *steps = rows.split([size_before, *sizes[:-1]])
        return torch.cat(_before(sizes, steps, first))

    def last_rows(self, rows: Tensor) -> Tensor:
        """Each sequence's last row, (S, H)."""
        if len(self.sizes) == 1:  # tracking: a step at a time, where the indices would take longer than the copy
            return rows.clone()
        return rows.index_select(0, self._last_indices(rows.device))

    def with_last(self, grad_outputs: Tensor, grad_last: Tensor) -> Tensor:
        """A copy of the outputs' gradient (P, H) with that of the last hidden state (S, H) added."""
        grad_hidden = grad_outputs.clone(memory_format=torch.contiguous_format)
        return grad_hidden.index_add_(0, self._last_indices(grad_last.device), grad_last)

    def _last_indices(self, device: torch.device) -> Tensor:
        sizes = torch.tensor(self.sizes)
        lengths = (sizes[:, None] > torch.arange(self.sizes[0])).sum(0)
        return (sizes.cumsum(0) - sizes)[lengths - 1].add_(torch.arange(self.sizes[0])).to(device)


def _before(sizes: Sequence[int], steps: Sequence[Tensor], first: Tensor) -> list[Tensor]:
    pairs = zip((first, *steps), sizes, strict=False)
    return [step if len(step) == size else step[:size] for step, size in pairs]
