"""`dwiml-func runs`."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from dwiml_func._checks import aligned
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.experiment.comparison.run_values import best_of_groups, check_names, run_value, sorted_runs
from dwiml_func.experiment.comparison.runs import RunOverview, list_runs
from dwiml_func.experiment.training_config import WINDOW_LAG
from dwiml_func.files.json import null_if_not_finite

__all__ = ["Options", "format_runs", "run"]

_WIDTH = 100  # columns of text below the table
_HEADINGS = {
    "name": "name",
    "state": "state",
    "epochs": "epochs",
    "loss": "best loss",
    "epoch": "of epoch",
    "angle": "angle deg",
    "lag": "lag mm",
    "valid": "valid %",
    "duration": "duration",
    "change": "last change",
    "chosen": "chosen by",
}
_LEFT = ("name", "state")


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Print a table of the experiments in a folder, with the best member of each ensemble and sweep: the epochs done,
    the loss of the best epoch, the mean angular error of the validation in that epoch, in degrees, its window lag, the
    share of valid streamlines that the best model tracks (by protocol: continue / free / core), and the duration of the
    epochs. The angular error is over all points; the summary of a training leaves out points without a previous
    direction. "running" means that a process is training it now. Runs of scripts, saved with dwiml_func.save, are
    listed too: "unfinished" until their last epoch.

    Example: dwiml-func runs experiments --sort tracking --show lr,dg-key
    """

    experiments_path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENTS_PATH")]
    """Folder of all experiments, or a sweep."""
    sort: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Sort by a column of --json, an option, a log at the best epoch, or tracking, the mean share of valid streamlines
    (or tracking.PROTOCOL): the best first, which is the highest of shares, the lowest of all else. None: by name."""
    reverse: bool = False
    """With --sort: the best last."""
    show: Annotated[str | None, tyro.conf.arg(metavar="NAME,NAME,...")] = None
    """Show these too, named as for --sort, such as lr,dg-key,valid_loss."""
    members: bool = False
    """List all members of ensembles and sweeps, as --json and --csv do."""
    json: bool = False
    """Print only a JSON list with one object per experiment."""
    csv: bool = False
    """Print only a CSV table."""


def run(options: Options) -> int:
    """Print the table."""
    shown = [name for name in (options.show or "").replace(" ", "").split(",") if name]
    if options.json and options.csv:
        raise ValueError("Expected --json or --csv. Received: both.")
    runs = list_runs(options.experiments_path)
    if runs:
        check_names(runs, shown, option="--show")
        check_names(runs, [] if options.sort is None else [options.sort], option="--sort")
    is_table = not (options.json or options.csv)
    if is_table and not options.members:
        runs = best_of_groups(runs, options.sort)
    if options.sort is not None:
        runs = sorted_runs(runs, options.sort, is_reversed=options.reverse)
    if options.json:
        rows = [run.to_row() | {name: run_value(run, name) for name in shown} for run in runs]
        print(json.dumps(null_if_not_finite(rows), indent=2))
    elif options.csv:
        print(_csv(runs, shown), end="")
    else:
        print(format_runs(runs, shown=shown) if runs else f"No experiments in {options.experiments_path}.")
    return 0


def format_runs(runs: Sequence[RunOverview], *, shown: Sequence[str] = ()) -> str:
    """A table with full names; below it, what is corrupt. `shown` names more columns."""
    cells = [_cells(run) | {f"+{name}": _text(run_value(run, name)) for name in shown} for run in runs]
    headings = {"name": "name", **{f"+{name}": name for name in shown}, **_HEADINGS}
    if all(run.monitor == "loss" for run in runs):
        del headings["chosen"]
    for name in ("lag", "valid"):
        if all(row[name] == "-" for row in cells):
            del headings[name]
    left = [number for number, name in enumerate(headings) if name in _LEFT]
    lines = aligned([[row[name] for name in headings] for row in (headings, *cells)], left=left)
    problems = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    wrapped = [
        textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for text in problems
    ]
    return "\n".join([*lines, *([""] if wrapped else []), *wrapped])


def _csv(runs: Sequence[RunOverview], shown: Sequence[str]) -> str:
    """A table for spreadsheets: the columns of --json, a column for each protocol."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        row = run.to_row()
        shares = {f"valid_{protocol}": share for protocol, share in (row.pop("valid_share") or {}).items()}
        row["problems"] = " ".join(row["problems"])
        rows.append(row | shares | {name: run_value(run, name) for name in shown})
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    table = csv.DictWriter(text, [*names], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _cells(run: RunOverview) -> dict[str, str]:
    shares, has_column = run.valid_share or {}, run.monitor in ("loss", "angular_error", WINDOW_LAG)
    return {
        "name": run.name if run.name.isprintable() else ascii(run.name),
        "state": run.state + (" (!)" if run.problems and run.state != "corrupt" else ""),
        "epochs": f"{run.epochs}/{'?' if run.max_epochs is None else run.max_epochs}",
        "loss": "-" if run.best_loss is None else f"{run.best_loss:.4f}",
        "epoch": "-" if run.best_epoch is None else str(run.best_epoch),
        "angle": "-" if run.angular_error_deg is None else f"{run.angular_error_deg:.2f}",
        "lag": "-" if run.window_lag_mm is None else f"{run.window_lag_mm:.2f}",
        "valid": " / ".join(f"{100 * share:.0f}" for share in shares.values()) or "-",
        "duration": _duration(run.minutes),
        "change": f"{run.last_change:%Y-%m-%d %H:%M}",
        "chosen": run.monitor if run.best_value is None or has_column else f"{run.monitor} {run.best_value:.4f}",
    }


def _text(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.6g}"


def _duration(minutes: float) -> str:
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    return f"{minutes:.1f} min" if minutes < 60 else f"{minutes / 60:.1f} h"
