"""Logs under dwi_ml's file names, so that its plotting scripts read our runs."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote

import numpy as np

from dwiml_func.core.report import EpochReport
from dwiml_func.files.atomic import atomic_write
from dwiml_func.writers.writer import Writer, from_history

__all__ = ["epoch_arrays", "monitor_name", "npy"]

_MAX_NAME = 200  # bytes of a file's name without its suffix
_NAMES = {
    ("train", "grad_norm"): "grad_norm_monitor",
    ("train", "unclipped_grad_norm"): "unclipped_grad_norm_monitor",
    ("valid", "loss"): "valid_local_loss_monitor",
    ("valid", "tracking_mean_final_distance"): "tracking_mean_final_distance_monitor",
    ("valid", "tracking_connectivity_score"): "tracking_connectivity_score_monitor",
}


def npy(directory: str | Path) -> Writer:
    """A writer of `logs/*.npy` and `best_epoch_losses.json`; every report rewrites them.

    A slash in a metric's name, as in "acc/left", is written as %2F in the file's name; of a name that is too long for a
    file, the first part and a digest.

    Args:
        directory: the experiment.

    Returns:
        The writer. It raises OSError if the disk is full or the folder is not writable.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write = npy(directory)
        ...     for state, report in train_and_validate(state, ...):  # doctest: +SKIP
        ...         write(report)
    """
    return from_history(partial(_write, Path(directory)))


def epoch_arrays(history: Sequence[EpochReport]) -> dict[str, np.ndarray]:
    """One (num_epochs,) float64 array per metric, by file name without `.npy`; NaN where an epoch lacks the metric.

    Losses are means weighted by points, gradient norms means over batches, durations in minutes, angular errors in
    degrees.
    """
    arrays = {
        "learning_rate_per_epoch": [report.learning_rate for report in history],
        "training_time_monitor_duration": [report.train_minutes for report in history],
        "validation_time_monitor_duration": [report.valid_minutes for report in history],
    }
    for subset in ("train", "valid"):
        means: list[dict[str, float]] = [getattr(report, subset) for report in history]
        for metric in sorted({name for mean in means for name in mean}):
            arrays[f"{monitor_name(subset, metric)}_per_epoch"] = [mean.get(metric, np.nan) for mean in means]
    return {name: np.array(values, dtype=np.float64) for name, values in arrays.items()}


def monitor_name(subset: str, metric: str) -> str:
    """dwi_ml's name for a metric of a subset, "train" or "valid"; one made after its pattern where it has none."""
    return _NAMES.get((subset, metric), f"{subset}_{metric}_monitor")


def _write(directory: Path, history: Sequence[EpochReport]) -> None:
    logs = directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for name, array in epoch_arrays(history).items():
        content = io.BytesIO()
        np.save(content, array)
        atomic_write(logs / _file_name(name), content.getvalue(), flush=False)
    if history and history[-1].best.epoch is not None:
        best = history[history[-1].best.epoch - 1]
        losses = {"train_loss": best.train["loss"], "valid_loss": best.best_means.get("loss") if best.valid else None}
        atomic_write(directory / "best_epoch_losses.json", json.dumps(losses, indent=4) + "\n", flush=False)


def _file_name(name: str) -> str:
    quoted = quote(name, safe=" ")
    if len(quoted) > _MAX_NAME:
        quoted = f"{quoted[: _MAX_NAME - 9]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{quoted}.npy"
