"""Causal attention on the CPU, forward and backward, in products of blocks that stay in a core's cache.

Torch has a fused kernel (Dao et al., "FlashAttention", 2022) for plain calls without dropout only: it has no second
gradients, `vmap` runs it sample by sample, and with heads of 8 numbers it takes twice the time. Here one function pads
all sequences of a batch, and goes through the weights in blocks, as that kernel does: 48 queries of some lines, and the
keys up to the last of them. `vmap` folds the mapped axis into the lines. The gradient computes the weights again, with
the same dropout, so that none are kept. Second derivatives are those of the closed form.

Dropout takes 16 random bits a weight, since torch's own draws take more time than all else here. So its rate is a
multiple of 1 / 65536.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

from dwiml_func.models.derivatives import push_forward, vjp

__all__ = ["Layout", "causal_attention", "causal_weights"]

_QUERIES = 48
_WEIGHTS = 2**17  # of a block: 512 KB
_LEVELS = 2**16


class Layout(NamedTuple):
    """The sequences of each bucket and their padded rows, attention heads, and the rate of dropout on the weights."""

    buckets: tuple[tuple[int, int], ...]
    num_heads: int
    rate: float

    @property
    def dropped(self) -> int:
        """Of 65536 weights, not all."""
        return min(round(self.rate * _LEVELS), _LEVELS - 1)


def causal_attention(projected: Tensor, rows: Tensor, places: Tensor, layout: Layout) -> Tensor:
    """softmax(Q K^T / sqrt(size)) V over earlier rows and one's own: (N, d), on a CPU.

    `projected` (N, 3 d) are queries, keys and values; `rows` and `places` those of `Sequences`.
    """
    seed = torch.randint(2**62, (1,)) if layout.dropped else torch.zeros(1, dtype=torch.int64)
    with _no_autocast():
        return cast(Tensor, _Attention.apply(projected[None], seed, rows, places, layout))[0]


def causal_weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(size)) over earlier rows and one's own: (..., L, L) from two of (..., L, size)."""
    steps = torch.arange(query.shape[-2], device=query.device)
    mask = torch.zeros_like(steps, dtype=query.dtype).masked_fill(steps > steps[:, None], -math.inf)
    return ((query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2) + mask).softmax(dim=-1)


class _Attention(Function):
    """Rows (K, N, d) of rows (K, N, 3 d)."""

    @staticmethod
    def forward(projected: Tensor, seeds: Tensor, rows: Tensor, places: Tensor, layout: Layout) -> Tensor:
        padded, dropout = _precise(projected).index_select(1, rows), _Dropout(seeds, layout)
        results, (space, other) = [], _spaces(padded, layout, 2)
        for query, key, value in _heads(padded, layout, 3):
            result = torch.empty_like(query.mT, memory_format=torch.contiguous_format)
            value = value / dropout.share
            for lines, now, until, weights in _blocks(query / math.sqrt(query.shape[-1]), key, space):
                kept = dropout.kept(lines, len(query), other, weights)
                weights = weights if kept is None else weights.mul_(kept)
                result[lines, :, now] = torch.bmm(value[lines, until].mT, weights.mT)
            results.append([result])
        return _joined(results, padded, layout, places).to(projected.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        ctx.layout = inputs[4]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with _no_autocast():
            return cast(Tensor, _Gradients.apply(gradients[0], *ctx.saved_tensors, ctx.layout)), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        projected, seeds, rows, places = ctx.saved_tensors
        return push_forward(lambda x: (_attended(x, seeds, rows, places, ctx.layout),), (projected,), tangents[:1])[0]

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Tensor, int]:
        return _folded(_Attention, info.batch_size, in_dims, inputs)


