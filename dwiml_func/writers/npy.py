"""Logs under the reference's file names, so that its plotting scripts read our runs."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from dwiml_func.core.loop import EpochReport
from dwiml_func.files.atomic import atomic_write
from dwiml_func.writers.writer import Writer, from_history

__all__ = ["epoch_arrays", "npy"]


def epoch_arrays(history: Sequence[EpochReport]) -> dict[str, np.ndarray]:
    """One array a metric, one value an epoch.

    Args:
        history: the reports of all epochs.

    Returns:
        (num_epochs,) float64 arrays by file name without its ending. NaN where an epoch lacks the metric. Losses are
        means weighted by points, gradient norms (before and after clipping) means over batches, durations in minutes,
        angular errors in degrees. The names are those of the reference, where it has the metric.

    Example:
        >>> sorted(epoch_arrays([]))[:2]
        ['learning_rate_per_epoch', 'training_time_monitor_duration']
    """
    arrays = {
        "learning_rate_per_epoch": [report.learning_rate for report in history],
        "training_time_monitor_duration": [report.train_minutes for report in history],
        "validation_time_monitor_duration": [report.valid_minutes for report in history],
    }
    names = {"loss": "train_loss_monitor"} | {name: f"{name}_monitor" for name in ("unclipped_grad_norm", "grad_norm")}
    for metric in _metrics(report.train for report in history):
        name = names.get(metric, f"train_{metric}_monitor")
        arrays[f"{name}_per_epoch"] = [report.train.get(metric, np.nan) for report in history]
    for metric in _metrics(report.valid for report in history):
        name = "valid_local_loss_monitor" if metric == "loss" else f"valid_{metric}_monitor"
        arrays[f"{name}_per_epoch"] = [report.valid.get(metric, np.nan) for report in history]
    return {name: np.array(values, dtype=np.float64) for name, values in arrays.items()}


def npy(directory: str | Path) -> Writer:
    """A writer of `logs/*.npy` and `best_epoch_losses.json`, written anew with every report.

    Args:
        directory: the experiment.

    Returns:
        The writer. It raises OSError when the disk is full, or the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write = npy(directory)
        ...     for state, report in train_and_validate(state, ...):  # doctest: +SKIP
        ...         write(report)
    """
    return from_history(partial(_write, Path(directory)))


def _write(directory: Path, history: Sequence[EpochReport]) -> None:
    logs = directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for name, array in epoch_arrays(history).items():
        content = io.BytesIO()
        np.save(content, array)
        atomic_write(logs / f"{name}.npy", content.getvalue(), flush=False)
    if history and history[-1].best.epoch is not None:
        best = history[history[-1].best.epoch - 1]
        losses = {"train_loss": best.train["loss"], "valid_loss": best.valid.get("loss")}
        atomic_write(directory / "best_epoch_losses.json", json.dumps(losses, indent=4) + "\n", flush=False)


def _metrics(means: object) -> list[str]:
    return sorted({name for mean in means for name in mean})  # type: ignore[attr-defined]
