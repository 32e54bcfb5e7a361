"""Causal attention on the CPU, forward and backward, in products of blocks that stay in a core's cache.

Torch has a fused kernel (Dao et al., "FlashAttention", 2022) for plain calls without dropout only: it has no second
gradients, `vmap` runs it sample by sample, and with heads of 8 numbers it takes twice the time. Here one function pads
all sequences of a batch, and goes through the weights in blocks, as that kernel does: 48 queries of some lines, and the
keys up to the last of them. `vmap` folds the mapped axis into the lines. The gradient computes the weights again, so
that none are kept. Second derivatives are those of the closed form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from dwiml_func.models.derivatives import push_forward, vjp

__all__ = ["causal_attention", "causal_weights"]

_QUERIES = 48
_WEIGHTS = 2**17  # of a block: 512 KB
_Buckets = tuple[tuple[int, int], ...]


def causal_attention(projected: Tensor, rows: Tensor, places: Tensor, buckets: _Buckets, num_heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(size)) V over earlier rows and one's own: (N, d), on a CPU.

    `projected` (N, 3 d) are queries, keys and values; `rows` and `places` those of `Sequences`; `buckets` the number of
    sequences in each, and of their padded rows.
    """
    return cast(Tensor, _Attention.apply(projected[None], rows, places, buckets, num_heads))[0]


def causal_weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(size)) over earlier rows and one's own: (..., L, L) from two of (..., L, size)."""
    steps = torch.arange(query.shape[-2], device=query.device)
    mask = torch.zeros_like(steps, dtype=query.dtype).masked_fill(steps > steps[:, None], -math.inf)
    return ((query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2) + mask).softmax(dim=-1)


class _Attention(Function):
    """Rows (K, N, d) of rows (K, N, 3 d)."""

    @staticmethod
    def forward(projected: Tensor, rows: Tensor, places: Tensor, buckets: _Buckets, num_heads: int) -> Tensor:
        padded = _precise(projected).index_select(1, rows)
        results, (space,) = [], _spaces(padded, buckets, num_heads, 1)
        for query, key, value in _heads(padded, buckets, 3, num_heads):
            result = torch.empty_like(query.mT, memory_format=torch.contiguous_format)
            for lines, now, until, weights in _blocks(query / math.sqrt(query.shape[-1]), key, space):
                result[lines, :, now] = torch.bmm(value[lines, until].mT, weights.mT)
            results.append([result])
        return _joined(results, padded, buckets, num_heads, places).to(projected.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])
        ctx.layout = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, _Gradients.apply(gradients[0], *ctx.saved_tensors, *ctx.layout)), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        projected, *indices = ctx.saved_tensors
        return push_forward(lambda x: (_attended(x, *indices, *ctx.layout),), (projected,), tangents[:1])[0]

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Tensor, int]:
        return _folded(_Attention, info.batch_size, in_dims, inputs)


