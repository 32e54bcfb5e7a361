"""The packed layout: the first rows of all sequences, longest sequence first, then all second rows, and so on.

It is the layout of `torch.nn.utils.rnn.PackedSequence`. The sequences that still run at a time step are a prefix of
those that ran before, so a recurrent model needs no padding and no mask.

The padded layout is for GPUs, which run many rows as fast as few: all sequences run for a number of time steps that the
host knows. Rows of padding come after those of their sequence, so no real row reads them, and since nothing reads their
outputs, their gradients are zeros: no mask is needed here either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PackedLayout", "PaddedLayout", "packed_layout", "padded_layout"]


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


@dataclass(frozen=True, slots=True, eq=False)
class PaddedLayout:
    """Where each row of a flat array is, time step by time step, with all S sequences in each.

    slots: (P,) int64, the padded row of each flat row.
    batch_sizes: S for each time step, as in `PackedLayout`.
    """

    slots: Tensor
    batch_sizes: list[int]

    def pack(self, flat: Tensor) -> Tensor:
        """Put flat rows (P, ...) among rows of zeros."""
        padded = flat.new_zeros(sum(self.batch_sizes), *flat.shape[1:])
        return padded.index_copy(0, self.slots, flat)

    def unpack(self, padded: Tensor) -> Tensor:
        """Put the rows that are not padding back into the flat order."""
        return padded.index_select(0, self.slots)


def padded_layout(offsets: Tensor, num_rows: int, length: int) -> PaddedLayout:
    """The padded layout of sequences of at most `length` rows each, see `packed_layout`. No device is waited for."""
    num_sequences = len(offsets) - 1
    numbers = torch.arange(num_sequences, device=offsets.device)
    sequence = numbers.repeat_interleave(offsets.diff(), output_size=num_rows)
    time = torch.arange(num_rows, device=offsets.device) - offsets[:-1].index_select(0, sequence)
    return PaddedLayout(time * num_sequences + sequence, [num_sequences] * length)


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
