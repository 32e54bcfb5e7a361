"""Reports of epochs whose numbers are known."""

from __future__ import annotations

from typing import Any

from dwiml_func import EpochReport
from dwiml_func.core.early_stopping import Best


def report(epoch: int, **changes: Any) -> EpochReport:
    """The report of an epoch: losses fall as 1 / epoch, and every epoch is the best so far."""
    values: dict[str, Any] = {
        "epoch": epoch,
        "learning_rate": 0.1 / epoch,
        "train": {"loss": 1.0 / epoch, "unclipped_grad_norm": 5.0 * epoch, "grad_norm": 1.0, "angular_error": 30.0},
        "valid": {"loss": 2.0 / epoch, "angular_error": 40.0},
        "num_batches": 3,
        "num_points": 30.0,
        "best": Best(2.0 / epoch, epoch, 0),
        "is_best": True,
        "stop": None,
        "train_minutes": 0.25 * epoch,
        "valid_minutes": 0.125,
    }
    return EpochReport(**values | changes)
