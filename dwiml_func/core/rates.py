"""The learning rate within the loop: bound to a step, reported, and updated after a validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from dwiml_func.core.epoch import TrainStep
from dwiml_func.core.metrics import add_metrics
from dwiml_func.core.report import Validation
from dwiml_func.core.state import TrainState
from dwiml_func.optim.schedules import check_schedule, value_at
from dwiml_func.types import Metrics, OnPlateau, PerStep, Plateau, Schedule, Sum

__all__ = ["Step", "counts_steps", "epoch_rates", "next_plateau", "with_rate", "with_weight_decay"]


class Step(Protocol):
    """`train_step` with all but the learning rate bound."""

    def __call__(self, state: TrainState, batch: Any, *, lr: float) -> tuple[TrainState, Metrics]: ...


def with_rate(step: Step, learning_rate: float | Schedule, state: TrainState) -> TrainStep:
    """Bind the learning rate to a step, for the current epoch."""

    def rate(state: TrainState) -> float:
        return value_at(learning_rate, epoch=state.epoch, step=state.step, plateau=state.plateau)

    if counts_steps(learning_rate) or isinstance(learning_rate, OnPlateau):
        return lambda state, batch: step(state, batch, lr=rate(state))
    return partial(step, lr=rate(state))


def with_weight_decay(step: Callable[..., Any], weight_decay: float | Schedule) -> Callable[..., Any]:
    """Make the weight decay of a step follow a schedule, by epoch or by step.

    Args:
        step: `step(state, batch, lr=..., weight_decay=...)`: `train_step`, `jit_step(...)` or `ensemble_step` with the
            other arguments bound, the optimizer being a factory that takes `weight_decay`, such as `adamw` or
            `lambda weight_decay: ema(adamw(weight_decay=weight_decay))`.
        weight_decay: a number, a function of the number of epochs done, or `per_step(f)`.

    Returns:
        A step for `train_and_validate`: `step(state, batch, lr=...)`. Its sums hold the `weight_decay` that it used, so
        reports, logs and figures show it, as the mean over an epoch's steps.

    Raises:
        ValueError: the schedule is one of `reduce_on_plateau`, which only learning rates follow.

    Example:
        >>> import torch
        >>> from dwiml_func import adamw, cosine, init_state, module_loss, train_step
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
        >>> step = with_weight_decay(partial(train_step, loss_fn=loss_fn, optimizer=adamw), cosine(0.1, length=10))
        >>> state, _ = step(init_state(model, adamw(), seed=0), torch.ones(4, 2), lr=0.1)
        >>> state.step
        1
    """
    if isinstance(weight_decay, OnPlateau):
        raise ValueError("Expected a weight decay by epoch or by step. Received: one of reduce_on_plateau.")
    check_schedule("weight_decay", weight_decay)

    def decayed(state: Any, batch: Any, *, lr: Any) -> Any:
        value = value_at(weight_decay, epoch=state.epoch, step=state.step, plateau=Plateau())
        new_state, metrics = step(state, batch, lr=lr, weight_decay=value)
        steps = metrics["grad_norm"].weight  # 1, and (K,) for an ensemble, zero for members that took no step
        own = {"weight_decay": Sum(value * steps, steps)}
        return new_state.replace(sums=add_metrics(new_state.sums, own)), {**metrics, **own}

    return decayed


def counts_steps(learning_rate: float | Schedule) -> bool:
    """Whether the rate can change from step to step."""
    schedule = learning_rate.schedule if isinstance(learning_rate, OnPlateau) else learning_rate
    return isinstance(schedule, PerStep)


def epoch_rates(
    learning_rate: float | Schedule,
    *,
    first_step: int,
    step: int,
    validations: Sequence[Validation] = (),
    **position: Any,
) -> list[float]:
    """The rates of an epoch's steps, from `first_step` to the one before `step`; only one if all are the same.

    `position` is the epoch and the plateau, as for `value_at`. A validation within the epoch may have changed the
    plateau: of the steps before it, only the rate of the last is known.
    """
    if validations and isinstance(learning_rate, OnPlateau):
        since = epoch_rates(learning_rate, first_step=first_step + validations[-1].batch, step=step, **position)
        return [*(validation.learning_rate for validation in validations), *since]
    steps = range(max(first_step, 0) if counts_steps(learning_rate) else step - 1, step)
    return [value_at(learning_rate, step=number, **position) for number in steps]


def next_plateau(
    learning_rate: float | Schedule, plateau: Plateau, means: Mapping[str, float], *, monitor: str, mode: str
) -> Plateau:
    """The plateau after a validation with these means; the same one without a validation, or where nothing uses it."""
    if not isinstance(learning_rate, OnPlateau) or monitor not in means:
        return plateau
    return learning_rate.update(plateau, means[monitor], mode=mode)
