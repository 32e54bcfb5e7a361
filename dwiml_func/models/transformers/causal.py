"""Causal attention on the CPU, forward and backward, in products of blocks that stay in a core's cache.

Torch has a fused kernel (Dao et al., "FlashAttention", 2022) for plain calls without dropout only: it has no second
gradients, `vmap` runs it sample by sample, and with heads of 8 numbers it takes twice the time. Here one function pads
sequences to others of like lengths, and goes through the weights in blocks, as that kernel does: 48 queries of some
lines, and the keys up to the last of them. `vmap` folds the mapped axis into the lines. The gradient computes the
weights again, with the same dropout, so that none are kept. Second derivatives are those of the closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from dwiml_func._transforms import beneath_vmap
from dwiml_func.models.derivatives import push_forward, vjp
from dwiml_func.models.transformers.blocks import (
    Dropout,
    Layout,
    block_weights,
    chunks,
    hidden_keys,
    most_weights,
    query_blocks,
)

__all__ = ["causal_attention", "causal_weights"]


def causal_attention(projected: Tensor, rows: Tensor, places: Tensor, layout: Layout) -> Tensor:
    """softmax(Q K^T / sqrt(size)) V over earlier rows and one's own: (N, d), on a CPU.

    `projected` (N, 3 d) are queries, keys and values; `rows` and `places` those of `Sequences`.
    """
    seed = torch.randint(2**62, (1,)) if layout.dropped else torch.zeros(1, dtype=torch.int64)

    def attend(projected: Tensor, seeds: Tensor) -> Tensor:
        return cast(Tensor, _Attention.apply(projected, seeds.flatten(), rows, places, layout))

    with _no_autocast():
        mapped = beneath_vmap(attend, projected, seed)
        return attend(projected[None], seed)[0] if mapped is None else mapped


def causal_weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(size)) over earlier rows and one's own: (..., L, L) from two of (..., L, size)."""
    steps = torch.arange(query.shape[-2], device=query.device)
    mask = torch.zeros_like(steps, dtype=query.dtype).masked_fill(steps > steps[:, None], -math.inf)
    return ((query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2) + mask).softmax(dim=-1)


class _Attention(Function):
    """Rows (K, N, d) of rows (K, N, 3 d)."""

    @staticmethod
    def forward(projected: Tensor, seeds: Tensor, rows: Tensor, places: Tensor, layout: Layout) -> Tensor:
        precise, dropout = _precise(projected), Dropout(seeds, layout)
        size, most = precise.shape[2] // 3, most_weights(layout, len(precise))
        joined, (space, other) = precise.new_empty(len(precise), len(rows), size), precise.new_empty(2, most)
        hidden, scale = hidden_keys(space), math.sqrt(layout.num_heads / size)
        for chunk in chunks(layout, len(precise)):
            query, key, value = chunk.split(precise, rows, 3).flatten(1, 3)
            query.mul_(scale)
            value.div_(dropout.share)
            bits, results = dropout.bits(chunk), []
            for first, last in query_blocks(chunk.length):
                weights = block_weights(query[:, first:last], key[:, :last], hidden, space)
                kept = dropout.kept(bits, first, last, other)
                weights = weights if kept is None else weights.mul_(kept)
                results.append(torch.bmm(weights, value[:, :last]))
            target = chunk.of(joined, 1)
            target.copy_(torch.cat(results, 1).view(target.shape))
        return joined.index_select(1, places).to(projected.dtype)  # no real row reads a padded one

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
        precise, dropout = _precise(projected), Dropout(seeds, layout)
        num, size, most = gradient.shape[1], gradient.shape[2], most_weights(layout, len(precise))
        own_gradient = precise.new_zeros(len(precise), num + 1, size)  # the last row is that of all padded ones
        torch.div(gradient, dropout.share, out=own_gradient[:, :num])
        own_rows = torch.full_like(rows, num).index_copy_(0, places, torch.arange(num))
        joined, (space, other, third) = precise.new_empty(len(precise), len(rows), 3 * size), precise.new_empty(3, most)
        hidden, scale = hidden_keys(space), math.sqrt(layout.num_heads / size)
        for chunk in chunks(layout, len(precise)):
            query, key, value = chunk.split(precise, rows, 3).flatten(1, 3)
            (wanted,) = chunk.split(own_gradient, own_rows, 1).flatten(1, 3)
            query.mul_(scale)
            bits, results, of_queries = dropout.bits(chunk), value.new_empty(3, *value.shape), []
            for first, last in reversed(query_blocks(chunk.length)):
                own, own_wanted, keys = query[:, first:last], wanted[:, first:last], key[:, :last]
                weights = block_weights(own, keys, hidden, space)
                of_scores = other[: weights.numel()].view_as(weights)
                kept = dropout.kept(bits, first, last, third)
                dropped = weights if kept is None else torch.mul(weights, kept, out=of_scores)
                of_value = torch.bmm(dropped.mT, own_wanted)
                torch.bmm(own_wanted, value[:, :last].mT, out=of_scores)
                of_scores = of_scores if kept is None else of_scores.mul_(kept)
                torch.ops.aten._softmax_backward_data.out(of_scores, weights, -1, weights.dtype, grad_input=of_scores)
                of_queries.append(torch.bmm(of_scores, keys))
                of_key = torch.bmm(of_scores.mT, own)
                if last == chunk.length:
                    results[1], results[2] = of_key, of_value
                else:
                    results[1, :, :last].add_(of_key)
                    results[2, :, :last].add_(of_value)
            torch.cat(of_queries[::-1], 1, out=results[0]).mul_(scale)
            target = chunk.of(joined, 3)
            target.copy_(results.view(target.shape))
        return joined.index_select(1, places).to(projected.dtype)

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
    precise, size = _precise(projected), (len(projected), -1, projected.shape[2] // 3)
    every = [chunk._replace(members=slice(None)) for chunk in chunks(layout, 1)]
    sizes = [chunk.num * chunk.num_heads * chunk.length**2 for chunk in every]
    all_kept = cast(Tensor, _Kept.apply(seeds, layout, precise.dtype)).split(sizes, 1) if layout.dropped else sizes
    results = []
    for chunk, kept in zip(every, all_kept, strict=True):
        query, key, value = chunk.split(precise, rows, 3).flatten(1, 3)
        weights = causal_weights(query, key)
        if isinstance(kept, Tensor):
            weights = weights * kept.reshape(weights.shape)
        results.append((weights @ value).unflatten(0, (size[0], -1, layout.num_heads)).transpose(2, 3).reshape(size))
    return torch.cat(results, 1).index_select(1, places).to(projected.dtype)


class _Kept(Function):
    """Of all weights (K, ...), bucket after bucket, the factors by which dropout multiplies them."""

    @staticmethod
    def forward(seeds: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        space = seeds.new_empty(most_weights(layout, 1), dtype=dtype)
        results = []
        for seed in seeds.split(1):
            dropout = Dropout(seed, layout)
            for chunk in chunks(layout, 1):
                every = space.new_zeros(chunk.num * chunk.num_heads, chunk.length, chunk.length)
                bits = dropout.bits(chunk)
                for first, last in query_blocks(chunk.length):
                    every[:, first:last, :last] = cast(Tensor, dropout.kept(bits, first, last, space))
                results.append(every.flatten() / dropout.share)
        return torch.cat(results).view(len(seeds), -1)

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
