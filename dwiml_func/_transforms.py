"""Whether a transform of torch's is at work: then numbers are traced or batched, and must stay tensors."""

from __future__ import annotations

import torch

__all__ = ["is_transformed"]


def is_transformed() -> bool:
    """Whether the caller runs under a transform of `torch.func` or is being traced by `torch.compile`.

    Returns:
        True where a tensor may stand for many values (vmap), for a tracked one (grad, jvp) or for none yet (compile):
        no value can be read from it, and nothing may be written in place.

    Example:
        >>> torch.func.vmap(lambda x: x + int(is_transformed()))(torch.zeros(2)), is_transformed()
        (tensor([1., 1.]), False)
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
