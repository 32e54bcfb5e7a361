"""`dwiml-func plot`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dwiml_func._checks import one_line
from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.cli._output import folders_above
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.experiment.comparison.correlation import correlate, draw_correlation
from dwiml_func.experiment.comparison.runs import run_overview
from dwiml_func.experiment.figures.graphs import parse_graph
from dwiml_func.experiment.figures.plots import (
    check_format,
    draw_runs,
    read_runs,
    run_figure_path,
    save_figure,
    write_table,
)
from dwiml_func.experiment.figures.run_panels import PanelName
from dwiml_func.experiment.figures.tracking import (
    draw_drifts,
    draw_recorded_lines,
    drift_figure_path,
    tracked_figure_path,
)
from dwiml_func.experiment.folder import (
    ENSEMBLE_FILE,
    check_no_links,
    is_ensemble,
    is_run,
    is_sweep,
    member_folders,
    named_in_order,
    recorded_config,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Options", "run"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Plot experiments in one figure: losses with the best epoch, angular errors with the baselines, window lag,
    gradient norms before and after clipping, learning rates, points per second, and how the best models of several
    runs track. Losses of different direction getters have panels of their own. The legend shows the options that
    differ and can matter.

    Example: dwiml-func plot experiments/first_run experiments/second_run --out runs.png
    """

    experiment_dirs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="EXPERIMENT_DIR [...]", help_behavior_hint="(required)"),
    ]
    """Folders of experiments; that of an ensemble means all of its members, and a folder of experiments all in it. What
    has no finished epoch, and files, such as a dataset beside experiments, are passed over there."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """The figure's file, ending in .png, .svg or .pdf; missing folders are made. None: plots/training.png of the
    experiment, or, for several, runs.png in the current folder; with --drift drift.png in both; for the streamlines
    of --tracking plots/tracking.png."""
    panels: tuple[PanelName, ...] = ()
    """Which panels to draw. (default: all that the runs have values for; with --graph none)"""
    graph: Annotated[
        tuple[tuple[str, ...], ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar='"TITLE" LOG [LOG ...] [YMIN YMAX]'),
    ] = ()
    """Draw a panel of logs, under their names in logs/metrics.jsonl or logs/*.npy; a metric's own name, such as loss,
    means that of the validation. "diff(LOG, LOG)" and "sum(LOG, LOG)" are logs too. The option may be given several
    times, after the EXPERIMENT_DIRs. (default: none)"""
    csv: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write all values that are drawn as CSV, a row for each: run, panel, curve, epoch, value."""
    correlate: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME NAME")] = ()
    """Plot two values of the runs against each other, and print their correlation over the epochs of each run, over
    those of all, and over the best epochs of the runs. Names are those of runs --show: logs, scores or options.
    (default: none)"""
    drift: bool = False
    """Plot how far the best models drift from real streamlines when they track, beside the baselines, from the
    tracking.json of experiments whose data have bundles."""
    tracking: bool = False
    """Draw the streamlines that the best model of one experiment tracked at its end again, beside the real ones, from
    its tracking.json and plots/tracking.npz."""


def run(options: Options) -> int:
    """Write the figure."""
    if not options.experiment_dirs:
        raise ValueError("Expected at least one EXPERIMENT_DIR. Received: none.")
    given = [Path(directory) for directory in options.experiment_dirs]
    given = [path for path in given if path.name != ENSEMBLE_FILE]  # it is among the members in ENSEMBLE/*
    others = [path for path in given if path.exists() and not _experiments(path)]
    if others and len(others) < len(given):
        _log.warning("Passed over, as they hold no experiment: %s.", ", ".join(map(str, others)))
        given = [path for path in given if path not in others]
    directories = [folder for path in given for folder in _experiments(path) or [path]]
    for name, is_given in (("drift", options.drift), ("tracking", options.tracking)):
        if is_given and (options.panels or options.graph or options.csv or options.correlate):
            raise ValueError(f"--{name}: not allowed with --panels, --graph, --csv or --correlate. Leave them out.")
    if options.tracking and (options.drift or len(directories) != 1):
        received = "--drift" if options.drift else f"{len(directories)} experiments"
        raise ValueError(f"--tracking: requires one experiment, and no --drift. Received: {received}.")
    if len(options.correlate) not in (0, 2):
        raise ValueError(f"--correlate: expected NAME NAME. Received: {' '.join(options.correlate)}.")
    if options.correlate and (options.panels or options.graph or options.csv):
        raise ValueError("--correlate: not allowed with --panels, --graph or --csv. Leave them out.")
    path_in, name = (drift_figure_path, "drift.png") if options.drift else (run_figure_path, "runs.png")
    if options.tracking:
        path_in, name = tracked_figure_path, "tracking.png"
    name = "correlation.png" if options.correlate else name
    out = Path(name if options.out is None else options.out)
    check_format(out)
    graphs = [parse_graph(words) for words in options.graph]
    if options.drift or options.tracking:
        figure, rows = draw_drifts(directories) if options.drift else draw_recorded_lines(directories[0]), []
    elif options.correlate:
        figure, rows = _correlation(directories, options.correlate), []
    else:
        figure, rows = draw_runs(read_runs(directories), panels=options.panels, graphs=graphs)
    is_chosen = bool(options.panels or graphs or options.correlate)
    if options.out is None and not is_chosen and len(given) == 1 and (is_run(given[0]) or is_ensemble(given[0])):
        check_no_links(given[0])
        out = path_in(given[0])
    if options.csv is not None:
        with folders_above(table := Path(options.csv)):
            write_table(rows, table)
    with folders_above(out):
        save_figure(figure, out)
    print(out, *filter(None, [options.csv]), sep="\n")
    return 0


def _correlation(directories: list[Path], names: Sequence[str]) -> Figure:
    """Print the correlation, and draw it."""
    runs = read_runs(directories)
    found = correlate([run_overview(folder, run.name) for folder, run in zip(directories, runs, strict=True)], names)
    print(found.text)
    if found.mixes_losses:
        _log.warning("Losses of different direction getters cannot be compared: correlate those of one getter.")
    return draw_correlation(found, [run.label for run in runs])


def _experiments(path: Path) -> list[Path]:
    """The experiment itself, the members of an ensemble, or what a folder of experiments has to show, if any."""
    if is_ensemble(path):
        return member_folders(path)
    if is_run(path):
        return [path]
    inner = named_in_order(path) if path.is_dir() else []
    holds_runs = (is_ensemble, is_run, is_sweep)
    found = [run for folder in inner if any(test(folder) for test in holds_runs) for run in _experiments(folder)]
    return [run for run in found if _has_epochs(run)]


@functools.cache
def _has_epochs(run: Path) -> bool:
    """Whether a run has something to show; a warning where it is corrupt."""
    try:
        checkpoint = newest(run)
        recorded_config(run, checkpoint)
    except ValueError as error:
        _log.warning("Passed over %s. %s", run, one_line(error))
        return False
    return checkpoint is not None and bool(checkpoint.history)
