"""Arithmetic on lists of tensors in two ways: fused for speed, or one by one for what torch transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from dwiml_func._transforms import is_transformed

__all__ = ["Arithmetic", "Number", "Tensors", "arithmetic_for"]

Number = float | int | Tensor
"""A Python number, or a () tensor."""

Tensors = tuple[Tensor, ...] | list[Tensor]
"""Tensors in one order of names."""


class Arithmetic(Protocol):
    """An operation of torch, by its name, on each element of lists of equal length.

    Args:
        name: "add", "addcdiv", "addcmul", "clone", "div", "lerp", "mul", "norm", "reciprocal" or "sqrt".
        tensors: the first argument of each.
        *others: further arguments: a list with one for each, or a number for all.
        reuse: whether the result may take the memory of `tensors`.
        **factors: numbers that the operation knows by name, as `alpha` of torch.add.

    Returns:
        The results, in the order of `tensors`.

    Example:
        >>> tensors = [torch.ones(2)]
        >>> arithmetic_for(tensors)("add", tensors, tensors, alpha=0.5)
        (tensor([1.5000, 1.5000]),)
    """

    def __call__(
        self, name: str, tensors: Tensors, *others: Tensors | Number, reuse: bool = False, **factors: Number
    ) -> Tensors: ...


def arithmetic_for(tensors: Iterable[Tensor], *numbers: Number) -> Arithmetic:
    """Choose how to calculate with tensors and numbers.

    Args:
        tensors: all that will be calculated with.
        *numbers: all numbers that are not constants.

    Returns:
        For plain tensors and numbers: one call an operation for all tensors, in place where memory may be reused. Under
        torch.func or torch.compile, where a tensor carries a graph, or where a number is a tensor: one call a tensor,
        never in place. Results can then be differentiated with respect to the numbers too, and the square root has a
        gradient at zero, so that a chain through the square of a zero gives zero, and not 0 times infinity.

    Example:
        >>> run = arithmetic_for([torch.ones(2)], torch.tensor(0.5))
        >>> run("add", [torch.ones(2)], [torch.ones(2)], alpha=torch.tensor(0.5))
        [tensor([1.5000, 1.5000])]
    """
    is_plain = not (
        is_transformed()
        or any(isinstance(number, Tensor) for number in numbers)
        or any(tensor.requires_grad for tensor in tensors)
    )
    return _fused if is_plain else _one_by_one


def _fused(name: str, tensors: Tensors, *others: Any, reuse: bool = False, **factors: Any) -> Tensors:
    if reuse:
        getattr(torch, f"_foreach_{name}_")(tensors, *others, **factors)
        return tensors
    return getattr(torch, f"_foreach_{name}")(tensors, *others, **factors)


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
