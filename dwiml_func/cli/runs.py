"""`dwiml-func runs`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.experiment.runs import RunOverview, list_runs
from dwiml_func.files.json import null_if_not_finite

__all__ = ["Options", "format_runs", "run"]

_WIDTH, _LEAST = 100, 12  # columns of the table, and of a name where a metric's name takes the space
_HEADINGS = ("name", "state", "epochs", "best loss", "of epoch", "angle deg", "duration", "last change", "chosen by")


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Print a table of the experiments in a folder, including members of ensembles: the epochs done, the loss of the
    best epoch, the mean angular error of the validation in that epoch, in degrees, and the duration of the epochs. The
    angular error is over all points; the summary of a training leaves out points without a previous direction.
    "running" means that a process is training it now. Runs of
    scripts, saved with dwiml_func.save, are listed too: "unfinished" until their last epoch.

    Example: dwiml-func runs experiments
    """

    experiments_path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENTS_PATH")]
    """Folder of all experiments."""
    json: bool = False
    """Print only a JSON list with one object per experiment."""


def run(options: Options) -> int:
    """Print the table."""
    runs = list_runs(options.experiments_path)
    if options.json:
        rows = [{**asdict(run), "last_change": run.last_change.isoformat(timespec="seconds")} for run in runs]
        print(json.dumps(null_if_not_finite(rows), indent=2))
    else:
        print(format_runs(runs) if runs else f"No experiments in {options.experiments_path}.")
    return 0


def format_runs(runs: Sequence[RunOverview]) -> str:
    """A table of at most 100 columns, with long names cut; below it, what is corrupt."""
    rows = [_HEADINGS, *(_row(run) for run in runs)]
    if all(run.monitor == "loss" for run in runs):
        rows = [row[:-1] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[0] = min(widths[0], max(_WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1), _LEAST))
    lines = []
    for row in rows:
        name = row[0] if len(row[0]) <= widths[0] else f"{row[0][: widths[0] - 3]}..."
        numbers = (f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True))
        lines.append("  ".join([f"{name:<{widths[0]}}", f"{row[1]:<{widths[1]}}", *numbers]))
    problems = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    wrapped = [
        textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for text in problems
    ]
    return "\n".join([*lines, *([""] if wrapped else []), *wrapped])


def _row(run: RunOverview) -> tuple[str, ...]:
    return (
        run.name if run.name.isprintable() else ascii(run.name),
        run.state + (" (!)" if run.problems and run.state != "corrupt" else ""),
        f"{run.epochs}/{'?' if run.max_epochs is None else run.max_epochs}",
        "-" if run.best_loss is None else f"{run.best_loss:.4f}",
        "-" if run.best_epoch is None else str(run.best_epoch),
        "-" if run.angular_error_deg is None else f"{run.angular_error_deg:.2f}",
        _duration(run.minutes),
        f"{run.last_change:%Y-%m-%d %H:%M}",
        run.monitor if run.best_value is None else f"{run.monitor} {run.best_value:.4f}",
    )


def _duration(minutes: float) -> str:
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    return f"{minutes:.1f} min" if minutes < 60 else f"{minutes / 60:.1f} h"
