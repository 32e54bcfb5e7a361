"""The packed layout: the first rows of all sequences, longest sequence first, then all second rows, and so on.

It is the layout of `torch.nn.utils.rnn.PackedSequence`. The sequences that still run at a time step are a prefix of
those that ran before, so a recurrent model needs no padding and no mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PackedLayout", "packed_layout"]


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayout:
    """Where each row of a flat array (sequences one after the other) is in the packed layout.

    rows: (P,) int64, the flat row of each packed row.
    packed_rows: (P,) int64, the packed row of each flat row.
    batch_sizes: number of rows of each time step; they do not increase and add up to P. Under torch.compile, which
        cannot read numbers, the (S,) int64 lengths of the sequences, longest first.
    """

    rows: Tensor
    packed_rows: Tensor
    batch_sizes: list[int] | Tensor

    def pack(self, flat: Tensor) -> Tensor:
        """Reorder flat rows (P, ...) into packed ones."""
        # Not flat[self.rows]: index_select and its gradient are twice as fast on CPU for rows of 50 or 100 columns.
        return flat.index_select(0, self.rows)

    def unpack(self, packed: Tensor) -> Tensor:
        """Put packed rows (P, ...) back into the flat order."""
        return packed.index_select(0, self.packed_rows)


def packed_layout(offsets: Tensor, num_rows: int | None = None) -> PackedLayout:
    """The packed layout of sequences s with the flat rows offsets[s] to offsets[s + 1] - 1; they may be empty.

    `offsets` is (S + 1,) int64. Pass offsets[-1] as `num_rows` where it is known: torch.compile cannot read it, and an
    accelerator would have to wait. Sequences of equal length keep their order.
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
    """A layout as an operator, since the number of time steps is not known when a graph is traced."""
    return _layout(offsets, num_rows)[:3]


@_opaque_layout.register_fake
def _(offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return offsets.new_empty(num_rows), offsets.new_empty(num_rows), offsets.new_empty(offsets.shape[0] - 1)
