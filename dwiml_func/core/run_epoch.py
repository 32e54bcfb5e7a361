"""One epoch: training, the validations within it and at its end, and the report.

It is a fold of a step over batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from functools import partial
from itertools import chain
from typing import Any, Protocol

from dwiml_func._transforms import is_transformed
from dwiml_func.core.batch_source import Batches, checked_batches
from dwiml_func.core.early_stopping import Mode, should_stop
from dwiml_func.core.epoch import EvalStep, OnBatch, checked_result, end_epoch, epoch_sums, eval_epoch_fn
from dwiml_func.core.gradients import is_differentiated
from dwiml_func.core.interval import Interval, validation_interval
from dwiml_func.core.loop_options import check_options
from dwiml_func.core.rates import Step, epoch_rates, next_plateau, with_rate
from dwiml_func.core.report import EpochReport, Validation, judge_epoch
from dwiml_func.core.state import TrainState, check_not_donated
from dwiml_func.types import Metrics, Schedule

__all__ = ["Interrupted", "Track", "epoch_events", "run_epoch"]

OnReport = Callable[[TrainState, EpochReport], object]


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
    validate_every: int | str = 1,
    max_epochs: int | None = None,
    patience: int | None = None,
    patience_delta: float = 1e-6,
    on_batch: OnBatch | None = None,
    on_trained: OnReport | None = None,
    on_validated: OnReport | None = None,
    interrupt: Callable[[], bool] | None = None,
    track: Track | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[TrainState, EpochReport]:
    """Train the current epoch to its end, validate, and judge it.

    Arguments that are not described here are those of `train_and_validate`.

    Args:
        state: where to start, also in the middle of an epoch.
        max_epochs: the report's `stop` says when this number is reached; None never does.
        on_trained: called between training and validation with the state and the report that the epoch has without
            validation. What is saved there is not lost if the validation fails.
        on_validated: called after each validation within the epoch with the state and its report.

    Returns:
        The state after the epoch, and its report; where patience ran out within the epoch, those after that validation.

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
    check_not_donated(state)
    check_options(
        train=train, step=step, valid=valid, eval_step=eval_step, on_batch=on_batch, interrupt=interrupt, mode=mode,
        validate_every=validate_every, max_epochs=max_epochs,
        patience=patience, patience_delta=patience_delta,
    )  # fmt: skip
    events = epoch_events(
        state, train=train, step=step, valid=valid, eval_step=eval_step, learning_rate=learning_rate, monitor=monitor,
        mode=mode, validate_every=validate_every, max_epochs=max_epochs, patience=patience,
        patience_delta=patience_delta, on_batch=on_batch, on_trained=on_trained, interrupt=interrupt, track=track,
        clock=clock,
    )  # fmt: skip
    found = next(events)
    for found in chain([found], events):  # noqa: B020
        if found[1].batch and on_validated is not None:
            on_validated(*found)
    return found


def epoch_events(
    state: TrainState,
    *,
    train: Batches,
    step: Step,
    valid: Batches | None,
    eval_step: EvalStep | None,
    learning_rate: float | Schedule,
    monitor: str,
    mode: Mode,
    validate_every: int | str,
    max_epochs: int | None,
    patience: int | None,
    patience_delta: float,
    on_batch: OnBatch | None,
    on_trained: OnReport | None,
    interrupt: Callable[[], bool] | None,
    track: Track | None,
    clock: Callable[[], float],
) -> Generator[tuple[TrainState, EpochReport], TrainState | None]:
    """The current epoch to its end: yields the state and a report after each validation within it, and at the end.

    A state that is sent back takes the place of the one that was yielded. It ends early where patience runs out.
    """
    if is_differentiated(state.params) and not is_transformed():
        raise ValueError(
            "Expected parameters that require no gradient: all epochs would be one graph. Detach them: "
            "state.replace(params={name: p.detach() for name, p in state.params.items()})."
        )
    track, every = track or _untracked, validation_interval(validate_every)
    bound = with_rate(step, learning_rate, state)
    last, earlier_sums, start = state, state.sums, clock()  # `last`: after the last training batch
    epoch, first_step, in_validation = state.epoch, state.step - state.batch, 0.0
    judge = partial(
        judge_epoch,
        epoch=epoch + 1,
        has_validation=valid is not None,
        monitor=monitor,
        mode=mode,
        max_epochs=max_epochs,
        patience=patience,
        patience_delta=patience_delta,
        earlier_sums=earlier_sums,
    )

    def check_interrupt(*_: object) -> None:
        if interrupt is not None and interrupt():
            raise Interrupted(last)

    def validated(state: TrainState, sums: Metrics, validations: tuple[Validation, ...]) -> EpochReport:
        """Validate, with batches and random numbers of the epoch's end, and judge."""
        trained_at = clock()
        train_minutes = (trained_at - start - in_validation) / 60
        own = partial(
            judge,
            state.best,
            rates=[bound.keywords["lr"]]
            if isinstance(bound, partial)  # one rate for the whole epoch
            else epoch_rates(
                learning_rate,
                first_step=first_step,
                step=state.step,
                validations=validations,
                epoch=epoch,
                plateau=state.plateau,
            ),
            train_sums=sums,
            batch=state.batch,
            validations=validations,
        )
        valid_sums: Metrics = {}
        if valid is not None and eval_step is not None and (state.batch or every.due_after_epoch(epoch + 1)):
            if on_trained is not None:
                on_trained(state, own(valid_sums={}, minutes=(train_minutes, in_validation / 60)))
            batches = track(valid(state.key, epoch, 0), "validation", epoch=epoch, start_batch=0)
            at_end = state.replace(epoch=epoch + 1, batch=0, sums={}, validations=())
            valid_sums = eval_epoch_fn(at_end, batches, step=eval_step, on_batch=check_interrupt)
        minutes = (train_minutes, (in_validation + clock() - trained_at) / 60)
        return own(valid_sums=valid_sums, minutes=minutes)

    def judged(state: TrainState, report: EpochReport) -> TrainState:
        means = report.train if valid is None else report.valid
        plateau = next_plateau(learning_rate, state.plateau, means, monitor=monitor, mode=mode)
        return state.replace(best=report.best, plateau=plateau)

    left = checked_batches(train, state.key, state.epoch, state.batch)
    for batch in track(left, "training", epoch=epoch, start_batch=state.batch):
        if valid is not None and _is_due(every, state):  # only now: at the last batch it is that of the epoch's end
            before = clock()
            report = validated(state, epoch_sums(state), state.validations)
            state = judged(state, report).replace(validations=report.validations)
            state = last = (yield state, report) or state
            in_validation += clock() - before
            if should_stop(state.best, patience):
                return
        state, metrics = checked_result(state, bound(state, batch))
        last = state
        if on_batch is not None:
            on_batch(state, metrics)
        check_interrupt()
    validations = state.validations
    state, sums = end_epoch(state)
    report = validated(state, sums, validations)
    yield judged(state, report), report


def _is_due(every: Interval, state: TrainState) -> bool:
    """Whether a validation is due after the last batch; a resumed run may have done it before."""
    is_done = any(validation.batch == state.batch for validation in state.validations)
    return state.batch > 0 and not is_done and every.due_within_epoch(batch=state.batch)


def _untracked(batches: Iterable[Any], label: str, *, epoch: int, start_batch: int) -> Iterable[Any]:
    return batches
