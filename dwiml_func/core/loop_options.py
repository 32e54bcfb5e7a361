"""The options of a training loop, and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from dwiml_func._checks import check_takes
from dwiml_func.core.batch_source import Batches
from dwiml_func.core.early_stopping import Mode
from dwiml_func.core.epoch import EvalStep, OnBatch
from dwiml_func.core.interval import validation_interval
from dwiml_func.core.rates import Step
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.types import Schedule

__all__ = ["LoopOptions", "OnReport", "Track", "check_options"]

OnReport = Callable[[TrainState, EpochReport], object]
"""Called with a state and its report."""


class Track(Protocol):
    """Gives back the same batches and may show a progress bar; `label` is "training" or "validation"."""

    def __call__(self, batches: Iterable[Any], label: str, *, epoch: int, start_batch: int) -> Iterable[Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """What `train_and_validate` and `run_epoch` were called with, checked; see `train_and_validate`."""

    train: Batches
    step: Step
    valid: Batches | None
    eval_step: EvalStep | None
    learning_rate: float | Schedule
    max_epochs: int | None
    patience: int | None
    patience_delta: float
    monitor: str
    mode: Mode
    validate_every: int | str
    on_batch: OnBatch | None
    on_trained: OnReport | None = None
    keep_unvalidated: bool = False
    interrupt: Callable[[], bool] | None
    track: Track | None
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        check_options(
            train=self.train, step=self.step, valid=self.valid, eval_step=self.eval_step, on_batch=self.on_batch,
            interrupt=self.interrupt, mode=self.mode, validate_every=self.validate_every, max_epochs=self.max_epochs,
            patience=self.patience, patience_delta=self.patience_delta,
        )  # fmt: skip


def check_options(
    *,
    train: Any = None,
    step: Any = None,
    valid: Any = None,
    eval_step: Any = None,
    on_batch: Any = None,
    interrupt: Any = None,
    mode: str = "min",
    validate_every: int | str = 1,
    max_epochs: float | None,
    patience: int | None,
    patience_delta: float,
) -> None:
    """Raise ValueError for options of a loop that are out of range, TypeError for functions that it cannot call."""
    if (valid is None) != (eval_step is None):
        raise ValueError("Expected valid and eval_step together. Received only one of them.")
    if mode not in ("min", "max"):
        raise ValueError(f"Expected mode 'min' or 'max'. Received: {mode!r}")
    validation_interval(validate_every)
    if not (max_epochs is None or max_epochs == math.inf or _is_count(max_epochs)):
        raise ValueError(f"Expected max_epochs of at least 1. Received: {max_epochs!r}")
    if not (patience is None or _is_count(patience)):
        raise ValueError(f"Expected patience of at least 1, or None. Received: {patience!r}")
    if not (math.isfinite(patience_delta) and patience_delta >= 0):
        raise ValueError(f"Expected a finite patience_delta of at least 0. Received: {patience_delta}")
    batches = "(key, epoch, start_batch) that returns batches, such as from_loader(lambda: loader)"
    step_form = "(state, batch, *, lr), such as partial(train_step, loss_fn=..., optimizer=...)"
    for name, form, function, num_args, options in (
        ("train", batches, train, 3, {}),
        ("valid", batches, valid, 3, {}),
        ("step", step_form, step, 2, {"lr": 0.1}),
        ("eval_step", "(state, batch), such as partial(eval_step, loss_fn=...)", eval_step, 2, {}),
        ("on_batch", "(state, sums)", on_batch, 2, {}),
        ("interrupt", "()", interrupt, 0, {}),
    ):
        if function is not None:
            check_takes(name, form, function, *[None] * num_args, **options)


def _is_count(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and int(value) >= 1
