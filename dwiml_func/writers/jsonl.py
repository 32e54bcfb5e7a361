"""`logs/metrics.jsonl`: one JSON object an epoch, for pandas, jq and the like."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dwiml_func.core.loop import EpochReport
from dwiml_func.files.atomic import atomic_write
from dwiml_func.writers.writer import Writer, from_history

__all__ = ["epoch_row", "jsonl"]


def jsonl(directory: str | Path) -> Writer:
    """A writer of `logs/metrics.jsonl`, written anew with every report.

    Args:
        directory: the experiment.

    Returns:
        The writer. It raises OSError when the disk is full, or the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write = jsonl(directory)
        ...     for state, report in train_and_validate(state, ...):  # doctest: +SKIP
        ...         write(report)
    """
    return from_history(partial(_write, Path(directory)))


def epoch_row(report: EpochReport) -> dict[str, float | int | bool | None]:
    """An epoch as a flat row.

    Args:
        report: the epoch's report.

    Returns:
        Values by name: `epoch`, `learning_rate`, `train_*` and `valid_*` with the metrics' names, `num_batches`,
        `num_points`, `best_epoch`, `best_loss`, `is_best`, durations in minutes, and `points_in_train_minutes`, those
        of `num_points` that came within `train_minutes`: fewer where the epoch was resumed. None stands for what is not
        finite, which JSON has no word for.

    Example:
        >>> epoch_row(report)["train_loss"]  # doctest: +SKIP
        0.5
    """
    row = {
        "epoch": report.epoch,
        "learning_rate": report.learning_rate,
        **{f"train_{name}": value for name, value in report.train.items()},
        **{f"valid_{name}": value for name, value in report.valid.items()},
        "num_batches": report.num_batches,
        "num_points": report.num_points,
        "best_epoch": report.best.epoch,
        "best_loss": report.best.value,
        "is_best": report.is_best,
        "train_minutes": report.train_minutes,
        "valid_minutes": report.valid_minutes,
        "points_in_train_minutes": report.num_points if report.timed_points is None else report.timed_points,
    }
    return {name: value if value is not None and math.isfinite(value) else None for name, value in row.items()}


def _write(directory: Path, history: Sequence[EpochReport]) -> None:
    logs = directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(epoch_row(report), allow_nan=False) + "\n" for report in history]
    atomic_write(logs / "metrics.jsonl", "".join(lines), flush=False)
