"""The training loop of an ensemble: a generator that yields the members and their reports once an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from dwiml_func.compiled.sums import vector_of
from dwiml_func.core.batch_source import Batches, checked_batches
from dwiml_func.core.early_stopping import Mode, should_stop
from dwiml_func.core.epoch import EvalStep, check_has_batch, eval_epoch_fn
from dwiml_func.core.interval import Interval, validation_interval
from dwiml_func.core.loop_options import LoopOptions
from dwiml_func.core.non_finite import location
from dwiml_func.core.rates import counts_steps, epoch_rates, next_plateau
from dwiml_func.core.report import EpochReport
from dwiml_func.core.run_epoch import Interrupted
from dwiml_func.ensemble.state import EnsembleState, member_sums
from dwiml_func.optim.schedules import value_at
from dwiml_func.types import Metrics, Schedule, Sum

__all__ = ["EnsembleReport", "train_and_validate_ensemble"]


OnBatch = Callable[[EnsembleState, Metrics], object]


class EnsembleStep(Protocol):
    """`ensemble_step` with all but the learning rate bound."""

    def __call__(self, ensemble: EnsembleState, batch: Any, *, lr: float | Tensor) -> tuple[EnsembleState, Metrics]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleReport:
    """The report of one epoch, or of a validation within it.

    Args:
        epoch: number of epochs done, including this one; 1 is the first.
        members: the reports of the members that finished it, by number. Durations are those of the whole ensemble.
        failed: messages of the members that have failed since the report before, by number.
        batch: 0 for a whole epoch; after a validation within it, the number of its batches done.

    Example:
        >>> EnsembleReport(epoch=1, members={}, failed={0: "The loss was not finite"}).failed
        {0: 'The loss was not finite'}
    """

    epoch: int
    members: Mapping[int, EpochReport]
    failed: Mapping[int, str]
    batch: int = 0


def train_and_validate_ensemble(
    ensemble: EnsembleState,
    *,
    train: Batches,
    step: EnsembleStep,
    valid: Batches | None = None,
    eval_step: Callable[[EnsembleState, Any], Metrics] | None = None,
    learning_rate: float | Schedule | Sequence[float | Schedule],
    max_epochs: int,
    patience: int | None = None,
    patience_delta: float = 1e-6,
    monitor: str = "loss",
    mode: Mode = "min",
    validate_every: int | str = 1,
    on_batch: OnBatch | None = None,
    interrupt: Callable[[], bool] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[tuple[EnsembleState, EnsembleReport]]:
    """Train and validate all members, epoch by epoch, each until `max_epochs` or until its own patience runs out.

    A member's numbers are those of `train_and_validate` with its state, on the same batches. Once it has stopped, or
    its loss or gradient was not finite, its tensors do not change, and the others continue.

    Args:
        ensemble: where to start: `stack_states(...)`, also within an epoch.
        train: `train(key, epoch, start_batch)` returns training batches for all; `key` is the first member's root key.
        step: `step(ensemble, batch, lr=...)`, e.g. `partial(ensemble_step, loss_fn=..., optimizer=...)`.
        valid, eval_step: as for `train_and_validate`, with `ensemble_eval_step`.
        learning_rate: a number or a schedule, as for `train_and_validate`; or a list with one for each member.
        max_epochs, patience, patience_delta, monitor, mode, validate_every, clock: as for `train_and_validate`, of each
            member.
        on_batch: called with the ensemble and the sums after each training batch.
        interrupt: called after each training and each validation batch; True ends the loop with `Interrupted`.

    Yields:
        The ensemble after each epoch, and its report; with `validate_every="500batches"` also after each validation
        within an epoch, where a member that is out of patience stops. Nothing is yielded when no member has an epoch
        left to do.

    Raises:
        ValueError: as `train_and_validate`, or the numbers of learning rates and members differ.
        Interrupted: `interrupt` asked for it; its state is the ensemble after the last training batch.

    Example:
        >>> from dwiml_func import init_state, module_loss, optim
        >>> from dwiml_func.ensemble import stack_states
        >>> from dwiml_func.ensemble.step import ensemble_step
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
        >>> step = partial(ensemble_step, loss_fn=loss_fn, optimizer=optim.sgd())
        >>> ensemble = stack_states([init_state(model, optim.sgd(), seed=0)] * 2)
        >>> epochs = train_and_validate_ensemble(
        ...     ensemble, train=lambda *_: [torch.ones(4, 2)] * 3, step=step, learning_rate=[0.1, 0.01], max_epochs=2
        ... )
        >>> for ensemble, report in epochs:
        ...     losses = [member.train["loss"] for member in report.members.values()]
        ...     print(report.epoch, losses[0] < losses[1])
        1 True
        2 True
    """
    each: Any = list(learning_rate) if isinstance(learning_rate, Sequence) else [learning_rate] * len(ensemble)
    options = LoopOptions(
        train=train, step=step, valid=valid, eval_step=eval_step, learning_rate=each, max_epochs=max_epochs,
        patience=patience, patience_delta=patience_delta, monitor=monitor, mode=mode, validate_every=validate_every,
        on_batch=on_batch, interrupt=interrupt, clock=clock,
    )  # fmt: skip
    every = validation_interval(validate_every)
    if len(each) != len(ensemble):
        raise ValueError(f"Expected {len(ensemble)} learning rates, one for each member. Received: {len(each)}")
    trained = ensemble  # after the last training batch

    def check_interrupt() -> None:
        if interrupt is not None and interrupt():
            raise Interrupted(trained)

    def epochs(ensemble: EnsembleState) -> Iterator[tuple[EnsembleState, EnsembleReport]]:
        ensemble = _without_patience(ensemble, patience)
        while ensemble.epoch < max_epochs and any(ensemble.active.tolist()):
            for ensemble, report in one_epoch(ensemble):  # noqa: B020
                yield ensemble, report

    def one_epoch(ensemble: EnsembleState) -> Iterator[tuple[EnsembleState, EnsembleReport]]:
        nonlocal trained
        running = ensemble.active.tolist()
        earlier_sums = member_sums(ensemble.sums if ensemble.batch else {}, len(ensemble))
        epoch, first_step, start, in_validation = ensemble.epoch, ensemble.step - ensemble.batch, clock(), 0.0

        def judged(ensemble: EnsembleState, sums: Metrics) -> tuple[EnsembleState, EnsembleReport]:
            """Validate, with batches and random numbers of the epoch's end, and judge each member."""
            still, trained_at = ensemble.active.tolist(), clock()
            failed = {n: _failure(ensemble, n) for n, ran in enumerate(running) if ran and not still[n]}
            train_sums, valid_sums = member_sums(sums, len(ensemble)), [{}] * len(ensemble)
            if valid is not None and eval_step is not None and (ensemble.batch or every.due_after_epoch(epoch + 1)):
                at_end: Any = ensemble.replace(epoch=epoch + 1)
                batches, evaluate = valid(ensemble.keys[0], epoch, 0), cast(EvalStep, eval_step)
                evaluated = eval_epoch_fn(at_end, batches, step=evaluate, on_batch=lambda *_: check_interrupt())
                valid_sums = member_sums(evaluated, len(ensemble))
            train_minutes = (trained_at - start - in_validation) / 60
            reports = {
                number: options.judge(
                    ensemble.best[number],
                    epoch=epoch + 1,
                    batch=ensemble.batch,
                    rates=epoch_rates(
                        each[number],
                        first_step=first_step,
                        step=ensemble.step,
                        validations=ensemble.validations[number],
                        epoch=epoch,
                        plateau=ensemble.plateau[number],
                    ),
                    train_sums=train_sums[number],
                    earlier_sums=earlier_sums[number],
                    valid_sums=valid_sums[number],
                    minutes=(train_minutes, (in_validation + clock() - trained_at) / 60),
                    validations=ensemble.validations[number],
                )
                for number, is_active in enumerate(still)
                if is_active
            }
            best, plateau, validations = list(ensemble.best), list(ensemble.plateau), list(ensemble.validations)
            for n, own in reports.items():
                best[n] = own.best
                means = own.train if valid is None else own.valid
                plateau[n] = next_plateau(each[n], plateau[n], means, monitor=monitor, mode=mode)
                validations[n] = own.validations if ensemble.batch else ()
            judgement = {"best": tuple(best), "plateau": tuple(plateau), "validations": tuple(validations)}
            report = EnsembleReport(epoch=epoch + 1, members=reports, failed=failed, batch=ensemble.batch)
            return _without_patience(ensemble.replace(**judgement), patience), report

        bound = _at_its_rate(step, each, ensemble)
        for batch in checked_batches(train, ensemble.keys[0], epoch, ensemble.batch):
            if valid is not None and _is_due(every, ensemble):  # only now: the last batch is the epoch's end
                before = clock()
                trained, report = judged(ensemble, ensemble.sums)
                ensemble, running = trained, trained.active.tolist()
                yield ensemble, report
                in_validation += clock() - before
                if not any(running):
                    return
                bound = _at_its_rate(step, each, ensemble)  # a plateau may have changed it
            ensemble, metrics = bound(ensemble, batch)
            trained = ensemble
            if on_batch is not None:
                on_batch(ensemble, metrics)
            check_interrupt()
        check_has_batch(ensemble)
        yield judged(*_close_epoch(ensemble))

    return epochs(ensemble)


