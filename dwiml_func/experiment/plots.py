"""Figures of experiments, from the history in their checkpoints. The panels are in `panels`.

matplotlib is used without `pyplot`, so nothing global is touched.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.experiment.compare import distinguishing
from dwiml_func.experiment.evaluation import read_evaluation
from dwiml_func.experiment.folder import recorded_config
from dwiml_func.experiment.panels import (
    COLOURS,
    DRAWINGS,
    Panel,
    PlottedRun,
    angular_errors,
    draw_baselines,
    metric_apart,
)
from dwiml_func.files.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_format", "draw_experiments", "plot_runs", "run_figure_path", "save_figure", "save_run_figure"]

_FORMATS = ("png", "svg", "pdf")
_MAX_OPTIONS = 4  # that a label names
_log = logging.getLogger(__name__)


def plot_runs(runs: Sequence[PlottedRun]) -> Figure:
    """Draw runs over each other in five panels; with several runs, a legend below them."""
    from matplotlib.figure import Figure

    runs = [run for run in runs if run.history]
    if not runs:
        raise ValueError("Expected a run with a finished epoch. Received none.")
    legend = 0.3 + 0.25 * len(runs) if len(runs) > 1 else 0.0  # its height in inches
    figure = Figure(figsize=(12, 7.5 + legend))
    drawings = list(DRAWINGS)
    if not any(map(metric_apart, runs)):
        del drawings[2]
    for panel, draw in zip(_panels(figure, legend, len(runs) == 1, len(drawings) - 3), drawings, strict=True):
        for number, run in enumerate(runs):
            draw(panel, run, number)
        if draw is angular_errors:
            draw_baselines(panel, runs)
        panel.finish(num_epochs=max(run.history[-1].epoch for run in runs))
    if len(runs) == 1:
        figure.suptitle(runs[0].label)
    else:
        from matplotlib.lines import Line2D

        lines = [Line2D([], [], color=COLOURS[number % len(COLOURS)], linewidth=3) for number in range(len(runs))]
        figure.legend(lines, [run.label for run in runs], loc="lower left", frameon=False)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure, complete or not at all; the format is the ending of the path: .png, .svg or .pdf."""
    content = io.BytesIO()
    figure.savefig(content, format=check_format(path), dpi=110)
    atomic_write(Path(path), content.getvalue())


def check_format(path: str | Path) -> str:
    """The format of a figure by its path; ValueError for another ending than .png, .svg or .pdf."""
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in _FORMATS:
        raise ValueError(f"{str(path)!r}: expected a name that ends in .png, .svg or .pdf.")
    return kind


def _panels(figure: Figure, legend: float, is_alone: bool, num_above: int) -> list[Panel]:
    """Two panels, or three, above three, at fixed positions: fitting them to their texts is slower."""
    height = figure.get_figheight()
    middle, space = (3.75 + legend) / height, 0.4 / height
    above = figure.add_gridspec(
        1, num_above, left=0.065, right=0.985, top=1 - 0.7 / height, bottom=middle + space, wspace=0.15
    )
    below = figure.add_gridspec(
        1, 3, left=0.065, right=0.985, top=middle - space, bottom=0.55 / height + legend / height, wspace=0.28
    )
    return [Panel(figure.add_subplot(place), is_alone=is_alone) for place in (*above, *below)]


def draw_experiments(directories: Sequence[str | Path]) -> Figure:
    """Draw experiments over each other; each label has the name and the options that not all of them share."""
    paths = [Path(directory) for directory in directories]
    checkpoints = [newest(path) for path in paths]
    configs = [recorded_config(path, checkpoint) for path, checkpoint in zip(paths, checkpoints, strict=True)]
    options = distinguishing([{**config, "origin": None} for config in configs])
    runs = []
    for path, checkpoint, config, own in zip(paths, checkpoints, configs, options, strict=True):
        if checkpoint is None or not checkpoint.history:
            raise ValueError(f"{str(path)!r} has no finished epoch yet. Expected at least one.")
        for sentence in checkpoint.corrupt.values():
            _log.warning("%s The figure shows checkpoint %s.", sentence, checkpoint.name)
        runs.append(
            PlottedRun(label=_label(path, config, own), history=checkpoint.history, evaluation=read_evaluation(path))
        )
    return plot_runs(runs)


def _label(directory: Path, config: Mapping[str, Any], options: Mapping[str, str]) -> str:
    named = [f"{name.rpartition('.')[2]} {value}" for name, value in options.items() if name != "hdf5_file"]
    if "hdf5_file" in options:
        named.append(Path(options["hdf5_file"]).name)
    if len(named) > _MAX_OPTIONS:
        named[_MAX_OPTIONS:] = [f"and {len(named) - _MAX_OPTIONS} more"]
    if (directory / "config.json").is_file() and (origin := config["origin"]) is not None:
        source, at = Path(origin["experiment"]).name, origin["checkpoint"]
        named.insert(0, f"initialized from {source}" if origin["weights_only"] else f"forked from {source} at {at}")
    name = directory.resolve().name
    return f"{name}: {', '.join(named)}" if named else name


def run_figure_path(directory: Path) -> Path:
    """Where an experiment has its figure."""
    return directory / "plots" / "training.png"


def save_run_figure(directory: Path) -> None:
    """Draw an experiment into its `plots/training.png`; an error is only a warning."""
    try:
        figure, path = draw_experiments([directory]), run_figure_path(directory)
        path.parent.mkdir(exist_ok=True)
        save_figure(figure, path)
    except Exception as error:
        _log.warning("The figure of %s was not drawn: %s", directory, error)
