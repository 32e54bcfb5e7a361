"""The options of a training loop, their checks, and how they judge an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dwiml_func._checks import check_choice, check_takes
from dwiml_func.core.batch_source import Batches
from dwiml_func.core.early_stopping import Best, Mode, should_stop, update_best
from dwiml_func.core.interval import validation_interval
from dwiml_func.core.metrics import read_means
from dwiml_func.core.report import EpochReport, Validation, check_monitor
from dwiml_func.core.state import TrainState
from dwiml_func.optim.schedules import check_schedule
from dwiml_func.types import Metrics, Schedule

__all__ = ["LoopOptions", "OnReport", "Track"]

OnReport = Callable[[TrainState, EpochReport], object]
"""Called with a state and its report."""


class Track(Protocol):
    """Gives back the same batches and may show a progress bar; `label` is "training" or "validation"."""

    def __call__(self, batches: Iterable[Any], label: str, *, epoch: int, start_batch: int) -> Iterable[Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """What `train_and_validate`, `run_epoch` or the loop of an ensemble was called with; see `train_and_validate`."""

    train: Batches
    step: Callable[..., Any]
    valid: Batches | None
    eval_step: Callable[..., Any] | None
    learning_rate: float | Schedule
    max_epochs: int | None
    patience: int | None
    patience_delta: float
    monitor: str
    mode: Mode
    validate_every: int | str
    on_batch: Callable[..., object] | None
    on_trained: OnReport | None = None
    keep_unvalidated: bool = False
    interrupt: Callable[[], bool] | None
    track: Track | None = None
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        """Raise ValueError for options that are out of range, TypeError for functions that the loop cannot call."""
        if (self.valid is None) != (self.eval_step is None):
            raise ValueError("Expected valid and eval_step together. Received only one of them.")
        check_choice("mode", self.mode, ("min", "max"))
        validation_interval(self.validate_every)
        if not (self.max_epochs is None or self.max_epochs == math.inf or _is_count(self.max_epochs)):
            raise ValueError(f"Expected max_epochs of at least 1. Received: {self.max_epochs!r}")
        if not (self.patience is None or _is_count(self.patience)):
            raise ValueError(f"Expected patience of at least 1, or None. Received: {self.patience!r}")
        if not (math.isfinite(self.patience_delta) and self.patience_delta >= 0):
            raise ValueError(f"Expected a finite patience_delta of at least 0. Received: {self.patience_delta}")
        batches = "(key, epoch, start_batch) that returns batches, such as from_loader(lambda: loader)"
        step_form = "(state, batch, *, lr), such as partial(train_step, loss_fn=..., optimizer=...)"
        for name, form, num_args, options in (
            ("train", batches, 3, {}),
            ("valid", batches, 3, {}),
            ("step", step_form, 2, {"lr": 0.1}),
            ("eval_step", "(state, batch), such as partial(eval_step, loss_fn=...)", 2, {}),
            ("on_batch", "(state, sums)", 2, {}),
            ("interrupt", "()", 0, {}),
        ):
            if (function := getattr(self, name)) is not None:
                check_takes(name, form, function, *[None] * num_args, **options)
        for schedule in self.learning_rate if isinstance(self.learning_rate, list) else [self.learning_rate]:
            check_schedule("learning_rate", schedule)

    def judge(
        self,
        best: Best,
        *,
        epoch: int,
        batch: int,
        rates: Sequence[float],
        train_sums: Metrics,
        earlier_sums: Metrics,
        valid_sums: Metrics,
        minutes: tuple[float, float],
        validations: tuple[Validation, ...],
    ) -> EpochReport:
        """Report an epoch from its sums: the means, whether it is the best epoch, whether the run ends.

        `rates` are the learning rates of the steps, or the one of all. `earlier_sums` is the part of `train_sums` from
        before the clock started. An epoch without validation is not judged where the run has validations. With `batch`,
        a validation within the epoch is reported.
        """
        train_means, valid_means = read_means(train_sums), read_means(valid_sums)
        if "loss" not in train_sums:
            raise ValueError(
                "Expected a step that adds its sums to state.sums, loss among them. Received: one without."
            )
        num_points = float(train_sums["loss"].weight)
        means = train_means if self.valid is None else valid_means
        if means:
            check_monitor(self.monitor, means)
            best = update_best(
                best, means[self.monitor], epoch, patience_delta=self.patience_delta, mode=self.mode, batch=batch
            )
            if batch:
                validations = (*validations, Validation(batch, valid_means, rates[-1]))
        is_last = self.max_epochs is not None and epoch >= self.max_epochs and not batch
        return EpochReport(
            epoch=epoch,
            learning_rate=rates[-1],
            train=train_means,
            valid=valid_means,
            num_batches=int(train_sums["grad_norm"].weight) if "grad_norm" in train_sums else 0,
            num_points=num_points,
            best=best,
            is_best=(best.epoch, best.batch) == (epoch, batch),
            stop="patience" if should_stop(best, self.patience) else "max_epochs" if is_last else None,
            train_minutes=minutes[0],
            valid_minutes=minutes[1],
            timed_points=num_points - float(earlier_sums["loss"].weight) if earlier_sums else None,
            learning_rate_min=min(rates) if len(set(rates)) > 1 else None,
            learning_rate_max=max(rates) if len(set(rates)) > 1 else None,
            batch=batch,
            monitor=self.monitor,
            validations=validations,
        )


def _is_count(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and int(value) >= 1
