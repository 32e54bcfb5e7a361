"""Values of runs by name, for tables and figures: what an overview has, scores of tracking, options, and logs.

A log has a value for each epoch, under the names of `metrics.jsonl`, dwi_ml's or short ones.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dwiml_func._checks import one_line, truncated_repr
from dwiml_func.core.early_stopping import Mode
from dwiml_func.core.report import EpochReport
from dwiml_func.experiment.comparison.compare import flatten
from dwiml_func.experiment.comparison.run_labels import loss_kind
from dwiml_func.experiment.comparison.runs import RunOverview
from dwiml_func.writers.jsonl import epoch_row
from dwiml_func.writers.npy import epoch_arrays

__all__ = [
    "best_first",
    "best_of_groups",
    "check_known",
    "check_names",
    "find_log",
    "log_names",
    "logs_of",
    "mean_share",
    "run_value",
    "sorted_runs",
]

Value = float | str | None
Logs = Mapping[str, NDArray[np.float64]]

_SHORT = {"lr": "learning_rate"}
_SHORT_LOGS = {
    "lr": "learning_rate",
    "lag": "tracking_window_lag",
    "angle": "angular_error",
    "speed": "points_per_second",
}
_PREFIXES = ("", "valid_", "train_")
_NOT_LOGS = {"epoch", "is_best", "points_in_train_minutes"}


def run_value(run: RunOverview, name: str) -> Value:
    """The value of a name; None where the run has none.

    A name is, in this order: a column of the overview, `tracking` (the mean share of valid streamlines over the
    protocols) or `tracking.PROTOCOL[.SCORE]`, an option (`dg-key`, `model.dg_key` or `lr`), a log at the best epoch.
    """
    name = _SHORT.get(name, name)
    plain = name.replace("-", "_")
    row = run.to_row()
    if plain in row and not isinstance(row[plain], dict | list):
        return row[plain]
    if name == "tracking" or name.startswith("tracking."):
        return _score(run, name)
    options = flatten(run.record.config)
    found = [value for full, value in options.items() if plain in (full, full.rpartition(".")[2])]
    if found:
        value = found[0]
        return (
            " ".join(map(str, value)) if isinstance(value, list) else str(value) if isinstance(value, bool) else value
        )
    log = find_log(run.record.history, name)
    if log is None or run.best_epoch is None:
        return None
    value = float(log[run.best_epoch - 1])
    return value if math.isfinite(value) else None


def check_names(runs: Sequence[RunOverview], names: Sequence[str], *, option: str) -> None:
    """Raise ValueError for a name that no run has a value of and that is no option of any."""
    for name in names:
        plain = _SHORT.get(name, name).replace("-", "_")
        known = dict.fromkeys(
            each
            for run in runs
            for each in (
                *("tracking", *(f"tracking.{protocol}" for protocol in run.record.scores.get("model", {}))),
                *(key for key, value in run.to_row().items() if not isinstance(value, dict | list)),
                *(full.rpartition(".")[2] for full in flatten(run.record.config)),
                *log_names(run.record.history),
            )
        )
        if any(run_value(run, name) is not None for run in runs) or plain in known:
            continue
        check_known(name, [*known], what=f"{option}: expected a column, an option or a log of these runs")


def sorted_runs(runs: Sequence[RunOverview], name: str, *, is_reversed: bool = False) -> list[RunOverview]:
    """Runs by the value of a name, the best first: shares from high to low, all else from low to high.

    Runs without a value are last; for `tracking` these are in the order of their window lag.
    """
    if name == "tracking":
        runs = sorted(runs, key=lambda run: math.inf if run.window_lag_mm is None else run.window_lag_mm)
    known = [run for run in runs if run_value(run, name) is not None]
    is_descending = (name == "tracking" or name.startswith("tracking.")) and "lag" not in name
    ordered = sorted(known, key=lambda run: _order(run_value(run, name)), reverse=is_descending != is_reversed)
    return [*ordered, *(run for run in runs if run_value(run, name) is None)]


def best_of_groups(runs: Sequence[RunOverview], name: str | None = None) -> list[RunOverview]:
    """Runs with only the best member of each ensemble and sweep, which says so: by `name`, else as
    `best_first` says."""
    shown: list[RunOverview] = []
    for run in runs:
        if run.group is None:
            shown.append(run)
        elif not any(other.group == run.group for other in shown):
            members = [member for member in runs if member.group == run.group]
            best = (sorted_runs(members, name) if name else best_first(members)[0])[0]
            shown.append(replace(best, name=f"{best.name} (best of {len(members)})"))
    return shown


def best_first(runs: Sequence[RunOverview]) -> tuple[list[RunOverview], str]:
    """Members of an ensemble or a sweep, and by what they are in this order: by how they track, where that is recorded;
    else as they choose their best epochs, unless that is by losses that cannot be compared: then by lag or angle."""
    if any(mean_share(run) is not None for run in runs):
        return sorted_runs(runs, "tracking"), "valid streamlines"
    kinds = [loss_kind(run.record.config) for run in runs]
    if any(kind != kinds[0] for kind in kinds) and any(run.monitor == "loss" for run in runs):
        if any(run.window_lag_mm is not None for run in runs):
            return sorted_runs(runs, "window_lag_mm"), "window lag"
        return sorted_runs(runs, "angular_error_deg"), "angular error"
    return sorted(runs, key=_chosen), runs[0].monitor if runs else "loss"


def mean_share(run: RunOverview) -> float | None:
    """The mean share of valid streamlines over the protocols; None where it was not measured."""
    shares = list((run.valid_share or {}).values())
    return sum(shares) / len(shares) if shares else None


def _chosen(run: RunOverview) -> float:
    mode: Mode = run.record.config.get("training", {}).get("monitor_mode", "min")
    if run.best_value is None or not math.isfinite(run.best_value):
        return math.inf
    return -run.best_value if mode == "max" else run.best_value


def _score(run: RunOverview, name: str) -> Value:
    if name == "tracking":
        return mean_share(run)
    _, protocol, *score = name.split(".")
    value = run.record.scores.get("model", {}).get(protocol, {}).get(score[0] if score else "valid")
    return value if isinstance(value, int | float) else None


def _order(value: Value) -> tuple[bool, float, str]:
    """Numbers before words, also those that are written as words."""
    try:
        return (False, float(value or 0), "")
    except ValueError:
        return (True, 0.0, str(value))


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
        full = _SHORT_LOGS.get(own, own)
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