class _Gradients(Function):
    """Gradients (K, N, 3 d) of the projected rows, from those (K, N, d) of the results."""

    @staticmethod
    def forward(
        gradient: Tensor, projected: Tensor, seeds: Tensor, rows: Tensor, places: Tensor, layout: Layout
    ) -> Tensor:
        padded, dropout = _precise(projected).index_select(1, rows), _Dropout(seeds, layout)
        precise = _precise(gradient) / dropout.share
        own = precise.new_zeros(*padded.shape[:2], gradient.shape[2]).index_copy_(1, places, precise)
        results, (space, other, third) = [], _spaces(padded, layout, 3)
        for (query, key, value), (wanted,) in zip(_heads(padded, layout, 3), _heads(own, layout, 1), strict=True):
            query = query / math.sqrt(query.shape[-1])
            of_query, of_key, of_value = (
                torch.zeros_like(query.mT, memory_format=torch.contiguous_format) for _ in range(3)
            )
            for lines, now, until, weights in _blocks(query, key, space):
                kept = dropout.kept(lines, len(query), third, weights)
                of_scores = other[: weights.numel()].view_as(weights)
                dropped = weights if kept is None else torch.mul(weights, kept, out=of_scores)
                of_value[lines, :, until] += torch.bmm(wanted[lines, now].mT, dropped)
                torch.bmm(wanted[lines, now], value[lines, until].mT, out=of_scores)
                of_scores = of_scores if kept is None else of_scores.mul_(kept)
                torch.ops.aten._softmax_backward_data.out(of_scores, weights, -1, weights.dtype, grad_input=of_scores)
                of_key[lines, :, until] += torch.bmm(query[lines, now].mT, of_scores)
                of_query[lines, :, now] = torch.bmm(key[lines, until].mT, of_scores.mT)
            results.append([of_query.div_(math.sqrt(query.shape[-1])), of_key, of_value])
        return _joined(results, padded, layout, places).to(projected.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])
        ctx.layout = inputs[5]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with _no_autocast():
            function, primals = _Gradients._by_formula(ctx)
            _, pull = vjp(function, *primals)
            return *pull(gradients), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        function, primals = _Gradients._by_formula(ctx)
        return push_forward(function, primals, tangents[:2])[0]

    @staticmethod
    def _by_formula(ctx: Any) -> tuple[Any, tuple[Tensor, Tensor]]:
        """What the forward pass computes, by operations that can be differentiated again."""
        gradient, projected, seeds, rows, places = ctx.saved_tensors

        def function(gradient: Tensor, projected: Tensor) -> tuple[Tensor]:
            return vjp(lambda x: _attended(x, seeds, rows, places, ctx.layout), projected)[1](gradient)

        return function, (gradient, projected)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Tensor, int]:
        return _folded(_Gradients, info.batch_size, in_dims, inputs)


