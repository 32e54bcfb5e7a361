"""The logs of a run by name: one value an epoch, under the names of `metrics.jsonl`, dwi_ml's or short ones."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dwiml_func._checks import one_line, truncated_repr
from dwiml_func.core.report import EpochReport
from dwiml_func.writers.jsonl import epoch_row
from dwiml_func.writers.npy import epoch_arrays

__all__ = ["check_known", "find_log", "log_names", "logs_of"]

Logs = Mapping[str, NDArray[np.float64]]

_SHORT = {"lr": "learning_rate", "lag": "tracking_window_lag", "angle": "angular_error", "speed": "points_per_second"}
_PREFIXES = ("", "valid_", "train_")
_NOT_LOGS = {"epoch", "is_best", "points_in_train_minutes"}


def logs_of(history: Sequence[EpochReport]) -> Logs:
    """Arrays (E,) float64 by name, a value for each epoch; NaN where an epoch lacks it."""
    rows = [epoch_row(report) | {"points_per_second": report.points_per_second} for report in history]
    names = dict.fromkeys(name for row in rows for name in row if name not in _NOT_LOGS)
    numbers = {name: [row.get(name) for row in rows] for name in names}
    logs = {name: np.array([math.nan if v is None else v for v in values]) for name, values in numbers.items()}
    return {name: values.astype(np.float64) for name, values in logs.items()}


def log_names(history: Sequence[EpochReport]) -> list[str]:
    """The full names."""
    return list(logs_of(history))


def find_log(history: Sequence[EpochReport], name: str) -> NDArray[np.float64] | None:
    """The log of a name; None where the run has none.

    A metric's own name, such as `loss`, means that of the validation, or else of the training; `lr`, `lag`, `angle` and
    `speed` are short names. dwi_ml's names of files are known too, with or without `.npy`.
    """
    logs, dwi_ml = logs_of(history), epoch_arrays(history)
    if (file := name.removesuffix(".npy")) in dwi_ml:
        return dwi_ml[file]
    for own in dict.fromkeys((name, name.replace("-", "_"))):
        full = _SHORT.get(own, own)
        found = [logs[prefix + full] for prefix in _PREFIXES if prefix + full in logs]
        if found:
            return found[0]
    return None


def check_known(name: str, known: Collection[str], *, what: str, hint: str = "") -> None:
    """Raise ValueError for a name that is not known, with those that are near."""
    if name in known:
        return
    plain = name.replace("-", "_")
    with_word = [each for each in known if plain in each.split("_")]
    near = with_word[:3] or difflib.get_close_matches(plain, known, n=3, cutoff=0.5)
    listed = (
        f"Did you mean {' or '.join(near)}?" if near else f"Known are {one_line(', '.join(known), max_length=200)}."
    )
    raise ValueError(f"{what}. Received: {truncated_repr(name)}. {listed}{hint}")
