"""Checks of the options of a training loop."""

from __future__ import annotations

import math
from typing import Any

from dwiml_func._checks import check_takes
from dwiml_func.core.interval import validation_interval

__all__ = ["check_options"]


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
