"""Causal attention without dropout by torch's fused kernel of the CPU, under transforms of `torch.func` too.

torch has the kernel (Dao et al., "FlashAttention", 2022) for plain calls only: it has no second gradients, and `vmap`
runs it sample by sample. Here one function pads all sequences of a batch, calls the kernel for each bucket and takes
the padding away again. `vmap` folds the mapped axis into the batch. Second derivatives are those of the closed form.
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

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_DROPOUT, _IS_CAUSAL = 0.0, True
_Buckets = tuple[tuple[int, int], ...]


def causal_attention(projected: Tensor, rows: Tensor, places: Tensor, buckets: _Buckets, num_heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(size)) V over earlier rows and one's own: (N, d), on a CPU.

    `projected` (N, 3 d) are queries, keys and values; `rows` and `places` those of `Sequences`; `buckets` the number of
    sequences in each, and of their padded rows.
    """
    return cast(tuple[Tensor, ...], _Attention.apply(projected[None], rows, places, buckets, num_heads))[0][0]


def causal_weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(size)) over earlier rows and one's own: (..., L, L) from two of (..., L, size)."""
    steps = torch.arange(query.shape[-2], device=query.device)
    mask = torch.zeros_like(steps, dtype=query.dtype).masked_fill(steps > steps[:, None], -math.inf)
    return ((query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2) + mask).softmax(dim=-1)


class _Attention(Function):
    """Rows (K, N, d); the padded ones, and the logarithms of the sums of the softmax, which the gradient needs."""

    @staticmethod
    def forward(
        projected: Tensor, rows: Tensor, places: Tensor, buckets: _Buckets, num_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        results = [
            _forward(*heads, _DROPOUT, _IS_CAUSAL)
            for heads in _heads(projected.index_select(1, rows), buckets, 3, num_heads)
        ]
        attended = _joined([one[None] for one, _ in results], len(projected))
        sums = _joined([one[None, ..., None] for _, one in results], len(projected))
        return attended.index_select(1, places), attended, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:3], *output[1:])
        ctx.save_for_forward(*inputs[:3])
        ctx.layout = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = cast(Tensor, _Gradients.apply(gradients[0], *ctx.saved_tensors, *ctx.layout))
        return gradient, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        projected, *indices = ctx.saved_tensors
        return *push_forward(lambda x: (_attended(x, *indices, *ctx.layout),), (projected,), tangents[:1]), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        results = cast(tuple[Tensor, ...], _Attention.apply(*_folded(info.batch_size, in_dims, inputs)))
        return tuple(result.unflatten(0, (info.batch_size, -1)) for result in results), (0,) * len(results)


class _Gradients(Function):
    """Gradients (K, N, 3 d) of the projected rows."""

    @staticmethod
    def forward(
        gradient: Tensor,
        projected: Tensor,
        rows: Tensor,
        places: Tensor,
        attended: Tensor,
        sums: Tensor,
        buckets: _Buckets,
        num_heads: int,
    ) -> Tensor:
        padded = torch.zeros_like(attended).index_copy_(1, places, gradient)
        results = []
        for (own,), heads, (result,), (sum_,) in zip(
            _heads(padded, buckets, 1, num_heads),
            _heads(projected.index_select(1, rows), buckets, 3, num_heads),
            _heads(attended, buckets, 1, num_heads),
            _heads(sums, buckets, 1, num_heads),
            strict=True,
        ):
            results.append(torch.stack(_backward(own, *heads, result, sum_[..., 0], _DROPOUT, _IS_CAUSAL)))
        return _joined(results, len(projected)).index_select(1, places)  # no real row reads a padded one

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        ctx.layout = inputs[6:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        function, primals = _Gradients._by_formula(ctx)
        _, pull = vjp(function, *primals)
        return *pull(gradients), None, None, None, None, None, None  # padded rows and sums are counted with the others

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
        result = cast(Tensor, _Gradients.apply(*_folded(info.batch_size, in_dims, inputs)))
        return result.unflatten(0, (info.batch_size, -1)), 0


def _attended(projected: Tensor, rows: Tensor, places: Tensor, buckets: _Buckets, num_heads: int) -> Tensor:
    """What `_Attention` computes, by operations that can be differentiated again."""
    padded = projected.index_select(1, rows)
    results = [(causal_weights(q, k) @ v)[None] for q, k, v in _heads(padded, buckets, 3, num_heads)]
    return _joined(results, len(projected)).index_select(1, places)


def _heads(padded: Tensor, buckets: _Buckets, num_parts: int, num_heads: int) -> Iterator[tuple[Tensor, ...]]:
    """Each bucket of rows (K, P, parts * d) as parts (K * sequences, heads, L, size)."""
    for (num, length), rows in zip(buckets, padded.split([num * length for num, length in buckets], 1), strict=True):
        apart = rows.reshape(len(padded) * num, length, num_parts, num_heads, -1)
        yield apart.permute(2, 0, 3, 1, 4).unbind()


def _joined(results: Sequence[Tensor], num: int) -> Tensor:
    """Rows (K, P, parts * d) of parts (parts, K * sequences, heads, L, size) of each bucket."""
    flat = [
        one.permute(1, 3, 0, 2, 4).reshape(num, one.shape[1] // num * one.shape[3], one[:, 0, :, 0].numel())
        for one in results
    ]
    return torch.cat(flat, 1) if len(flat) != 1 else flat[0]


def _folded(size: int, in_dims: Sequence[int | None], inputs: Sequence[Any]) -> list[Any]:
    """The inputs of one call for those of `size` calls: rows (K, ...) as (size * K, ...), what is no row as it is."""
    return [
        one
        if not isinstance(one, Tensor) or not one.is_floating_point()
        else (one.expand(size, *one.shape) if dim is None else one.movedim(dim, 0)).flatten(0, 1)
        for one, dim in zip(inputs, in_dims, strict=True)
    ]
