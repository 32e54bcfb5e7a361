"""Trees of tensors: nested dicts, such as parameters, gradients and optimizer states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dwiml_func.types import Grads

__all__ = ["choose", "given"]


def choose(condition: bool | Tensor, yes: Any, no: Any) -> Any:
    """Of two trees, the leaves of `yes` where the condition holds, else those of `no`.

    The condition is a bool, a () tensor, or (K,) for leaves (K, ...). With a tensor, a leaf that one tree lacks, such
    as a count that starts, is zero there.
    """
    if isinstance(condition, bool):
        return yes if condition else no
    if isinstance(yes, Mapping) or isinstance(no, Mapping):
        yes, no = yes or {}, no or {}
        return {name: choose(condition, yes.get(name), no.get(name)) for name in {**no, **yes}}
    if yes is no:
        return no
    yes, no = (torch.zeros_like(other) if own is None else own for own, other in ((yes, no), (no, yes)))
    if condition.dim() > 0:
        condition = condition.reshape(-1, *(1,) * (no.dim() - 1))
    return torch.where(condition, yes, no)


def given(grads: Grads) -> dict[str, Tensor]:
    """The gradients that are there."""
    return {name: grad for name, grad in grads.items() if grad is not None}
