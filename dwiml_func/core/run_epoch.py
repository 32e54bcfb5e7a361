"""One epoch: training, the validations within it and at its end, and the report.

It is a fold of a step over batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from dwiml_func._transforms import is_transformed
from dwiml_func.core.batch_source import Batches, check_iterable, checked_batches
from dwiml_func.core.early_stopping import Mode, should_stop
from dwiml_func.core.epoch import EvalStep, OnBatch, TrainStep, checked_result, end_epoch, epoch_sums, eval_epoch_fn
from dwiml_func.core.gradients import is_differentiated
from dwiml_func.core.interval import Interval, validation_interval
from dwiml_func.core.loop_options import LoopOptions, OnReport, Track
from dwiml_func.core.rates import Step, epoch_rates, next_plateau, with_rate
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState, check_state
from dwiml_func.types import Metrics, Schedule

__all__ = ["Interrupted", "epoch_events", "run_epoch"]

Events = Generator[tuple[TrainState, EpochReport], TrainState | None, TrainState]
"""Yields states with their reports, may be sent another state in return, and gives the last state back."""


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
    check_state(state)
    options = LoopOptions(
        train=train, step=step, valid=valid, eval_step=eval_step, learning_rate=learning_rate, max_epochs=max_epochs,
        patience=patience, patience_delta=patience_delta, monitor=monitor, mode=mode, validate_every=validate_every,
        on_batch=on_batch, on_trained=on_trained, interrupt=interrupt, track=track, clock=clock,
    )  # fmt: skip
    done: Any = None  # an epoch has one report at least
    for done in epoch_events(state, options):
        if done[1].batch and on_validated is not None:
            on_validated(*done)
    return done


def epoch_events(state: TrainState, options: LoopOptions) -> Events:
    """The current epoch to its end: yields the state and a report after each validation within it, and at the end.

    A state that is sent back takes the place of the one that was yielded. It ends early where patience runs out. Where
    a validation fails, the state and the report without it are yielded before the error, if `keep_unvalidated`.
    """
    if is_differentiated(state.params) and not is_transformed():
        raise ValueError(
            "Expected parameters that require no gradient: all epochs would be one graph. Detach them: "
            "state.replace(params={name: p.detach() for name, p in state.params.items()})."
        )
    step, every = with_rate(options.step, options.learning_rate, state), validation_interval(options.validate_every)
    epoch = _Epoch(options, state, step, every, started_at=options.clock())
    paused = 0.0  # seconds in validations, and in what the caller did after them
    batches = checked_batches(options.train, state.key, state.epoch, state.batch)
    for batch in epoch.tracked(batches, "training", start_batch=state.batch):
        if epoch.is_validation_due(state):  # only now: at the last batch it is that of the epoch's end
            paused_at = options.clock()
            state = yield from epoch.validate(state, state, epoch_sums(state), paused)
            paused += options.clock() - paused_at
            if should_stop(state.best, options.patience):
                return state
        state, metrics = checked_result(state, epoch.step(state, batch))
        if options.on_batch is not None:
            options.on_batch(state, metrics)
        epoch.check_interrupt(state)
    closed, sums = end_epoch(state)
    return (yield from epoch.validate(state, closed, sums, paused))


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The current epoch: what its batches, validations and reports share."""

    options: LoopOptions
    start: TrainState
    step: TrainStep  # with its learning rate
    every: Interval  # when to validate
    started_at: float

    def tracked(self, batches: Iterable[Any], label: str, *, start_batch: int) -> Iterable[Any]:
        """The batches, with a progress bar if there is one."""
        track = self.options.track
        return batches if track is None else track(batches, label, epoch=self.start.epoch, start_batch=start_batch)

    def check_interrupt(self, last: TrainState) -> None:
        """Raise `Interrupted`, with the state after the last training batch, where that is asked for."""
        if self.options.interrupt is not None and self.options.interrupt():
            raise Interrupted(last)

    def is_validation_due(self, state: TrainState) -> bool:
        """Whether to validate after the last batch, within the epoch; a resumed run may have done it before."""
        if self.options.valid is None or state.batch == 0 or not self.every.due_within_epoch(batch=state.batch):
            return False
        return all(validation.batch != state.batch for validation in state.validations)

    def validate(self, last: TrainState, done: TrainState, sums: Metrics, paused: float) -> Events:
        """Validate, where that is due, and judge: yields `done` with its best epoch, and the report.

        `last` is the state after the last training batch, and `sums` are those of the epoch so far. `done` is the same
        state within the epoch, and the closed epoch at its end.
        """
        options, trained_at = self.options, self.options.clock()
        train_minutes = (trained_at - self.started_at - paused) / 60
        judge = partial(
            options.judge,
            done.best,
            epoch=self.start.epoch + 1,
            batch=done.batch,
            rates=self._rates(last),
            train_sums=sums,
            earlier_sums=self.start.sums,
            validations=last.validations,
        )
        is_due = done.batch > 0 or self.every.due_after_epoch(done.epoch)
        valid_sums, unvalidated = {}, None
        try:
            if options.valid is not None and is_due:
                unvalidated = judge(valid_sums={}, minutes=(train_minutes, paused / 60))
                if options.on_trained is not None:
                    options.on_trained(done, unvalidated)
                valid_sums = self._evaluate(last)
            report = judge(valid_sums=valid_sums, minutes=(train_minutes, (paused + options.clock() - trained_at) / 60))
        except Interrupted:
            raise
        except Exception:
            if unvalidated is not None and options.keep_unvalidated:
                yield done, unvalidated
            raise
        means = report.train if options.valid is None else report.valid
        plateau = next_plateau(options.learning_rate, done.plateau, means, monitor=options.monitor, mode=options.mode)
        validations = report.validations if done.batch else ()
        judged = done.replace(best=report.best, plateau=plateau, validations=validations)
        state = (yield judged, report) or judged
        check_state(state)
        return state

    def _evaluate(self, last: TrainState) -> Metrics:
        """The sums of a validation, with the batches and random numbers of the epoch's end."""
        valid, evaluate, number = self.options.valid, self.options.eval_step, self.start.epoch
        assert valid is not None
        assert evaluate is not None
        closed = last.replace(epoch=number + 1, batch=0, sums={}, validations=())
        batches = self.tracked(check_iterable("valid", valid(last.key, number, 0)), "validation", start_batch=0)
        return eval_epoch_fn(closed, batches, step=evaluate, on_batch=lambda *_: self.check_interrupt(last))

    def _rates(self, last: TrainState) -> list[float]:
        """The learning rates of the epoch so far."""
        if isinstance(self.step, partial):  # one rate for the whole epoch
            return [self.step.keywords["lr"]]
        start = self.start
        return epoch_rates(
            self.options.learning_rate,
            first_step=start.step - start.batch,
            step=last.step,
            validations=last.validations,
            epoch=start.epoch,
            plateau=last.plateau,
        )
