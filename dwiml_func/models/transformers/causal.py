"""Causal attention on the CPU, forward and backward, in products of blocks that stay in a core's cache.

Torch has a fused kernel (Dao et al., "FlashAttention", 2022) for plain calls without dropout only: it has no second
gradients, `vmap` runs it sample by sample, and with heads of 8 numbers it takes twice the time. Here one function pads
all sequences of a batch, and goes through the weights in blocks, as that kernel does: 48 queries of some lines, and the
keys up to the last of them. `vmap` folds the mapped axis into the lines. The gradient computes the weights again, with
the same dropout, so that none are kept. Second derivatives are those of the closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from dwiml_func.models.derivatives import push_forward, vjp
from dwiml_func.models.transformers.blocks import (
    Dropout,
    Layout,
    block_memory,
    join_heads,
    slices,
    split_heads,
    weight_blocks,
)

__all__ = ["causal_attention", "causal_weights"]


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
        padded, dropout = _precise(projected).index_select(1, rows), Dropout(seeds, layout)
        results, (space, other) = [], block_memory(padded, layout, 2)
        for query, key, value in split_heads(padded, layout, 3):
            result = torch.empty_like(query.mT, memory_format=torch.contiguous_format)
            value = value / dropout.share
            for lines, now, until, weights in weight_blocks(query / math.sqrt(query.shape[-1]), key, space):
                kept = dropout.kept(lines, len(query), other, weights)
                weights = weights if kept is None else weights.mul_(kept)
                result[lines, :, now] = torch.bmm(value[lines, until].mT, weights.mT)
            results.append([result])
        return join_heads(results, padded, layout, places).to(projected.dtype)

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
        padded, dropout = _precise(projected).index_select(1, rows), Dropout(seeds, layout)
        precise = _precise(gradient) / dropout.share
        own = precise.new_zeros(*padded.shape[:2], gradient.shape[2]).index_copy_(1, places, precise)
        results, (space, other, third) = [], block_memory(padded, layout, 3)
        parts = zip(split_heads(padded, layout, 3), split_heads(own, layout, 1), strict=True)
        for (query, key, value), (wanted,) in parts:
            query = query / math.sqrt(query.shape[-1])
            of_query, of_key, of_value = (
                torch.zeros_like(query.mT, memory_format=torch.contiguous_format) for _ in range(3)
            )
            for lines, now, until, weights in weight_blocks(query, key, space):
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
        return join_heads(results, padded, layout, places).to(projected.dtype)

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
    results = [causal_weights(q, k) for q, k, _ in split_heads(padded, layout, 3)]
    if layout.dropped:
        kept = cast(Tensor, _Kept.apply(seeds, layout, padded.dtype)).split(
            [r[0].numel() * len(r) // size[0] for r in results], 1
        )
        results = [r * own.reshape(r.shape) for r, own in zip(results, kept, strict=True)]
    results = [r @ v for r, (_, _, v) in zip(results, split_heads(padded, layout, 3), strict=True)]
    flat = [r.unflatten(0, (size[0], -1, layout.num_heads)).transpose(2, 3).reshape(size) for r in results]
    return torch.cat(flat, 1).index_select(1, places).to(projected.dtype)


class _Kept(Function):
    """Of all weights (K, ...), bucket after bucket, the factors by which dropout multiplies them."""

    @staticmethod
    def forward(seeds: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        dropout, results = Dropout(seeds, layout), []
        (space,) = block_memory(seeds.new_empty(len(seeds), dtype=dtype), layout, 1)
        for num, length in layout.buckets:
            num_lines = len(seeds) * num * layout.num_heads
            kept = space.new_zeros(num_lines, length, length)
            for lines, now, until in slices(num_lines, length):
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


def _no_autocast() -> torch.autocast:
    """Products within attention are in float32, also those of rows in bfloat16."""
    return torch.autocast("cpu", enabled=False)


def _precise(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


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
