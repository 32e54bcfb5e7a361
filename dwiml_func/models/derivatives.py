"""Derivatives of functions in plain operations, for the `torch.autograd.Function`s that stand in for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["push_forward", "vjp"]


def push_forward(function: Callable, primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple:
    """The derivative along tangents, as the transpose of the transpose, since nested forward mode fails."""
    given = (torch.zeros_like(y) if tangent is None else tangent for tangent, y in zip(tangents, primals, strict=True))
    results, pull = vjp(function, *primals)
    _, push = vjp(lambda *cotangents: pull(cotangents), *(torch.zeros_like(y) for y in results))
    return push(tuple(given))


def vjp(function: Callable, *primals: Tensor) -> tuple[Any, Callable]:
    """Results, and the function from their gradients to those of the arguments: `torch.func.vjp` of these alone."""
    return cast(tuple[Any, Callable], torch.func.vjp(function, *primals))
