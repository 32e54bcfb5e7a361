"""An epoch is a fold of a step over batches.

The training loop: a generator that yields the run and a report once per epoch, and does nothing else.

The caller's `for` loop acts: it writes logs, saves checkpoints, stops early.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from dwiml_func.core.early_stopping import Best, should_stop, update_best
from dwiml_func.core.metrics import add_metrics, read_means
from dwiml_func.core.rng import Key
from dwiml_func.core.state import TrainState
from dwiml_func.core.step import NON_FINITE, NonFiniteError, location
from dwiml_func.optim.schedules import constant
from dwiml_func.types import Metrics, Schedule, Sum

__all__ = ["Batches", "EpochReport", "EvalStep", "TrainStep", "epoch_fn", "eval_epoch_fn", "train_and_validate"]

TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
"""`step(state, batch) -> (state, metrics)`: `train_step` with everything static bound."""

EvalStep = Callable[[TrainState, Any], Metrics]
"""`step(state, batch) -> metrics`: `eval_step` with the loss bound."""


def epoch_fn(
    state: TrainState,
    batches: Iterable[Any],
    *,
    step: TrainStep,
    on_batch: Callable[[TrainState, Metrics], None] | None = None,
) -> tuple[TrainState, Metrics]:
    """Train on the batches that are left of an epoch, and close the epoch.

    Args:
        state: the run. When `state.batch` is above 0 the epoch is under way, and `batches` must start at that batch.
        batches: training batches, in order.
        step: `step(state, batch) -> (state, metrics)`, e.g. `partial(train_step, loss_fn=..., optimizer=..., lr=...)`.
        on_batch: called with the state and the batch's sums after each step, for checkpoints and progress bars.

    Returns:
        The run with `epoch` one higher, `batch` 0 and no sums, and the sums of the whole epoch, batches before a resume
        included.

    Raises:
        ValueError: the epoch has no batch at all.
        NonFiniteError: a loss or gradient was not finite.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from dwiml_func import init_state, module_loss, optim, train_step
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
        >>> step = partial(train_step, loss_fn=loss_fn, optimizer=optim.sgd(), lr=0.1)
        >>> state, sums = epoch_fn(init_state(model, optim.sgd(), seed=0), [torch.ones(4, 2)] * 3, step=step)
        >>> state.epoch, state.step, sums["loss"].weight
        (1, 3, 12.0)
    """
    for batch in batches:
        state, metrics = step(state, batch)
        if on_batch is not None:
            on_batch(state, metrics)
    if state.batch == 0:
        raise ValueError(f"Epoch {state.epoch + 1} has no batch. Expected at least one: is the data set empty?")
    sums = dict(state.sums)
    first_bad = sums.pop(NON_FINITE, None)
    if first_bad is not None and float(first_bad.weight) > 0:
        _raise_deferred(state, first_bad)
    return state.replace(epoch=state.epoch + 1, batch=0, sums={}), sums


def eval_epoch_fn(state: TrainState, batches: Iterable[Any], *, step: EvalStep) -> Metrics:
    """Evaluate all batches.

    Args:
        state: the run; it is not changed.
        batches: validation batches, in order.
        step: `step(state, batch) -> metrics`, e.g. `partial(eval_step, loss_fn=...)`.

    Returns:
        The sums over all batches; empty without batches.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from dwiml_func import eval_step, init_state, module_loss, optim
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
        >>> state = init_state(model, optim.sgd(), seed=0)
        >>> eval_epoch_fn(state, [torch.ones(4, 2)] * 3, step=partial(eval_step, loss_fn=loss_fn))["loss"].weight
        12.0
    """
    sums: dict[str, Sum] = {}
    for index, batch in enumerate(batches):
        sums = add_metrics(sums, step(state.replace(batch=index), batch))
    return sums


def _raise_deferred(state: TrainState, first_bad: Sum) -> None:
    bad_step = int(first_bad.total)
    where = location(state.epoch, bad_step - (state.step - state.batch), bad_step)
    raise NonFiniteError(
        f"The loss or the gradient was not finite in {where}. "
        f"No later step was taken. Train that epoch again with non_finite='raise' to see the batch's ids."
    )


Batches = Callable[[Key, int, int], Iterable[Any]]
"""`batches(key, epoch, start_batch)`: the batches of an epoch from `start_batch` on, a pure function of the three."""


class Step(Protocol):
    """`train_step` with all but the learning rate bound.

    Example:
        >>> def step(state, batch, *, lr):
        ...     return state, {}
    """

    def __call__(self, state: TrainState, batch: Any, *, lr: float) -> tuple[TrainState, Metrics]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochReport:
    """What one epoch brought.

    Args:
        epoch: number of epochs done, this one included; 1 is the first.
        learning_rate: of this epoch.
        train: means over the training batches, e.g. `loss` (weighted by points), `grad_norm` (by batches).
        valid: means over the validation batches; empty without validation.
        num_batches: training batches in the epoch.
        num_points: points behind the training loss.
        best: the best epoch so far, this one included.
        is_best: whether this epoch is the best one.
        stop: why the run ends after this epoch: "max_epochs" or "patience"; None when it goes on.
        train_minutes: duration of the training part, in minutes, since the start or the last resume.
        valid_minutes: duration of the validation part, in minutes.
        digest: SHA-256 of the state after the epoch, in a history that was restored from a checkpoint; None before, and
            where no checkpoint was made at the epoch's end.
        timed_points: those of `num_points` that came within `train_minutes`, where a resume was within the epoch; None
            means all.

    Example:
        >>> report = EpochReport(
        ...     epoch=1, learning_rate=0.1, train={"loss": 0.5}, valid={}, num_batches=3, num_points=30,
        ...     best=Best(0.5, 1), is_best=True, stop=None, train_minutes=0.1, valid_minutes=0.0)
        >>> report.monitored_loss
        0.5
    """

    epoch: int
    learning_rate: float
    train: dict[str, float]
    valid: dict[str, float]
    num_batches: int
    num_points: float
    best: Best
    is_best: bool
    stop: Literal["max_epochs", "patience"] | None
    train_minutes: float
    valid_minutes: float
    digest: str | None = None
    timed_points: float | None = None

    @property
    def points_per_second(self) -> float:
        """Speed of the training part, since the start or the last resume; NaN where no time was measured."""
        points = self.num_points if self.timed_points is None else self.timed_points
        return points / (60 * self.train_minutes) if self.train_minutes > 0 else math.nan

    @property
    def monitored_loss(self) -> float:
        """The loss that decides the best epoch: validation's, or training's where nothing is validated."""
        return self.valid["loss"] if self.valid else self.train["loss"]


def train_and_validate(
    state: TrainState,
    *,
    train: Batches,
    step: Step,
    valid: Batches | None = None,
    eval_step: EvalStep | None = None,
    learning_rate: float | Schedule,
    max_epochs: int,
    patience: int | None = None,
    patience_delta: float = 1e-6,
    on_batch: Callable[[TrainState, Metrics], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[tuple[TrainState, EpochReport]]:
    """Train and validate, epoch by epoch, until `max_epochs` or until patience runs out.

    Args:
        state: where to start: `init_state(...)` or a restored checkpoint, also one from the middle of an epoch.
        train: `train(key, epoch, start_batch)` gives training batches, `key` being the run's root key.
        step: `step(state, batch, lr=...)`, e.g. `partial(train_step, loss_fn=..., optimizer=...)`.
        valid: like `train`, for validation; None validates nothing, and the training loss decides the best epoch. So it
            does when `valid` gives no batches.
        eval_step: `eval_step(state, batch)`; needed with `valid`.
        learning_rate: a number, or a function of the number of epochs done.
        max_epochs: number of epochs at which the run ends, counted from its very start.
        patience: bad epochs in a row after which the run ends; None never ends it.
        patience_delta: least improvement of the monitored loss that counts.
        on_batch: called with the state and the sums after each training batch.
        clock: gives seconds; for tests.

    Yields:
        The run after each epoch, and its report. Nothing is yielded when `state` has no epoch left to do.

    Raises:
        ValueError: at the call, for `valid` without `eval_step` or a number out of range; in an epoch, when it has no
            batch or its learning rate is no finite number of at least 0.
        NonFiniteError: a training loss or gradient was not finite. The last state that was yielded is whole.

    Example:
        >>> import torch
        >>> from dwiml_func import init_state, module_loss, optim, train_step
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
        >>> step = partial(train_step, loss_fn=loss_fn, optimizer=optim.sgd())
        >>> def train(key, epoch, start_batch):
        ...     return [torch.ones(4, 2)] * (3 - start_batch)
        >>> state = init_state(model, optim.sgd(), seed=0)
        >>> for state, report in train_and_validate(state, train=train, step=step, learning_rate=0.1, max_epochs=2):
        ...     print(report.epoch, report.num_batches, report.num_points, report.stop)
        1 3 12.0 None
        2 3 12.0 max_epochs
    """
    if (valid is None) != (eval_step is None):
        raise ValueError("Expected valid and eval_step together. Received only one of them.")
    check_options(max_epochs=max_epochs, patience=patience, patience_delta=patience_delta)
    schedule = learning_rate if callable(learning_rate) else constant(learning_rate)

    def epochs(state: TrainState) -> Iterator[tuple[TrainState, EpochReport]]:
        while state.epoch < max_epochs and not should_stop(state.best, patience):
            lr, earlier_sums, start = check_rate(schedule(state.epoch)), state.sums, clock()
            batches = train(state.key, state.epoch, state.batch)
            state, train_sums = epoch_fn(state, batches, step=partial(step, lr=lr), on_batch=on_batch)
            train_end, valid_sums = clock(), {}
            if valid is not None and eval_step is not None:
                batches = valid(state.key, state.epoch - 1, 0)
                valid_sums = eval_epoch_fn(state, batches, step=eval_step)
            report = judge_epoch(
                state.best,
                epoch=state.epoch,
                learning_rate=lr,
                train_sums=train_sums,
                valid_sums=valid_sums,
                max_epochs=max_epochs,
                patience=patience,
                patience_delta=patience_delta,
                minutes=((train_end - start) / 60, (clock() - train_end) / 60),
                earlier_sums=earlier_sums,
            )
            state = state.replace(best=report.best)
            yield state, report

    return epochs(state)


def judge_epoch(
    best: Best,
    *,
    epoch: int,
    learning_rate: float,
    train_sums: Metrics,
    valid_sums: Metrics,
    max_epochs: int,
    patience: int | None,
    patience_delta: float,
    minutes: tuple[float, float],
    earlier_sums: Metrics,
) -> EpochReport:
    """Report an epoch from its sums, `earlier_sums` of them from before the clock started: the means, whether it is the
    best, whether the run ends."""
    train_means, valid_means = read_means(train_sums), read_means(valid_sums)
    num_points = float(train_sums["loss"].weight)
    best = update_best(best, (valid_means or train_means)["loss"], epoch, patience_delta=patience_delta)
    return EpochReport(
        epoch=epoch,
        learning_rate=learning_rate,
        train=train_means,
        valid=valid_means,
        num_batches=int(train_sums["grad_norm"].weight) if "grad_norm" in train_sums else 0,
        num_points=num_points,
        best=best,
        is_best=best.epoch == epoch,
        stop="patience" if should_stop(best, patience) else "max_epochs" if epoch >= max_epochs else None,
        train_minutes=minutes[0],
        valid_minutes=minutes[1],
        timed_points=num_points - float(earlier_sums["loss"].weight) if earlier_sums else None,
    )


def check_options(*, max_epochs: int, patience: int | None, patience_delta: float) -> None:
    """Refuse options of a loop that are out of range."""
    if max_epochs < 1:
        raise ValueError(f"Expected max_epochs of at least 1. Received: {max_epochs}")
    if patience is not None and patience < 1:
        raise ValueError(f"Expected patience of at least 1, or None. Received: {patience}")
    if not (math.isfinite(patience_delta) and patience_delta >= 0):
        raise ValueError(f"Expected a finite patience_delta of at least 0. Received: {patience_delta}")


def check_rate(lr: float) -> float:
    """A learning rate, if it is one."""
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"Expected a learning rate that is finite and at least 0. Received: {lr}")
    return lr
