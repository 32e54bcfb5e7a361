"""The training loop, from the inside out: an epoch is a fold of a step over batches, a run is a generator of epochs.

The generator yields the state and a report after each epoch and does nothing else. The caller's `for` loop acts on
them: it writes logs, saves checkpoints, stops early.
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

__all__ = [
    "Batches",
    "EpochReport",
    "EvalStep",
    "Interrupted",
    "Track",
    "TrainStep",
    "epoch_fn",
    "eval_epoch_fn",
    "train_and_validate",
]

TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
"""`step(state, batch) -> (state, metrics)`: `train_step` with everything static bound."""

EvalStep = Callable[[TrainState, Any], Metrics]
"""`step(state, batch) -> metrics`: `eval_step` with the loss bound."""

Batches = Callable[[Key, int, int], Iterable[Any]]
"""`batches(key, epoch, start_batch)`: the batches of an epoch from `start_batch` on, a pure function of the three."""

OnBatch = Callable[[TrainState, Metrics], object]


class Step(Protocol):
    """`train_step` with all but the learning rate bound."""

    def __call__(self, state: TrainState, batch: Any, *, lr: float) -> tuple[TrainState, Metrics]: ...


class Track(Protocol):
    """Gives back the same batches and may show a progress bar; `label` is "training" or "validation"."""

    def __call__(self, batches: Iterable[Any], label: str, *, epoch: int, start_batch: int) -> Iterable[Any]: ...


class Interrupted(Exception):
    """The training loop ended because its `interrupt` asked for it.

    Args:
        state: the state after the last training batch. A run that is resumed from it trains no batch twice, and repeats
            the validation of that epoch if it was interrupted.

    Example:
        >>> from dwiml_func import init_state, sgd
        >>> import torch
        >>> Interrupted(init_state(torch.nn.Linear(1, 1), sgd(), seed=0).replace(epoch=1, batch=3))
        Interrupted('after batch 3 of epoch 2')
    """

    def __init__(self, state: Any) -> None:
        super().__init__(f"after batch {state.batch} of epoch {state.epoch + 1}")
        self.state = state


def epoch_fn(
    state: TrainState, batches: Iterable[Any], *, step: TrainStep, on_batch: OnBatch | None = None
) -> tuple[TrainState, Metrics]:
    """Train on the remaining batches of an epoch, and close the epoch.

    Args:
        state: the state to start from. When `state.batch` is above 0, `batches` must start at that batch.
        batches: training batches, in order.
        step: `step(state, batch) -> (state, metrics)`, e.g. `partial(train_step, loss_fn=..., optimizer=..., lr=...)`.
        on_batch: called with the state and the batch's sums after each step, for checkpoints and progress bars.

    Returns:
        The state with `epoch` one higher, `batch` 0 and no sums, and the sums of the whole epoch, including batches
        before a resume.

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
    check_has_batch(state)
    sums = dict(state.sums)
    first_bad = sums.pop(NON_FINITE, None)
    if first_bad is not None and float(first_bad.weight) > 0:
        _raise_deferred(state, first_bad)
    return state.replace(epoch=state.epoch + 1, batch=0, sums={}), sums


