"""Causal attention over flat rows: sequences of like lengths are padded together, only for the attention itself.

Everything else of a transformer works on single rows and needs no padding. Rows are padded at the right, where causal
attention never reads them for a real row: so no padding mask is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import dropout, scaled_dot_product_attention

from dwiml_func._transforms import is_transformed
from dwiml_func.models.transformers.blocks import Layout
from dwiml_func.models.transformers.causal import causal_attention, causal_weights

__all__ = ["Sequences", "sequences_of"]

_TRACED_ROWS = 2  # least padded length under torch.compile, which cannot tell whether an unknown 1 is broadcast
_SHORTEST = 0.8  # of a bucket's sequences, relative to the longest: padding then costs a fifth at most
_ROUND = 16  # a CPU has a bucket for each multiple: its softmax takes half of the time on whole registers


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """N flat rows as S sequences, and as P padded rows of buckets.

    positions: (N,) int64, each row's place in its sequence, from 0.
    bucket_sizes: sequences of each bucket. They have like lengths, and are padded to the longest of them.
    bucket_rows: padded rows of each bucket, one bucket after the other; None for all P of a single bucket.
    rows: (P,) int64, the flat row of each padded row; a padded one repeats the last row of its sequence.
    places: (N,) int64, the padded row of each flat row.
    padding: the padded rows that are no flat row, int64; None under torch.compile.
    """

    positions: Tensor
    bucket_sizes: tuple[int, ...]
    bucket_rows: tuple[int, ...] | None
    rows: Tensor
    places: Tensor
    padding: Tensor | None

    def attend(self, projected: Tensor, *, num_heads: int, dropout_rate: float) -> Tensor:
        """Attend to the rows of the same sequence up to and including one's own: (N, d).

        `projected` (N, 3 d) are queries, keys and values next to each other.

        Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2, with dropout on the weights.
        """
        size = projected.shape[1] // 3
        if projected.device.type == "cpu" and not torch.compiler.is_compiling():
            padded_rows = self.bucket_rows or (len(self.rows),)
            buckets = tuple((num, total // num) for num, total in zip(self.bucket_sizes, padded_rows, strict=True))
            return causal_attention(projected, self.rows, self.places, Layout(buckets, num_heads, dropout_rate))
        padded = self._pad(projected)
        results = []
        for num, rows in zip(self.bucket_sizes, self._split(padded), strict=True):
            heads = rows.reshape(num, -1, 3, num_heads, size // num_heads).permute(2, 0, 3, 1, 4)
            query, key, value = heads.unbind()
            attended = _attend(query, key, value, dropout_rate)  # (num, heads, L, size of a head)
            results.append(attended.transpose(1, 2).reshape(-1, size))
        return self._unpad(torch.cat(results) if len(results) != 1 else results[0])

    def _split(self, padded: Tensor) -> tuple[Tensor, ...]:
        return (padded,) if self.bucket_rows is None else padded.split(self.bucket_rows)

    def _pad(self, flat: Tensor) -> Tensor:
        if self.padding is None:
            return flat.index_select(0, self.rows)
        return cast(Tensor, _Pad.apply(flat, self.rows, self.places, self.padding))

    def _unpad(self, padded: Tensor) -> Tensor:
        if self.padding is None:
            return padded.index_select(0, self.places)
        return cast(Tensor, _Unpad.apply(padded, self.rows, self.places, self.padding))


def sequences_of(offsets: Tensor, num_rows: int, padded_length: int | None = None) -> Sequences:
    """The sequences s with the flat rows offsets[s] to offsets[s + 1] - 1; `offsets` is (S + 1,) int64.

    With `padded_length`, all are in one bucket, padded to so many rows, and no accelerator is asked for lengths.
    """
    device = offsets.device
    flat = torch.arange(num_rows, device=device)
    positions = flat - offsets[:-1].repeat_interleave(offsets.diff(), output_size=num_rows)
    if torch.compiler.is_compiling():
        padded, places = _one_bucket(offsets, num_rows)
        return Sequences(positions, (offsets.shape[0] - 1,), None, padded.flatten(), places, None)
    lengths = offsets.diff()
    if padded_length is not None:
        steps = torch.arange(padded_length, device=device)
        starts = offsets[:-1, None].clamp(max=num_rows - 1)
        padded = starts + torch.minimum(steps, (lengths[:, None] - 1).clamp(min=0))
        sequence = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=num_rows)
        real = sequence * padded_length + positions
        return Sequences(positions, (len(lengths),), None, padded.flatten(), real, None)
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    members, rows, is_real, first = [], [offsets[:0]], [offsets[:0].bool()], 0
    while first < len(sizes) and sizes[first] > 0:
        last = first
        longest = sizes[first] + (-sizes[first] % _ROUND if device.type == "cpu" else 0)
        shorter = longest - _ROUND if device.type == "cpu" else max(_SHORTEST * longest - 1, 0)
        while last < len(sizes) and sizes[last] > shorter:
            last += 1
        members.append(last - first)
        bucket, real = _padded(offsets[:-1][order[first:last]], lengths[order[first:last]], longest)
        rows.append(bucket)
        is_real.append(real)
        first = last
    all_rows, all_real = torch.cat(rows), torch.cat(is_real)
    places = torch.empty_like(flat)
    real_places = all_real.nonzero()[:, 0]
    places[all_rows[real_places]] = real_places
    return Sequences(
        positions, tuple(members), tuple(map(len, rows[1:])), all_rows, places, (~all_real).nonzero()[:, 0]
    )


def _padded(starts: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The flat rows of sequences padded to the longest, and which of them are real."""
    steps = torch.arange(longest, device=starts.device)
    rows = starts[:, None] + torch.minimum(steps, lengths[:, None] - 1)
    return rows.flatten(), (steps < lengths[:, None]).flatten()


