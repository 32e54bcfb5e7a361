"""Whether a transform of torch is active: then tensors are traced or batched, and no value can be read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["is_transformed", "read_number"]


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
