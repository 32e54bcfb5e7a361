"""Causal attention without dropout by torch's fused kernel of the CPU, under transforms of `torch.func` too.

torch has the kernel (Dao et al., "FlashAttention", 2022) for plain calls only: it has no second gradients, and `vmap`
runs it sample by sample. Here `vmap` folds the mapped axis into the batch, and gradients of gradients are those of the
closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from dwiml_func.models.derivatives import push_forward, vjp

__all__ = ["causal_attention", "causal_weights"]

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_DROPOUT, _IS_CAUSAL = 0.0, True


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(size)) V over earlier rows and one's own: (B, heads, L, size) from three such, on a CPU."""
    return cast(tuple[Tensor, Tensor], _Attention.apply(query, key, value))[0]


def causal_weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(size)) over earlier rows and one's own: (..., L, L) from two of (..., L, size)."""
    steps = torch.arange(query.shape[-2], device=query.device)
    mask = torch.zeros_like(steps, dtype=query.dtype).masked_fill(steps > steps[:, None], -math.inf)
    return ((query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2) + mask).softmax(dim=-1)


class _Attention(Function):
    """The rows, and the logarithms of the sums of the softmax, which the gradient needs."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return _forward(query, key, value, _DROPOUT, _IS_CAUSAL)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, *output)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return cast(tuple[Tensor, ...], _Gradients.apply(gradients[0], *ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return *push_forward(_rows, ctx.saved_tensors, tangents), None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _folded(_Attention, info.batch_size, in_dims, tensors)


class _Gradients(Function):
    """Gradients of queries, keys and values."""

    @staticmethod
    def forward(gradient: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        return _backward(gradient, *saved, _DROPOUT, _IS_CAUSAL)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _, pull = vjp(_closed_form, *ctx.saved_tensors)
        return *pull(gradients), None, None  # rows and sums are functions of the others, and counted with them

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        return push_forward(_closed_form, ctx.saved_tensors, tangents[:4])

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _folded(_Gradients, info.batch_size, in_dims, tensors)


def _rows(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
    return (causal_weights(query, key) @ value,)


def _closed_form(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `_Gradients` computes, by operations that can be differentiated again."""
    weights = causal_weights(query, key)
    of_weights = gradient @ value.transpose(-1, -2)
    of_scores = weights * (of_weights - (of_weights * weights).sum(dim=-1, keepdim=True)) / math.sqrt(query.shape[-1])
    return of_scores @ key, of_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ gradient


def _folded(
    function: type[Function], size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The function on a batch that `size` calls make together."""
    moved = [
        tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]
    results = cast(tuple[Tensor, ...], function.apply(*(tensor.flatten(0, 1) for tensor in moved)))
    return tuple(result.unflatten(0, (size, -1)) for result in results), (0,) * len(results)