def eval_epoch_fn(
    state: TrainState, batches: Iterable[Any], *, step: EvalStep, on_batch: OnBatch | None = None
) -> Metrics:
    """Evaluate all batches.

    Args:
        state: the state; it is not changed.
        batches: validation batches, in order.
        step: `step(state, batch) -> metrics`, e.g. `partial(eval_step, loss_fn=...)`.
        on_batch: called with the state and the batch's sums after each batch.

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
        metrics = step(state.replace(batch=index), batch)
        sums = add_metrics(sums, metrics)
        if on_batch is not None:
            on_batch(state, metrics)
    return sums


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochReport:
    """The metrics, the durations and the best epoch after one epoch.

    Args:
        epoch: number of epochs done, this one included; 1 is the first.
        learning_rate: of this epoch.
        train: means over the training batches, e.g. `loss` (weighted by points), `grad_norm` (by batches).
        valid: means over the validation batches; empty without validation.
        num_batches: training batches in the epoch.
        num_points: number of points averaged in the training loss.
        best: the best epoch so far, this one included.
        is_best: whether this epoch is the best one.
        stop: why the run ends after this epoch: "max_epochs" or "patience"; None when it continues.
        train_minutes: duration of the training part, in minutes, since the start or the last resume.
        valid_minutes: duration of the validation part, in minutes.
        digest: SHA-256 of the state after the epoch, in a history that was restored from a checkpoint; None before, and
            where no checkpoint was made at the epoch's end.
        timed_points: number of points trained in `train_minutes`, where the epoch was resumed; None means all.

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
        """The loss that decides the best epoch: of the validation, or of the training without validation."""
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
    on_batch: OnBatch | None = None,
    interrupt: Callable[[], bool] | None = None,
    track: Track | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[tuple[TrainState, EpochReport]]:
    """Train and validate, epoch by epoch, until `max_epochs` or until patience runs out.

    Args:
        state: where to start: `init_state(...)` or a restored checkpoint, also one from the middle of an epoch.
        train: `train(key, epoch, start_batch)` gives training batches, `key` being the run's root key.
        step: `step(state, batch, lr=...)`, e.g. `partial(train_step, loss_fn=..., optimizer=...)`.
        valid: like `train`, for validation. Where it is None or gives no batches, the training loss decides the best
            epoch.
        eval_step: `eval_step(state, batch)`; needed with `valid`.
        learning_rate: a number, or a function of the number of epochs done.
        max_epochs: number of epochs at which the run ends, counted from its very start.
        patience: bad epochs in a row after which the run ends; None never ends it.
        patience_delta: least improvement of the monitored loss that counts.
        on_batch: called with the state and the sums after each training batch.
        interrupt: called after each training and each validation batch; True ends the loop with `Interrupted`.
        track: shows progress: `track(batches, label, epoch=..., start_batch=...)` gives back the same batches, see
            `dwiml_func.writers.progress.Progress.track`.
        clock: gives seconds; for tests.

    Yields:
        The state after each epoch, and its report. Nothing is yielded when `state` has no epoch left to do.

    Raises:
        ValueError: at the call, for `valid` without `eval_step` or a number out of range; in an epoch, when it has no
            batch or its learning rate is no finite number of at least 0.
        NonFiniteError: a training loss or gradient was not finite. The last state that was yielded is valid.
        Interrupted: `interrupt` asked for it.

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
    track = track or _untracked
    trained = state  # after the last training batch

    def after_batch(state: TrainState, metrics: Metrics) -> None:
        nonlocal trained
        trained = state
        if on_batch is not None:
            on_batch(state, metrics)
        after_eval_batch()

    def after_eval_batch(*_: object) -> None:
        if interrupt is not None and interrupt():
            raise Interrupted(trained)

    def epochs(state: TrainState) -> Iterator[tuple[TrainState, EpochReport]]:
        while state.epoch < max_epochs and not should_stop(state.best, patience):
            lr, earlier_sums, start = check_rate(schedule(state.epoch)), state.sums, clock()
            batches = train(state.key, state.epoch, state.batch)
            batches = track(batches, "training", epoch=state.epoch, start_batch=state.batch)
            state, train_sums = epoch_fn(state, batches, step=partial(step, lr=lr), on_batch=after_batch)
            train_end, valid_sums = clock(), {}
            if valid is not None and eval_step is not None:
                batches = valid(state.key, state.epoch - 1, 0)
                batches = track(batches, "validation", epoch=state.epoch - 1, start_batch=0)
                valid_sums = eval_epoch_fn(state, batches, step=eval_step, on_batch=after_eval_batch)
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
    """Report an epoch from its sums: the means, whether it is the best epoch, whether the run ends.

    `earlier_sums` is the part of `train_sums` from before the clock started.
    """
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


def check_has_batch(state: Any) -> None:
    """Raise ValueError when an epoch had no training batch; `state` is a `TrainState` or an `EnsembleState`."""
    if state.batch == 0:
        raise ValueError(f"Epoch {state.epoch + 1} has no batch. Expected at least one. Is the dataset empty?")


def check_options(*, max_epochs: int, patience: int | None, patience_delta: float) -> None:
    """Raise ValueError for options of a loop that are out of range."""
    if max_epochs < 1:
        raise ValueError(f"Expected max_epochs of at least 1. Received: {max_epochs}")
    if patience is not None and patience < 1:
        raise ValueError(f"Expected patience of at least 1, or None. Received: {patience}")
    if not (math.isfinite(patience_delta) and patience_delta >= 0):
        raise ValueError(f"Expected a finite patience_delta of at least 0. Received: {patience_delta}")


def check_rate(lr: float) -> float:
    """Return a learning rate; ValueError if it is negative or not finite."""
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"Expected a learning rate that is finite and at least 0. Received: {lr}")
    return lr


def _untracked(batches: Iterable[Any], label: str, *, epoch: int, start_batch: int) -> Iterable[Any]:
    return batches


def _raise_deferred(state: TrainState, first_bad: Sum) -> None:
    bad_step = int(first_bad.total)
    where = location(state.epoch, bad_step - (state.step - state.batch), bad_step)
    raise NonFiniteError(
        f"The loss or the gradient was not finite in {where}. "
        f"No later step was taken. Train that epoch again with non_finite='raise' to see the batch's ids."
    )
