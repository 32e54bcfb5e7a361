"""Checks of the options of a training loop."""

from __future__ import annotations

import math

from dwiml_func.core.interval import validation_interval

__all__ = ["check_options"]


def check_options(
    *,
    valid: object = None,
    eval_step: object = None,
    mode: str = "min",
    validate_every: int | str = 1,
    max_epochs: int | None,
    patience: int | None,
    patience_delta: float,
) -> None:
    """Raise ValueError for options of a loop that are out of range."""
    if (valid is None) != (eval_step is None):
        raise ValueError("Expected valid and eval_step together. Received only one of them.")
    if mode not in ("min", "max"):
        raise ValueError(f"Expected mode 'min' or 'max'. Received: {mode!r}")
    validation_interval(validate_every)
    if max_epochs is not None and max_epochs < 1:
        raise ValueError(f"Expected max_epochs of at least 1. Received: {max_epochs}")
    if patience is not None and patience < 1:
        raise ValueError(f"Expected patience of at least 1, or None. Received: {patience}")
    if not (math.isfinite(patience_delta) and patience_delta >= 0):
        raise ValueError(f"Expected a finite patience_delta of at least 0. Received: {patience_delta}")
