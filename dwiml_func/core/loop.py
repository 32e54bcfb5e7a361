"""The training loop, from the inside out: an epoch is a fold of a step over batches, a run is a generator of epochs.

The generator yields the state and a report after each epoch, until the last epoch or until patience runs out. The
caller's `for` loop acts on them: it writes logs and saves checkpoints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Sized
from functools import partial
from typing import Any, Protocol

from dwiml_func.core.early_stopping import Mode, should_stop
from dwiml_func.core.epoch import EvalStep, OnBatch, epoch_fn, eval_epoch_fn
from dwiml_func.core.rates import Step, epoch_rates, next_plateau, with_rate
from dwiml_func.core.report import EpochReport, judge_epoch
from dwiml_func.core.rng import Key
from dwiml_func.core.state import TrainState
from dwiml_func.optim.schedules import constant
from dwiml_func.types import Metrics, OnPlateau, PerStep, Schedule

__all__ = [
    "Batches",
    "Interrupted",
    "Track",
    "check_options",
    "run_epoch",
    "train_and_validate",
]

Batches = Callable[[Key, int, int], Iterable[Any]]
"""`batches(key, epoch, start_batch)`: the batches of an epoch from `start_batch` on, a pure function of the three."""


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


def run_epoch(
    state: TrainState,
    *,
    train: Batches,
    step: Step,
    valid: Batches | None = None,
    eval_step: EvalStep | None = None,
    learning_rate: float | Schedule,
    monitor: str = "loss",
    mode: Mode = "min",
    validate_every: int = 1,
    max_epochs: int | None = None,
    patience: int | None = None,
    patience_delta: float = 1e-6,
    on_batch: OnBatch | None = None,
    on_trained: Callable[[TrainState, EpochReport], object] | None = None,
    interrupt: Callable[[], bool] | None = None,
    track: Track | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[TrainState, EpochReport]:
    """Train the current epoch to its end, validate, and judge it.

    Args:
        state: where to start, also in the middle of an epoch.
        train, step, valid, eval_step, learning_rate, monitor, mode, validate_every, patience, patience_delta, on_batch,
            interrupt, track, clock: as for `train_and_validate`.
        max_epochs: the report's `stop` says when this number is reached; None never does.
        on_trained: called between training and validation with the state and the report that the epoch has without
            validation. What is saved there is not lost if the validation fails.

    Returns:
        The state after the epoch, and its report.

    Raises:
        ValueError, TypeError, NonFiniteError, Interrupted: as `train_and_validate`.

    Example:
        >>> import torch
        >>> from dwiml_func import init_state, module_loss, sgd, train_step
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
        >>> step = partial(train_step, loss_fn=loss_fn, optimizer=sgd())
        >>> train = lambda key, epoch, start_batch: [torch.ones(4, 2)] * (3 - start_batch)
        >>> state, report = run_epoch(init_state(model, sgd(), seed=0), train=train, step=step, learning_rate=0.1)
        >>> state.epoch, state.step, report.is_best
        (1, 3, True)
    """
    check_options(
        valid=valid, eval_step=eval_step, mode=mode, validate_every=validate_every, max_epochs=max_epochs,
        patience=patience, patience_delta=patience_delta,
    )  # fmt: skip
    track = track or _untracked
    bound = with_rate(step, learning_rate, state)
    last, earlier_sums, start = state, state.sums, clock()  # `last`: after the last training batch
    first_step = state.step - state.batch

    def after_batch(state: TrainState, metrics: Metrics) -> None:
        nonlocal last
        last = state
        if on_batch is not None:
            on_batch(state, metrics)
        after_eval_batch()

    def after_eval_batch(*_: object) -> None:
        if interrupt is not None and interrupt():
            raise Interrupted(last)

    batches = checked_batches(train, state)
    batches = track(batches, "training", epoch=state.epoch, start_batch=state.batch)
    state, train_sums = epoch_fn(state, batches, step=bound, on_batch=after_batch)
    trained_at = clock()
    judge = partial(
        judge_epoch,
        state.best,
        epoch=state.epoch,
        rates=epoch_rates(
            learning_rate, first_step=first_step, step=state.step, epoch=state.epoch - 1, plateau=state.plateau
        ),
        train_sums=train_sums,
        has_validation=valid is not None,
        monitor=monitor,
        mode=mode,
        max_epochs=max_epochs,
        patience=patience,
        patience_delta=patience_delta,
        earlier_sums=earlier_sums,
    )
    valid_sums: Metrics = {}
    if valid is not None and eval_step is not None and state.epoch % validate_every == 0:
        if on_trained is not None:
            on_trained(state, judge(valid_sums={}, minutes=((trained_at - start) / 60, 0.0)))
        batches = track(valid(state.key, state.epoch - 1, 0), "validation", epoch=state.epoch - 1, start_batch=0)
        valid_sums = eval_epoch_fn(state, batches, step=eval_step, on_batch=after_eval_batch)
    report = judge(valid_sums=valid_sums, minutes=((trained_at - start) / 60, (clock() - trained_at) / 60))
    means = report.train if valid is None else report.valid
    plateau = next_plateau(learning_rate, state.plateau, means, monitor=monitor, mode=mode)
    return state.replace(best=report.best, plateau=plateau), report


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
    monitor: str = "loss",
    mode: Mode = "min",
    validate_every: int = 1,
    keep_unvalidated: bool = True,
    on_batch: OnBatch | None = None,
    interrupt: Callable[[], bool] | None = None,
    track: Track | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[tuple[TrainState, EpochReport], TrainState | None, None]:
    """Train and validate, epoch by epoch, until `max_epochs` or until patience runs out: a fold of `run_epoch`.

    Args:
        state: where to start: `init_state(...)` or a restored checkpoint, also one from the middle of an epoch.
        train: `train(key, epoch, start_batch)` gives training batches, `key` being the run's root key.
        step: `step(state, batch, lr=...)`, e.g. `partial(train_step, loss_fn=..., optimizer=...)`.
        valid: like `train`, for validation. None: the means over the training decide the best epoch.
        eval_step: `eval_step(state, batch)`; needed with `valid`.
        learning_rate: a number; a function of the number of epochs done; `per_step(f)`, f being a function of the
            number of optimizer steps done; or `reduce_on_plateau(...)`.
        max_epochs: number of epochs at which the run ends, counted from its very start.
        patience: validations in a row without a new best after which the run ends; None never ends it.
        patience_delta: least improvement of the monitored metric that counts.
        monitor: the metric that decides the best epoch: "loss", or the name of an auxiliary metric.
        mode: "min" where a lower value is better, "max" where a higher one is.
        validate_every: validate after every so many epochs. Best epoch and patience count validations only.
        keep_unvalidated: whether an epoch whose validation fails with an error is yielded, without validation, before
            the error is raised. Otherwise the error is raised at once.
        on_batch: called with the state and the sums after each training batch.
        interrupt: called after each training and each validation batch; True ends the loop with `Interrupted`.
        track: shows progress: `track(batches, label, epoch=..., start_batch=...)` gives back the same batches, see
            `dwiml_func.writers.progress.Progress.track`.
        clock: gives seconds; for tests.

    Yields:
        The state after each epoch, and its report. Nothing is yielded when `state` has no epoch left to do. A state
        that is sent back (`epochs.send(state)`) takes the place of the one that was yielded.

    Raises:
        ValueError: at the call, for `valid` without `eval_step` or an option out of range; in an epoch, when it has no
            batch, its learning rate is no finite number of at least 0, there is no metric of the name `monitor`, or
            `train` ignores `start_batch`.
        TypeError: the step does not return a state and its sums.
        NonFiniteError: a training loss or gradient was not finite. The last state that was yielded is valid, unless a
            donating step has reused its memory.
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
    judging: dict[str, Any] = {
        "mode": mode,
        "validate_every": validate_every,
        "max_epochs": max_epochs,
        "patience": patience,
        "patience_delta": patience_delta,
    }
    check_options(valid=valid, eval_step=eval_step, **judging)
    if not (callable(learning_rate) or isinstance(learning_rate, PerStep | OnPlateau)):
        learning_rate = constant(float(learning_rate))  # refused at the call, not in the first epoch
    trained: tuple[TrainState, EpochReport] | None = None  # an epoch that is being validated

    def on_trained(state: TrainState, report: EpochReport) -> None:
        nonlocal trained
        trained = state, report

    epoch = partial(
        run_epoch,
        train=train,
        step=step,
        valid=valid,
        eval_step=eval_step,
        learning_rate=learning_rate,
        monitor=monitor,
        on_batch=on_batch,
        on_trained=on_trained,
        interrupt=interrupt,
        track=track,
        clock=clock,
        **judging,
    )

    def epochs(state: TrainState) -> Generator[tuple[TrainState, EpochReport], TrainState | None, None]:
        nonlocal trained
        while state.epoch < max_epochs and not should_stop(state.best, patience):
            try:
                state, report = epoch(state)
            except Interrupted:
                raise
            except Exception:
                if trained is not None and keep_unvalidated:
                    yield trained
                raise
            trained = None
            state = (yield state, report) or state

    return epochs(state)