def _attended(projected: Tensor, seeds: Tensor, rows: Tensor, places: Tensor, layout: Layout) -> Tensor:
    """What `_Attention` computes, by operations that can be differentiated again."""
    padded, size = _precise(projected).index_select(1, rows), (len(projected), -1, projected.shape[2] // 3)
    results = [causal_weights(q, k) for q, k, _ in _heads(padded, layout, 3)]
    if layout.dropped:
        kept = cast(Tensor, _Kept.apply(seeds, layout, padded.dtype)).split(
            [r[0].numel() * len(r) // size[0] for r in results], 1
        )
        results = [r * own.reshape(r.shape) for r, own in zip(results, kept, strict=True)]
    results = [r @ v for r, (_, _, v) in zip(results, _heads(padded, layout, 3), strict=True)]
    flat = [r.unflatten(0, (size[0], -1, layout.num_heads)).transpose(2, 3).reshape(size) for r in results]
    return torch.cat(flat, 1).index_select(1, places).to(projected.dtype)


class _Dropout:
    """Which weights are kept, from a generator for each of the K first dimensions."""

    def __init__(self, seeds: Tensor, layout: Layout) -> None:
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds] if layout.dropped else []
        self._least = layout.dropped - _LEVELS // 2
        self.share = 1 - layout.dropped / _LEVELS

    def kept(self, lines: slice, num_lines: int, space: Tensor, weights: Tensor) -> Tensor | None:
        """1 for kept and 0 for dropped weights of lines, of num_lines in all; None without dropout."""
        if not self._generators:
            return None
        own, line, parts = num_lines // len(self._generators), lines.start, []
        while line < lines.stop:  # each member's in the order of its lines, however many are in a block
            last = min(lines.stop, line - line % own + own)
            num = (last - line) * weights[0].numel()
            bits = torch.empty(-(-num // 4), dtype=torch.int64)
            parts.append(bits.random_(-(2**63), None, generator=self._generators[line // own]).view(torch.int16)[:num])
            line = last
        return space[: weights.numel()].copy_(torch.cat(parts)).ge_(self._least).view_as(weights)


class _Kept(Function):
    """Of all weights (K, ...), bucket after bucket, the factors by which dropout multiplies them."""

    @staticmethod
    def forward(seeds: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        dropout, results = _Dropout(seeds, layout), []
        (space,) = _spaces(seeds.new_empty(len(seeds), dtype=dtype), layout, 1)
        for num, length in layout.buckets:
            num_lines = len(seeds) * num * layout.num_heads
            kept = space.new_zeros(num_lines, length, length)
            for lines, now, until in _slices(num_lines, length):
                own = dropout.kept(lines, num_lines, space, kept[lines, now, until])
                kept[lines, now, until] = cast(Tensor, own)
            results.append(kept.view(len(seeds), -1) / dropout.share)
        return torch.cat(results, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Tensor, int]:
        return _folded(_Kept, info.batch_size, in_dims, inputs)


def _blocks(query: Tensor, key: Tensor, space: Tensor) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Blocks of weights, one after the other in the same memory: lines, queries, keys, weights."""
    num, length, _ = query.shape
    hidden = query.new_full((_QUERIES, _QUERIES), -math.inf).triu_(1)
    for lines, now, until in _slices(num, length):
        shape = lines.stop - lines.start, now.stop - now.start, until.stop
        weights = space[: math.prod(shape)].view(shape)
        torch.bmm(query[lines, now], key[lines, until].mT, out=weights)
        weights[:, :, now] += hidden[: shape[1], : shape[1]]
        yield lines, now, until, torch.softmax(weights, -1, out=weights)


def _slices(num: int, length: int) -> Iterator[tuple[slice, slice, slice]]:
    for first in range(0, length, _QUERIES):
        last = min(first + _QUERIES, length)
        num_lines = max(1, _WEIGHTS // (last * (last - first)))
        for line in range(0, num, num_lines):
            yield slice(line, min(line + num_lines, num)), slice(first, last), slice(last)


def _spaces(padded: Tensor, layout: Layout, num: int) -> tuple[Tensor, ...]:
    """Memory for blocks of weights."""
    num_heads = len(padded) * layout.num_heads
    sizes = [(lines * num_heads * rows * min(rows, _QUERIES), rows) for lines, rows in layout.buckets]
    size = max(min(all_weights, max(_WEIGHTS, _QUERIES * rows)) for all_weights, rows in sizes)
    return padded.new_empty(num, size).unbind()


def _no_autocast() -> torch.autocast:
    """Products within attention are in float32, also those of rows in bfloat16."""
    return torch.autocast("cpu", enabled=False)


def _precise(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _heads(padded: Tensor, layout: Layout, num_parts: int) -> Iterator[tuple[Tensor, ...]]:
    """Each bucket of rows (K, P, parts * d) as parts (K * sequences * heads, L, size)."""
    sizes = [num * length for num, length in layout.buckets]
    for (num, length), rows in zip(layout.buckets, padded.split(sizes, 1), strict=True):
        apart = rows.unflatten(2, (num_parts, layout.num_heads, -1)).unflatten(1, (num, length))
        yield apart.permute(3, 0, 1, 4, 2, 5).flatten(1, 3).unbind()


def _joined(results: Sequence[Sequence[Tensor]], padded: Tensor, layout: Layout, places: Tensor) -> Tensor:
    """Rows (K, N, parts * d) of parts (K * sequences * heads, size, L) of each bucket."""
    size, num_heads = results[0][0].shape[1], layout.num_heads
    joined = padded.new_empty(*padded.shape[:2], len(results[0]) * num_heads * size)
    sizes = [num * length for num, length in layout.buckets]
    for (num, length), parts, rows in zip(layout.buckets, results, joined.split(sizes, 1), strict=True):
        apart = rows.unflatten(2, (len(parts), num_heads, size)).unflatten(1, (num, length))
        for number, part in enumerate(parts):
            apart[:, :, :, number] = part.view(len(padded), num, num_heads, size, length).permute(0, 1, 4, 2, 3)
    return joined.index_select(1, places)  # no real row reads a padded one


def _folded(
    function: type[Function], size: int, in_dims: Sequence[int | None], inputs: Sequence[Any]
) -> tuple[Tensor, int]:
    """One call for those of `size` calls: rows and seeds (K, ...) as (size * K, ...), what `Sequences` has as it is."""
    fixed = (len(inputs) - 3, len(inputs) - 2) if function is not _Kept else ()
    folded = [
        one
        if not isinstance(one, Tensor) or number in fixed
        else (one.expand(size, *one.shape) if dim is None else one.movedim(dim, 0)).flatten(0, 1)
        for number, (one, dim) in enumerate(zip(inputs, in_dims, strict=True))
    ]
    return cast(Tensor, function.apply(*folded)).unflatten(0, (size, -1)), 0
