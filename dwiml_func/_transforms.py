"""Transforms of torch: whether one is active, when tensors are traced or batched, and what runs beneath a vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter

__all__ = ["beneath_vmap", "is_transformed", "read_number"]


def is_transformed() -> bool:
    """Whether the caller runs under a transform of `torch.func` or is traced by `torch.compile`.

    Then a tensor may have no single value to read, and nothing may be written in place.
    """
    # Private, the same in torch 2.11 and 2.13; torch.func has no public function for it.
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def read_number(number: Any) -> Any:
    """The Python number of a () tensor on the CPU; the tensor itself where reading would wait, or is impossible."""
    if not isinstance(number, Tensor) or number.requires_grad or number.device.type != "cpu" or is_transformed():
        return number
    return number.item()


def beneath_vmap(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor | None:
    """A function of tensors (K, ...), stacked over the members that `torch.func.vmap` maps; its result is mapped again.

    It does what a rule for `vmap` of an autograd.Function does, which takes 0.2 ms a call. None where the innermost
    transform is not `vmap`, or maps none of the tensors.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return None
    interpreter = retrieve_current_functorch_interpreter()
    if not isinstance(interpreter, VmapInterpreter):
        return None
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    level, num = interpreter.level(), interpreter.batch_size()
    pairs = [functorch._unwrap_batched(tensor, level) for tensor in tensors]
    if all(dim is None for _, dim in pairs):
        return None
    stacked = [_stacked(one, dim, num) for one, dim in pairs]
    with interpreter.lower(), torch._C.DisableTorchFunction():
        result = function(*stacked)
    return functorch._add_batch_dim(result, 0, level)


def _stacked(tensor: Tensor, dim: int | None, num: int) -> Tensor:
    if dim is None:
        return tensor.expand(num, *tensor.shape)
    return tensor.movedim(dim, 0) if dim else tensor