def checked_batches(train: Batches, state: TrainState) -> Iterable[Any]:
    """The remaining batches of the current epoch; ValueError where the source plainly ignores where it should start."""
    batches = train(state.key, state.epoch, state.batch)
    if state.batch > 0 and isinstance(batches, Sized):
        whole = train(state.key, state.epoch, 0)
        if isinstance(whole, Sized) and len(batches) != (left := max(len(whole) - state.batch, 0)):
            raise ValueError(
                f"Expected the last {left} of the {len(whole)} batches of epoch {state.epoch + 1}, since {state.batch} "
                f"are done. Received: {len(batches)} batches. The source must begin at `start_batch`."
            )
    return batches


def check_options(
    *,
    valid: object = None,
    eval_step: object = None,
    mode: str = "min",
    validate_every: int = 1,
    max_epochs: int | None,
    patience: int | None,
    patience_delta: float,
) -> None:
    """Raise ValueError for options of a loop that are out of range."""
    if (valid is None) != (eval_step is None):
        raise ValueError("Expected valid and eval_step together. Received only one of them.")
    if mode not in ("min", "max"):
        raise ValueError(f"Expected mode 'min' or 'max'. Received: {mode!r}")
    if validate_every < 1:
        raise ValueError(f"Expected validate_every of at least 1. Received: {validate_every}")
    if max_epochs is not None and max_epochs < 1:
        raise ValueError(f"Expected max_epochs of at least 1. Received: {max_epochs}")
    if patience is not None and patience < 1:
        raise ValueError(f"Expected patience of at least 1, or None. Received: {patience}")
    if not (math.isfinite(patience_delta) and patience_delta >= 0):
        raise ValueError(f"Expected a finite patience_delta of at least 0. Received: {patience_delta}")


def _untracked(batches: Iterable[Any], label: str, *, epoch: int, start_batch: int) -> Iterable[Any]:
    return batches
