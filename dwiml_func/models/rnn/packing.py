"""From flat sequences, one after the other, to the packed time-major layout, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PackedLayout", "packed_layout"]


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayout:
    """Where each row of a flat array stands in the packed layout.

    The packed layout has the first rows of all sequences, longest sequence first, then all second rows, and so on: that
    of `torch.nn.utils.rnn.PackedSequence`. The sequences that still run at a time step are a prefix of those that ran
    before, so a recurrent model needs no padding and no mask.

    Args:
        rows: (P,) int64, the flat row of each packed row.
        packed_rows: (P,) int64, the packed row of each flat row.
        batch_sizes: T numbers that do not increase and add up to P: sequences that are longer than each time step.
            Under torch.compile, where no number can be read, (S,) int64: the sequences' lengths, longest first.

    Example:
        >>> layout = packed_layout(torch.tensor([0, 1, 4]))  # sequences a and b, of 1 and 3 rows
        >>> layout.pack(torch.tensor([[10], [20], [21], [22]])).flatten()  # b0 a0 | b1 | b2
        tensor([20, 10, 21, 22])
    """

    rows: Tensor
    packed_rows: Tensor
    batch_sizes: list[int] | Tensor

    def pack(self, flat: Tensor) -> Tensor:
        """Reorder flat rows into packed ones.

        Args:
            flat: (P, ...), any dtype.

        Returns:
            (P, ...), a copy.

        Example:
            >>> packed_layout(torch.tensor([0, 1, 3])).pack(torch.tensor([1.0, 2.0, 3.0]))
            tensor([2., 1., 3.])
        """
        # Not flat[self.rows]: index_select and its gradient are twice as fast on CPU for rows of 50 or 100 columns.
        return flat.index_select(0, self.rows)

    def unpack(self, packed: Tensor) -> Tensor:
        """Put packed rows back into the flat order.

        Args:
            packed: (P, ...), any dtype.

        Returns:
            (P, ...), a copy.

        Example:
            >>> layout = packed_layout(torch.tensor([0, 1, 3]))
            >>> layout.unpack(layout.pack(torch.tensor([1.0, 2.0, 3.0])))
            tensor([1., 2., 3.])
        """
        return packed.index_select(0, self.packed_rows)


def packed_layout(offsets: Tensor, num_rows: int | None = None) -> PackedLayout:
    """Lay out sequences in packed time-major order.

    Args:
        offsets: (S + 1,) int64, of the flat array: sequence s has rows offsets[s] to offsets[s + 1] - 1. The first
            is 0. Sequences may be empty.
        num_rows: offsets[-1], where it is known: torch.compile cannot read it, and an accelerator would have to wait.

    Returns:
        The layout of the offsets[-1] rows. Sequences of equal length keep their order.

    Example:
        >>> packed_layout(torch.tensor([0, 1, 4])).batch_sizes
        [2, 1, 1]
    """
    num_rows = int(offsets[-1]) if num_rows is None else num_rows
    if torch.compiler.is_compiling():
        return PackedLayout(*_opaque_layout(offsets, num_rows))
    rows, packed_rows, _, batch_sizes = _layout(offsets, num_rows)
    return PackedLayout(rows, packed_rows, batch_sizes.tolist())


def _layout(offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows, packed_rows, lengths in the order of packed sequences, batch sizes)."""
    lengths = offsets.diff()
    order = torch.argsort(lengths, descending=True, stable=True)
    num_ended = torch.bincount(lengths).cumsum(0)  # at t: sequences of at most t rows
    batch_sizes = (len(lengths) - num_ended)[:-1]

    times = torch.arange(len(batch_sizes), device=offsets.device)
    time = times.repeat_interleave(batch_sizes, output_size=num_rows)
    packed = torch.arange(num_rows, device=offsets.device)
    rank = packed - (batch_sizes.cumsum(0) - batch_sizes)[time]
    rows = offsets[order[rank]] + time

    packed_rows = torch.empty_like(rows)
    packed_rows[rows] = packed
    return rows, packed_rows, lengths[order], batch_sizes


@torch.library.custom_op("dwiml_func::packed_layout", mutates_args=())
def _opaque_layout(offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """A layout as an operator: the number of time steps, a size within, is not known when a graph is traced."""
    return _layout(offsets, num_rows)[:3]


@_opaque_layout.register_fake
def _(offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return offsets.new_empty(num_rows), offsets.new_empty(num_rows), offsets.new_empty(offsets.shape[0] - 1)
