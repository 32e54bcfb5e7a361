"""The types that rooms share. All are data or signatures: plain trees of tensors, and functions of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "Buffers",
    "Gate",
    "Grads",
    "Metrics",
    "Number",
    "OnPlateau",
    "OptState",
    "Optimizer",
    "Params",
    "PerStep",
    "Plateau",
    "Schedule",
    "Sum",
    "Transform",
]

Number = float | int | Tensor
"""A Python number, or a () tensor."""

Params = Mapping[str, Tensor]
"""Trainable tensors by the module's own names."""

Buffers = Mapping[str, Tensor]
"""Tensors that the model uses and gradients do not change: buffers and frozen parameters, by the module's own names."""

Grads = Mapping[str, Tensor | None]
"""Gradients by parameter name. None: the batch did not use the parameter; optimizers leave it and its state alone."""

OptState = Mapping[str, Any]
"""Optimizer state: nested dicts of tensors, as `{"exp_avg": {"weight": ...}}`. `TrainState.step` counts the updates."""


class Optimizer(NamedTuple):
    """An optimizer: pure functions.

    Args:
        init: `init(params) -> opt_state`, the state before the first update.
        update: `update(grads, opt_state, params, *, lr, step, donate=False) -> (params, opt_state)`. `step` is the
            number of updates done before this one. `lr` and `step` are numbers or () tensors, and the result can be
            differentiated with respect to `lr` and to a `weight_decay` that the optimizer was made with as a tensor.
            With `donate=True` the memory of `opt_state` and `params` is reused, where numbers and tensors are plain.
        eval_params: `eval_params(opt_state, params) -> params`, the parameters to evaluate with, such as an average.
            None evaluates with `params`.
        uses_weight: whether `update` also takes the keyword `weight`, the number of points that `grads` average.
        is_elementwise: whether each element of a parameter is updated by itself, with state of the parameter's shape.
            An ensemble then updates all members in one call, and maps `update` over members otherwise.

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
    eval_params: Callable[[OptState, Params], Params] | None = None
    uses_weight: bool = False
    is_elementwise: bool = False


class Transform(NamedTuple):
    """A transformation of gradients, a link of `dwiml_func.optim.chain` before its optimizer.

    Args:
        init: `init(params) -> state`, nested dicts of tensors; `{}` without state.
        update: `update(grads, state, params, *, lr, step, weight, donate) -> (grads, state)`, a pure function.
            `step` is the number of gradients that the link has received before. `weight` is the number of points that
            the gradients average. With `donate=True` it may reuse the memory of `state`. It may return
            `(grads, state, gate)`: see `Gate`. A gradient is None where the batch did not use the parameter.

    Example:
        >>> import torch
        >>> from dwiml_func.optim import chain, sgd
        >>> def only_signs(grads, state, params, **_):
        ...     return {name: grad if grad is None else grad.sign() for name, grad in grads.items()}, state
        >>> optimizer = chain(Transform(lambda params: {}, only_signs), sgd())
        >>> params = {"w": torch.zeros(2)}
        >>> optimizer.update({"w": torch.tensor([3.0, -4.0])}, {}, params, lr=0.5, step=0)[0]["w"]
        tensor([-0.5000,  0.5000])
    """

    init: Callable[[Params], OptState]
    update: Callable[..., tuple[Any, ...]]


class Gate(NamedTuple):
    """Whether the links after a transformation take this step.

    Args:
        is_open: a bool, or a () bool tensor where the value cannot be read.
        step: number of gradients that the links after this one have received before.
        weight: number of points that the gradients average.

    Example:
        >>> Gate(is_open=True, step=3, weight=128).step
        3
    """

    is_open: bool | Tensor
    step: int | Tensor
    weight: float | Tensor


@dataclass(frozen=True, slots=True)
class PerStep:
    """A schedule by optimizer steps, made by `dwiml_func.per_step`.

    Args:
        rate: maps the number of steps done (0 for the first step) to that step's learning rate.

    Example:
        >>> PerStep(lambda step: 0.1 / (1 + step)).rate(1)
        0.05
    """

    rate: Callable[[int], float]


class Plateau(NamedTuple):
    """What a run remembers of its validations, for a schedule that depends on them; part of the `TrainState`.

    Args:
        num_reductions: how often the schedule was reduced.
        best: the best value of the monitored metric so far; None before the first one.
        num_bad: validations since then, or since the last reduction.
        cooldown: validations that will not count.

    Example:
        >>> Plateau()
        Plateau(num_reductions=0, best=None, num_bad=0, cooldown=0)
    """

    num_reductions: int = 0
    best: float | None = None
    num_bad: int = 0
    cooldown: int = 0


@dataclass(frozen=True, slots=True)
class OnPlateau:
    """A schedule that is reduced when validations stop improving, made by `dwiml_func.reduce_on_plateau`.

    Args:
        schedule: the values without reductions.
        reduce: `reduce(value, num_reductions) -> value`.
        update: `update(plateau, value, mode=...) -> plateau`, after a validation with that value of the monitored
            metric; `mode` is "min" or "max".

    Example:
        >>> halved = OnPlateau(lambda epoch: 0.1, lambda value, count: value / 2**count, lambda plateau, *_: plateau)
        >>> halved.reduce(halved.schedule(0), 2)
        0.025
    """

    schedule: Callable[[int], float] | PerStep
    reduce: Callable[[float, int], float]
    update: Callable[..., Plateau]


Schedule = Callable[[int], float] | PerStep | OnPlateau
"""Maps the number of epochs done (0 for the first epoch) to that epoch's value, such as a learning rate; or counts
steps, or follows the validations."""


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
