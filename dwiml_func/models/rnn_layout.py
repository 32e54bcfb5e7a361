"""The packed layout as the recurrent kernels walk over it: time steps, blocks of them, rows before, last rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Block", "PackedLayout"]

_BLOCK_ROWS = 1024  # of 400 gates in float32 that is 1.6 MB


class Block(NamedTuple):
    """Consecutive time steps, and their rows.

    Example:
        >>> PackedLayout([2, 1]).blocks
        [Block(steps=slice(0, 2, None), rows=slice(0, 3, None))]
    """

    steps: slice
    rows: slice


class PackedLayout:
    """Where the rows of each time step lie, and what belongs to what.

    Args:
        batch_sizes: T numbers, rows of each time step; they do not increase and add up to P. The first is S.

    Attributes:
        blocks: all time steps, in blocks of about as many rows as fit a core's cache.

    Example:
        >>> layout, rows = PackedLayout([2, 1]), torch.tensor([[1.0], [2.0], [3.0]])
        >>> layout.last_rows(rows).tolist()
        [[3.0], [2.0]]
        >>> layout.rows_before(rows, layout.blocks[0], torch.zeros(2, 1)).tolist()
        [[0.0], [0.0], [1.0]]
    """

    def __init__(self, batch_sizes: Sequence[int]) -> None:
        self._sizes = batch_sizes
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

    def steps(self, *tensors: Tensor, block: Block | None = None) -> list[tuple[Tensor, ...]]:
        """Each tensor's rows at each time step; tensors (P, ...), or of a block's rows alone."""
        sizes = self._sizes if block is None else self._sizes[block.steps]
        return list(zip(*(tensor.split(sizes) for tensor in tensors), strict=True))

    def before(self, steps: Sequence[Tensor], first: Tensor) -> list[Tensor]:
        """At each time step the rows one step before, of the sequences that still run; `first` before the first."""
        return _before(self._sizes, steps, first)

    def rows_before(self, rows: Tensor, block: Block, first: Tensor) -> Tensor:
        """For each row of a block the row of its sequence one step before; `first` (S, H) before the first step."""
        sizes, end_row = self._sizes[block.steps], block.rows.stop - self._sizes[block.steps.stop - 1]
        if block.steps.start == 0:
            return torch.cat(_before(sizes, rows[:end_row].split(sizes[:-1]), first))
        size_before = self._sizes[block.steps.start - 1]
        rows = rows[block.rows.start - size_before : end_row]
        if sizes[-1] == size_before:  # none ended
            return rows
        first, *steps = rows.split([size_before, *sizes[:-1]])
        return torch.cat(_before(sizes, steps, first))

    def last_rows(self, rows: Tensor) -> Tensor:
        """(S, H): each sequence's last row."""
        return rows.index_select(0, self._last_indices(rows.device))

    def with_last(self, grad_outputs: Tensor, grad_last: Tensor) -> Tensor:
        """A copy of the outputs' gradients (P, H) to which those of the last hidden state (S, H) are added."""
        grad_hidden = grad_outputs.clone(memory_format=torch.contiguous_format)
        return grad_hidden.index_add_(0, self._last_indices(grad_last.device), grad_last)

    def _last_indices(self, device: torch.device) -> Tensor:
        sizes = torch.tensor(self._sizes)
        lengths = (sizes[:, None] > torch.arange(self._sizes[0])).sum(0)
        return (sizes.cumsum(0) - sizes)[lengths - 1].add_(torch.arange(self._sizes[0])).to(device)


def _before(sizes: Sequence[int], steps: Sequence[Tensor], first: Tensor) -> list[Tensor]:
    pairs = zip((first, *steps), sizes, strict=False)
    return [step if len(step) == size else step[:size] for step, size in pairs]
