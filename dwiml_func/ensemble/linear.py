"""Linear layers of an ensemble: one batched product, for which `vmap` itself runs a product, a scaling and a sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dwiml_func._transforms import beneath_vmap

__all__ = ["linear"]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` in a function that `torch.func.vmap` maps over members with weights of their own."""
    if input.dim() < 2:
        return F.linear(input, weight, bias)
    mapped = beneath_vmap(_of_members, input, weight, *([] if bias is None else [bias]))
    return F.linear(input, weight, bias) if mapped is None else mapped


def _of_members(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dim() > 3:
        return _of_members(x.flatten(1, -2), weight, bias).unflatten(1, x.shape[1:-1])
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)