@torch.library.custom_op("dwiml_func::one_bucket", mutates_args=())
def _one_bucket(offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """All sequences in one bucket, as an operator: the longest is not known when a graph is traced."""
    lengths = offsets.diff().clamp(min=1)
    starts = offsets[:-1].clamp(max=max(num_rows - 1, 0))
    longest = max(_TRACED_ROWS, int(lengths.max()))
    steps = torch.arange(longest, device=offsets.device)
    rows = starts[:, None] + torch.minimum(steps, lengths[:, None] - 1)
    return rows, (steps < offsets.diff()[:, None]).flatten().nonzero()[:, 0]


@_one_bucket.register_fake
def _(offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    longest = torch.library.get_ctx().new_dynamic_size(min=_TRACED_ROWS)
    padded = offsets.new_empty(offsets.shape[0] - 1, longest)
    return padded, offsets.new_empty(num_rows)


def _attend(query: Tensor, key: Tensor, value: Tensor, dropout_rate: float) -> Tensor:
    # The gradients of CUDA's fused kernels are added up in any order: they do not repeat.
    has_same_bits = query.device.type != "cuda" or not query.requires_grad
    if dropout_rate == 0 and has_same_bits and not is_transformed():
        return scaled_dot_product_attention(query, key, value, is_causal=True)
    return dropout(causal_weights(query, key), dropout_rate) @ value


class _Pad(Function):
    """Rows (P, c) of flat rows (N, c)."""

    # No real row reads a padded one, so that its gradient is 0 and this one's gradient is a selection, not a sum.

    @staticmethod
    def forward(flat: Tensor, rows: Tensor, places: Tensor, padding: Tensor) -> Tensor:
        return flat.index_select(0, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return _Unpad.apply(gradients[0], *ctx.saved_tensors), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return cast(Tensor, _Pad.apply(tangents[0], *ctx.saved_tensors))

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *tensors: Tensor) -> tuple[Tensor, int]:
        return _along(_Pad, in_dims, tensors)


class _Unpad(Function):
    """Flat rows (N, c) of padded rows (P, c); the gradient of padded ones is 0."""

    @staticmethod
    def forward(padded: Tensor, rows: Tensor, places: Tensor, padding: Tensor) -> Tensor:
        return padded.index_select(0, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        rows, places, padding = ctx.saved_tensors
        padded = cast(Tensor, _Pad.apply(gradients[0], rows, places, padding))
        return padded.index_fill(0, padding, 0), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return cast(Tensor, _Unpad.apply(tangents[0], *ctx.saved_tensors))

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *tensors: Tensor) -> tuple[Tensor, int]:
        return _along(_Unpad, in_dims, tensors)


def _along(function: type[Function], in_dims: Sequence[int | None], tensors: Sequence[Tensor]) -> tuple[Tensor, int]:
    """The function for rows (K, ..., c), on the same indices."""
    rows, *indices = tensors
    if any(dim is not None for dim in in_dims[1:]):
        raise NotImplementedError("vmap over the offsets of sequences")
    num = rows.shape[cast(int, in_dims[0])]
    wide = rows.movedim(cast(int, in_dims[0]), 1).flatten(1)
    return cast(Tensor, function.apply(wide, *indices)).unflatten(1, (num, -1)), 1