def _is_due(every: Interval, ensemble: EnsembleState) -> bool:
    """Whether a validation is due after the last batch; a resumed run may have done it before."""
    if not ensemble.batch or not every.due_within_epoch(batch=ensemble.batch):
        return False
    pairs = zip(ensemble.validations, ensemble.active.tolist(), strict=True)
    return not any(is_active and own and own[-1].batch == ensemble.batch for own, is_active in pairs)


def _at_its_rate(step: EnsembleStep, schedules: list[float | Schedule], ensemble: EnsembleState) -> Any:
    """The step with the learning rate of all members, or a (K,) tensor of each one's; bound again at each epoch."""

    def rate(ensemble: EnsembleState) -> float | Tensor:
        pairs = zip(schedules, ensemble.plateau, strict=True)
        rates = [value_at(each, epoch=ensemble.epoch, step=ensemble.step, plateau=plateau) for each, plateau in pairs]
        if len(set(rates)) == 1:
            return rates[0]
        return vector_of(ensemble.active.device, *rates)

    if not any(map(counts_steps, schedules)):
        return partial(step, lr=rate(ensemble))
    return lambda ensemble, batch: step(ensemble, batch, lr=rate(ensemble))


def _without_patience(ensemble: EnsembleState, patience: int | None) -> EnsembleState:
    """Deactivate members that are out of patience."""
    continues = torch.tensor([not should_stop(best, patience) for best in ensemble.best], device=ensemble.active.device)
    return ensemble.replace(active=ensemble.active & continues)


def _close_epoch(ensemble: EnsembleState) -> tuple[EnsembleState, Metrics]:
    """The ensemble after an epoch of the active members, and the epoch's sums. The others keep position and sums."""
    active, position = ensemble.active, ensemble.done.new_tensor([ensemble.step, ensemble.epoch + 1, 0])
    closed = ensemble.replace(
        epoch=ensemble.epoch + 1,
        batch=0,
        done=torch.where(active[:, None], position, ensemble.done),
        sums={name: Sum(*(torch.where(active, 0.0, part) for part in pair)) for name, pair in ensemble.sums.items()},
    )
    return closed, ensemble.sums


def _failure(ensemble: EnsembleState, number: int) -> str:
    step, epoch, batch = ensemble.done[number].tolist()
    return (
        f"The loss or the gradient was not finite in {location(epoch, batch, step)}. "
        f"The member stays as it was before that step."
    )
