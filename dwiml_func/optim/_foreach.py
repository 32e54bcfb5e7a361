"""Arithmetic on lists of tensors: fused for speed, or tensor by tensor under torch's transforms.

The fused operations are torch's own `_foreach_` functions: private, the same in torch 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from dwiml_func._transforms import is_transformed
from dwiml_func.types import Number

__all__ = ["Arithmetic", "Tensors", "arithmetic_for"]

Tensors = tuple[Tensor, ...] | list[Tensor]
"""Tensors in one order of names."""


class Arithmetic(Protocol):
    """An operation of torch ("add", "lerp", "sqrt", ...) on each element of lists of equal length.

    `others` are lists with one argument for each, or numbers for all. With `reuse` the result may take the memory of
    `tensors`.
    """

    def __call__(
        self, name: str, tensors: Tensors, *others: Tensors | Number, reuse: bool = False, **factors: Number
    ) -> Tensors: ...


def arithmetic_for(tensors: Iterable[Tensor], *numbers: Number) -> Arithmetic:
    """Choose the arithmetic for all tensors, and all numbers that are not constants, of a calculation.

    Fused and in place for plain tensors and numbers; fused too where a number is a plain tensor. Under a transform, or
    where a tensor or a number has a graph: tensor by tensor, never in place, and differentiable with respect to the
    numbers too.
    """
    if is_transformed():
        return _one_by_one
    run: Arithmetic = _fused
    for number in numbers:
        if isinstance(number, Tensor):
            if number.requires_grad:
                return _one_by_one
            run = _fused_with_tensors
    for tensor in tensors:  # a loop: a generator costs a small model's step more
        if tensor.requires_grad:
            return _one_by_one
    return run


def _fused(name: str, tensors: Tensors, *others: Any, reuse: bool = False, **factors: Any) -> Tensors:
    if reuse:
        halves = [tensor for tensor in tensors if tensor.dtype.itemsize == 2] if name == "mul" else []
        if halves and isinstance(others[0], float):
            # On the CPU, torch rounds a number to half precision here: a beta2 of 0.999 becomes 1 in bfloat16.
            torch._foreach_mul_(halves, torch.tensor(others[0], dtype=torch.float64))
            if rest := [tensor for tensor in tensors if tensor.dtype.itemsize != 2]:
                torch._foreach_mul_(rest, others[0])
            return tensors
        getattr(torch, f"_foreach_{name}_")(tensors, *others, **factors)
        return tensors
    return getattr(torch, f"_foreach_{name}")(tensors, *others, **factors)


def _fused_with_tensors(name: str, tensors: Tensors, *others: Any, reuse: bool = False, **factors: Any) -> Tensors:
    """What `_one_by_one` computes, in few kernels of a GPU."""
    numbers = [number for number in (*others, *factors.values()) if isinstance(number, Tensor)]
    if not numbers:
        return _fused(name, tensors, *others, reuse=reuse, **factors)
    lists = [tensors, *(other for other in others if isinstance(other, list | tuple))]
    dtypes = {tensor.dtype for own in lists for tensor in own}
    if len(numbers) == len(dtypes) == 1 and numbers[0].dim() == 0:
        number = _like(numbers[0], tensors[0])
        if name in ("mul", "div") and not factors:
            return getattr(torch, f"_foreach_{name}")(tensors, number)
        if name == "add" and len(lists) == 2:
            return torch._foreach_add(tensors, torch._foreach_mul(others[0], number))
        if name == "addcdiv" and len(lists) == 3:
            return torch._foreach_add(tensors, torch._foreach_mul(torch._foreach_div(*others), number))
    return _one_by_one(name, tensors, *others, **factors)


def _one_by_one(name: str, tensors: Tensors, *others: Any, reuse: bool = False, **factors: Any) -> Tensors:
    operation = _WITH_TENSORS.get(name) or getattr(torch, name)
    return [
        operation(tensor, *(other[i] if isinstance(other, list | tuple) else other for other in others), **factors)
        for i, tensor in enumerate(tensors)
    ]


def _like(number: Number, tensor: Tensor) -> Number:
    # A () tensor of a wider dtype would widen a () parameter.
    return number.to(tensor.dtype) if isinstance(number, Tensor) and number.dim() == 0 else number


def _mul(x: Tensor, y: Number) -> Tensor:
    return x * _like(y, x)


def _div(x: Tensor, y: Number) -> Tensor:
    return x / _like(y, x)


def _add(x: Tensor, y: Number, *, alpha: Number = 1) -> Tensor:
    if isinstance(alpha, Tensor):
        return x + y * _like(alpha, x)
    return torch.add(x, y, alpha=alpha)


def _addcdiv(x: Tensor, numerator: Tensor, denominator: Tensor, *, value: Number) -> Tensor:
    if isinstance(value, Tensor):
        return x + numerator / denominator * _like(value, x)
    return torch.addcdiv(x, numerator, denominator, value=value)


def _addcmul(x: Tensor, y: Tensor, z: Tensor, value: float) -> Tensor:
    return torch.addcmul(x, y, z, value=value)


def _sqrt(x: Tensor) -> Tensor:
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)).sqrt(), x)


_WITH_TENSORS: dict[str, Callable[..., Tensor]] = {
    "add": _add,
    "addcdiv": _addcdiv,
    "addcmul": _addcmul,
    "div": _div,
    "mul": _mul,
    "norm": torch.linalg.vector_norm,
    "sqrt": _sqrt,
}
