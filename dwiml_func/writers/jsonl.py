"""`logs/metrics.jsonl`: one JSON object per epoch, for pandas, jq and others; and `logs/steps.jsonl`, one per step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dwiml_func.core.report import EpochReport
from dwiml_func.files.atomic import atomic_write
from dwiml_func.files.json import null_if_not_finite
from dwiml_func.writers.steps import ScalarLines
from dwiml_func.writers.writer import StepWriter, WithScalars, from_history

__all__ = ["epoch_row", "jsonl"]


def jsonl(directory: str | Path) -> StepWriter:
    """A writer of `logs/metrics.jsonl`, which every report rewrites, and of `logs/steps.jsonl`, for values of steps.

    Args:
        directory: the experiment.

    Returns:
        The writer. It raises OSError if the disk is full or the folder is not writable.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write = jsonl(directory)
        ...     for state, report in train_and_validate(state, ...):  # doctest: +SKIP
        ...         write(report)
    """
    return WithScalars(from_history(partial(_write, Path(directory))), ScalarLines(directory))


def epoch_row(report: EpochReport) -> dict[str, float | int | bool | None]:
    """An epoch as a flat row, durations in minutes; None replaces what is not finite, which JSON cannot express.

    `points_in_train_minutes` is the number of points trained in `train_minutes`: fewer than `num_points` in a resumed
    epoch.
    """
    row = {
        "epoch": report.epoch,
        "learning_rate": report.learning_rate,
        **_range(report),
        **{f"train_{name}": value for name, value in report.train.items()},
        **{f"valid_{name}": value for name, value in report.valid.items()},
        "num_batches": report.num_batches,
        "num_points": report.num_points,
        "best_epoch": report.best.epoch,
        f"best_{report.monitor}": report.best.value,
        "is_best": report.is_best,
        "train_minutes": report.train_minutes,
        "valid_minutes": report.valid_minutes,
        "points_in_train_minutes": report.num_points if report.timed_points is None else report.timed_points,
    }
    return null_if_not_finite(row)


def _range(report: EpochReport) -> dict[str, float]:
    ends = {"learning_rate_min": report.learning_rate_min, "learning_rate_max": report.learning_rate_max}
    return {name: rate for name, rate in ends.items() if rate is not None}


def _write(directory: Path, history: Sequence[EpochReport]) -> None:
    logs = directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(epoch_row(report)) + "\n" for report in history]
    atomic_write(logs / "metrics.jsonl", "".join(lines), flush=False)
