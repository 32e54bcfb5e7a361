"""The training loop of an ensemble: a generator that yields the members and their reports once an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from dwiml_func.core.batch_source import Batches, checked_batches
from dwiml_func.core.early_stopping import Mode, should_stop
from dwiml_func.core.epoch import check_has_batch
from dwiml_func.core.interval import validation_interval
from dwiml_func.core.loop_options import check_options
from dwiml_func.core.metrics import add_metrics
from dwiml_func.core.non_finite import location
from dwiml_func.core.rates import counts_steps, epoch_rates, next_plateau
from dwiml_func.core.report import EpochReport, judge_epoch
from dwiml_func.core.run_epoch import Interrupted
from dwiml_func.ensemble.state import EnsembleState, member_sums
from dwiml_func.optim.schedules import value_at
from dwiml_func.types import Metrics, Plateau, Schedule, Sum

__all__ = ["EnsembleReport", "train_and_validate_ensemble"]


OnBatch = Callable[[EnsembleState, Metrics], object]


class EnsembleStep(Protocol):
    """`ensemble_step` with all but the learning rate bound."""

    def __call__(self, ensemble: EnsembleState, batch: Any, *, lr: float | Tensor) -> tuple[EnsembleState, Metrics]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleReport:
    """The report of one epoch.

    Args:
        epoch: number of epochs done, including this one; 1 is the first.
        members: the reports of the members that finished it, by number. Durations are those of the whole ensemble.
        failed: messages of the members that failed in this epoch, by number.

    Example:
        >>> EnsembleReport(epoch=1, members={}, failed={0: "The loss was not finite"}).failed
        {0: 'The loss was not finite'}
    """

    epoch: int
    members: Mapping[int, EpochReport]
    failed: Mapping[int, str]


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
        max_epochs, patience, patience_delta, monitor, mode, clock: as for `train_and_validate`, of each member.
        validate_every: validate after every so many epochs, also as "3epochs".
        on_batch: called with the ensemble and the sums after each training batch.
        interrupt: called after each training and each validation batch; True ends the loop with `Interrupted`.

    Yields:
        The ensemble after each epoch, and its report. Nothing is yielded when no member has an epoch left to do.

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
    check_options(
        train=train, step=step, valid=valid, eval_step=eval_step, on_batch=on_batch, interrupt=interrupt, mode=mode,
        validate_every=validate_every, max_epochs=max_epochs,
        patience=patience, patience_delta=patience_delta,
    )  # fmt: skip
    every = validation_interval(validate_every)
    if every.unit == "batch":
        raise ValueError(f"An ensemble is validated at the ends of epochs. Received: validate_every={validate_every!r}")
    each: list[float | Schedule] = (
        list(learning_rate) if isinstance(learning_rate, Sequence) else [learning_rate] * len(ensemble)
    )
    if len(each) != len(ensemble):
        raise ValueError(f"Expected {len(ensemble)} learning rates, one for each member. Received: {len(each)}")
    is_per_step = any(map(counts_steps, each))
    trained = ensemble  # after the last training batch

    def after_batch(ensemble: EnsembleState, metrics: Metrics) -> None:
        nonlocal trained
        trained = ensemble
        if on_batch is not None:
            on_batch(ensemble, metrics)
        after_eval_batch()

    def after_eval_batch() -> None:
        if interrupt is not None and interrupt():
            raise Interrupted(trained)

    def means(report: EpochReport) -> Mapping[str, float]:
        return report.train if valid is None else report.valid

    def epochs(ensemble: EnsembleState) -> Iterator[tuple[EnsembleState, EnsembleReport]]:
        ensemble = _without_patience(ensemble, patience)
        while ensemble.epoch < max_epochs and any(running := ensemble.active.tolist()):
            earlier_sums = member_sums(ensemble.sums if ensemble.batch else {}, len(ensemble))
            start = clock()
            first_step = ensemble.step - ensemble.batch
            rates = partial(_rates, each, ensemble.plateau, ensemble.epoch)
            bound: Any = partial(step, lr=_one_or_each(rates(ensemble.step), ensemble))
            if is_per_step:
                bound = partial(_step_at_its_rate, step, rates)
            ensemble = _train(ensemble, train, bound, after_batch)
            still = ensemble.active.tolist()
            failed = {n: _failure(ensemble, n) for n, ran in enumerate(running) if ran and not still[n]}
            ensemble, sums = _close_epoch(ensemble)
            train_end, train_sums, valid_sums = clock(), member_sums(sums, len(ensemble)), [{}] * len(ensemble)
            if valid is not None and eval_step is not None and every.due_after_epoch(ensemble.epoch):
                valid_sums = member_sums(_evaluate(ensemble, valid, eval_step, after_eval_batch), len(ensemble))
            reports = {
                number: judge_epoch(
                    ensemble.best[number],
                    epoch=ensemble.epoch,
                    rates=epoch_rates(
                        each[number],
                        first_step=first_step,
                        step=ensemble.step,
                        epoch=ensemble.epoch - 1,
                        plateau=ensemble.plateau[number],
                    ),
                    train_sums=train_sums[number],
                    valid_sums=valid_sums[number],
                    max_epochs=max_epochs,
                    patience=patience,
                    patience_delta=patience_delta,
                    minutes=((train_end - start) / 60, (clock() - train_end) / 60),
                    earlier_sums=earlier_sums[number],
                    has_validation=valid is not None,
                    monitor=monitor,
                    mode=mode,
                )
                for number, is_active in enumerate(still)
                if is_active
            }
            best = tuple(reports[n].best if n in reports else best for n, best in enumerate(ensemble.best))
            plateau = tuple(
                next_plateau(each[n], own, means(reports[n]), monitor=monitor, mode=mode) if n in reports else own
                for n, own in enumerate(ensemble.plateau)
            )
            ensemble = _without_patience(ensemble.replace(best=best, plateau=plateau), patience)
            yield ensemble, EnsembleReport(epoch=ensemble.epoch, members=reports, failed=failed)

    return epochs(ensemble)


def _train(
    ensemble: EnsembleState,
    train: Batches,
    step: Callable[[EnsembleState, Any], tuple[EnsembleState, Metrics]],
    on_batch: OnBatch,
) -> EnsembleState:
    for batch in checked_batches(train, ensemble.keys[0], ensemble.epoch, ensemble.batch):
        ensemble, metrics = step(ensemble, batch)
        on_batch(ensemble, metrics)
    check_has_batch(ensemble)
    return ensemble


def _evaluate(
    ensemble: EnsembleState,
    valid: Batches,
    eval_step: Callable[[EnsembleState, Any], Metrics],
    on_batch: Callable[[], None],
) -> Metrics:
    sums: dict[str, Sum] = {}
    for index, batch in enumerate(valid(ensemble.keys[0], ensemble.epoch - 1, 0)):
        sums = add_metrics(sums, eval_step(ensemble.replace(batch=index), batch))
        on_batch()
    return sums


def _rates(schedules: list[float | Schedule], plateaus: Sequence[Plateau], epoch: int, step: int) -> list[float]:
    pairs = zip(schedules, plateaus, strict=True)
    return [value_at(each, epoch=epoch, step=step, plateau=plateau) for each, plateau in pairs]


def _step_at_its_rate(
    step: EnsembleStep, rates: Callable[[int], list[float]], ensemble: EnsembleState, batch: Any
) -> tuple[EnsembleState, Metrics]:
    return step(ensemble, batch, lr=_one_or_each(rates(ensemble.step), ensemble))


def _one_or_each(rates: list[float], ensemble: EnsembleState) -> float | Tensor:
    if len(set(rates)) == 1:
        return rates[0]
    return torch.tensor(rates, dtype=torch.float64, device=ensemble.active.device)


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
