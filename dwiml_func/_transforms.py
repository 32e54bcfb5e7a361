"""Whether a transform of torch is active: then tensors are traced or batched, and no value can be read."""

from __future__ import annotations

import torch

__all__ = ["is_transformed"]


def is_transformed() -> bool:
    """Whether the caller runs under a transform of `torch.func` or is traced by `torch.compile`.

    Then a tensor may have no single value to read, and nothing may be written in place.
    """
    # Private, the same in torch 2.11 and 2.13; torch.func has no public function for it.
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