class _Gradients(Function):
    """Gradients (K, N, 3 d) of the projected rows, from those (K, N, d) of the results."""

    @staticmethod
    def forward(
        gradient: Tensor, projected: Tensor, rows: Tensor, places: Tensor, buckets: _Buckets, num_heads: int
    ) -> Tensor:
        padded, precise = _precise(projected).index_select(1, rows), _precise(gradient)
        own = precise.new_zeros(*padded.shape[:2], gradient.shape[2]).index_copy_(1, places, precise)
        results, (space, other) = [], _spaces(padded, buckets, num_heads, 2)
        for (query, key, value), (wanted,) in zip(
            _heads(padded, buckets, 3, num_heads), _heads(own, buckets, 1, num_heads), strict=True
        ):
            query = query / math.sqrt(query.shape[-1])
            of_query, of_key, of_value = (
                torch.zeros_like(query.mT, memory_format=torch.contiguous_format) for _ in range(3)
            )
            for lines, now, until, weights in _blocks(query, key, space):
                of_value[lines, :, until] += torch.bmm(wanted[lines, now].mT, weights)
                of_scores = other[: weights.numel()].view_as(weights)
                torch.bmm(wanted[lines, now], value[lines, until].mT, out=of_scores)
                torch.ops.aten._softmax_backward_data.out(of_scores, weights, -1, weights.dtype, grad_input=of_scores)
                of_key[lines, :, until] += torch.bmm(query[lines, now].mT, of_scores)
                of_query[lines, :, now] = torch.bmm(key[lines, until].mT, of_scores.mT)
            results.append([of_query.div_(math.sqrt(query.shape[-1])), of_key, of_value])
        return _joined(results, padded, buckets, num_heads, places).to(projected.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        ctx.layout = inputs[4:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
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
        gradient, projected, *indices = ctx.saved_tensors

        def function(gradient: Tensor, projected: Tensor) -> tuple[Tensor]:
            return vjp(lambda x: _attended(x, *indices, *ctx.layout), projected)[1](gradient)

        return function, (gradient, projected)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Tensor, int]:
        return _folded(_Gradients, info.batch_size, in_dims, inputs)


def _attended(projected: Tensor, rows: Tensor, places: Tensor, buckets: _Buckets, num_heads: int) -> Tensor:
    """What `_Attention` computes, by operations that can be differentiated again."""
    padded = projected.index_select(1, rows)
    size = len(padded), -1, projected.shape[2] // 3
    results = [causal_weights(q, k) @ v for q, k, v in _heads(padded, buckets, 3, num_heads)]
    flat = [r.unflatten(0, (size[0], -1, num_heads)).transpose(2, 3).reshape(size) for r in results]
    return torch.cat(flat, 1).index_select(1, places)


def _blocks(query: Tensor, key: Tensor, space: Tensor) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Blocks of weights, one after the other in the same memory: lines, queries, keys, weights."""
    num, length, _ = query.shape
    hidden = query.new_full((_QUERIES, _QUERIES), -math.inf).triu_(1)
    for first in range(0, length, _QUERIES):
        last = min(first + _QUERIES, length)
        now, until, num_lines = slice(first, last), slice(last), max(1, _WEIGHTS // (last * (last - first)))
        for line in range(0, num, num_lines):
            lines = slice(line, min(line + num_lines, num))
            shape = lines.stop - line, last - first, last
            weights = space[: math.prod(shape)].view(shape)
            torch.bmm(query[lines, now], key[lines, until].mT, out=weights)
            weights[:, :, first:] += hidden[: last - first, : last - first]
            yield lines, now, until, torch.softmax(weights, -1, out=weights)


def _spaces(padded: Tensor, buckets: _Buckets, num_heads: int, num: int) -> tuple[Tensor, ...]:
    """Memory for blocks of weights."""
    sizes = [(len(padded) * lines * num_heads * rows * min(rows, _QUERIES), rows) for lines, rows in buckets]
    size = max(min(all_weights, max(_WEIGHTS, _QUERIES * rows)) for all_weights, rows in sizes)
    return padded.new_empty(num, size).unbind()


def _precise(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _heads(padded: Tensor, buckets: _Buckets, num_parts: int, num_heads: int) -> Iterator[tuple[Tensor, ...]]:
    """Each bucket of rows (K, P, parts * d) as parts (K * sequences * heads, L, size)."""
    for (num, length), rows in zip(buckets, padded.split([num * length for num, length in buckets], 1), strict=True):
        apart = rows.unflatten(2, (num_parts, num_heads, -1)).unflatten(1, (num, length))
        yield apart.permute(3, 0, 1, 4, 2, 5).flatten(1, 3).unbind()


def _joined(
    results: Sequence[Sequence[Tensor]], padded: Tensor, buckets: _Buckets, num_heads: int, places: Tensor
) -> Tensor:
    """Rows (K, N, parts * d) of parts (K * sequences * heads, size, L) of each bucket."""
    size = results[0][0].shape[1]
    joined = padded.new_empty(*padded.shape[:2], len(results[0]) * num_heads * size)
    sizes = [num * length for num, length in buckets]
    for (num, length), parts, rows in zip(buckets, results, joined.split(sizes, 1), strict=True):
        apart = rows.unflatten(2, (len(parts), num_heads, size)).unflatten(1, (num, length))
        for number, part in enumerate(parts):
            apart[:, :, :, number] = part.view(len(padded), num, num_heads, size, length).permute(0, 1, 4, 2, 3)
    return joined.index_select(1, places)  # no real row reads a padded one


def _folded(
    function: type[Function], size: int, in_dims: Sequence[int | None], inputs: Sequence[Any]
) -> tuple[Tensor, int]:
    """One call for those of `size` calls: rows (K, ...) as (size * K, ...), what is no row as it is."""
    folded = [
        one
        if not isinstance(one, Tensor) or not one.is_floating_point()
        else (one.expand(size, *one.shape) if dim is None else one.movedim(dim, 0)).flatten(0, 1)
        for one, dim in zip(inputs, in_dims, strict=True)
    ]
    return cast(Tensor, function.apply(*folded)).unflatten(0, (size, -1)), 0
