"""`dwiml-func plot`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dwiml_func.cli._output import folders_above
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.experiment.folder import ENSEMBLE_FILE, check_no_links, is_ensemble, member_folders
from dwiml_func.experiment.plots import check_format, draw_experiments, run_figure_path, save_figure
from dwiml_func.experiment.tracking_figures import draw_drifts, drift_figure_path

__all__ = ["Options", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Plot experiments in one figure: losses with the best epoch, angular errors with the baselines, gradient norms
    before and after clipping, learning rates, and points per second. The legend shows the options that differ.

    Example: dwiml-func plot experiments/first_run experiments/second_run --out runs.png
    """

    experiment_dirs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="EXPERIMENT_DIR [...]", help_behavior_hint="(required)"),
    ]
    """Folders of experiments; that of an ensemble means all of its members."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """The figure's file, ending in .png, .svg or .pdf; missing folders are made. None: plots/training.png of the
    experiment, or, for several, runs.png in the current folder; with --drift drift.png in both."""
    drift: bool = False
    """Plot how far the best models drift from real streamlines when they track, beside the baselines, from the
    tracking.json of experiments whose data have bundles."""


def run(options: Options) -> int:
    """Write the figure."""
    if not options.experiment_dirs:
        raise ValueError("Expected at least one EXPERIMENT_DIR. Received: none.")
    given = [Path(directory) for directory in options.experiment_dirs]
    given = [path for path in given if path.name != ENSEMBLE_FILE]  # it is among the members in ENSEMBLE/*
    directories = [folder for path in given for folder in (member_folders(path) if is_ensemble(path) else [path])]
    draw, path_in, name = (
        (draw_drifts, drift_figure_path, "drift.png")
        if options.drift
        else (draw_experiments, run_figure_path, "runs.png")
    )
    out = Path(name if options.out is None else options.out)
    check_format(out)
    figure = draw(directories)
    if options.out is None and len(given) == 1:
        check_no_links(given[0])
        out = path_in(given[0])
    with folders_above(out):
        save_figure(figure, out)
    print(out)
    return 0
