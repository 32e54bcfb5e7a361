"""Values of runs by name, for tables: what an overview has, scores of tracking, options, and logs at the best epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from dwiml_func.core.early_stopping import Mode
from dwiml_func.experiment.comparison.compare import flatten
from dwiml_func.experiment.comparison.log_values import check_known, find_log, log_names
from dwiml_func.experiment.comparison.run_labels import loss_kind
from dwiml_func.experiment.comparison.runs import RunOverview

__all__ = ["best_first", "best_of_groups", "check_names", "mean_share", "run_value", "sorted_runs"]

Value = float | str | None

_SHORT = {"lr": "learning_rate"}


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
