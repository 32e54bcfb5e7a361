"""The types that rooms share. All are data or signatures: plain trees of tensors, and functions of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

__all__ = ["Buffers", "Metrics", "OptState", "Optimizer", "Params", "Schedule", "Sum"]

Params = Mapping[str, Tensor]
"""Trainable tensors by the module's own names."""

Buffers = Mapping[str, Tensor]
"""Tensors that the model uses and gradients do not change: buffers and frozen parameters, by the module's own names."""

OptState = Mapping[str, Mapping[str, Tensor]]
"""Optimizer state by kind, then by parameter name: `{"exp_avg": {"weight": ...}}`. `TrainState.step` counts updates."""


class Optimizer(NamedTuple):
    """An optimizer: two pure functions.

    Args:
        init: `init(params) -> opt_state`, the state before the first update.
        update: `update(grads, opt_state, params, *, lr, step, donate=False) -> (params, opt_state)`. `step` is the
            number of updates done before this one. `lr` and `step` are numbers or () tensors, and the result can be
            differentiated with respect to `lr` and to a `weight_decay` that the optimizer was made with as a tensor.
            With `donate=True` the memory of `opt_state` and `params` is reused, where numbers and tensors are plain.

    Example:
        >>> import torch
        >>> from dwiml_func.optim import sgd
        >>> params = {"w": torch.ones(2)}
        >>> optimizer = sgd()
        >>> params, _ = optimizer.update({"w": torch.ones(2)}, optimizer.init(params), params, lr=0.25, step=0)
        >>> params["w"]
        tensor([0.7500, 0.7500])
    """

    init: Callable[[Params], OptState]
    update: Callable[..., tuple[dict[str, Tensor], OptState]]


Schedule = Callable[[int], float]
"""Maps the number of epochs done (0 for the first epoch) to that epoch's learning rate."""


class Sum(NamedTuple):
    """A weighted sum of one metric.

    Args:
        total: sum of weight times value; float, or () float64 tensor.
        weight: sum of the weights (points of streamlines for a loss, batches for a gradient norm).

    Example:
        >>> Sum(6.0, 3.0).total
        6.0
    """

    total: float | Tensor
    weight: float | Tensor


Metrics = Mapping[str, Sum]
"""Sums by name, e.g. `{"loss": Sum(...), "grad_norm": Sum(...)}`."""
