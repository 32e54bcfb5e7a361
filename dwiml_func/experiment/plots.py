"""Pictures of training runs: losses, angular errors, gradient norms, learning rates and speeds, by epoch.

The only module that imports matplotlib, without its `pyplot`, so that nothing global is touched.

Pictures of experiments, from what their checkpoints have on record.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.core.loop import EpochReport
from dwiml_func.experiment.compare import distinguishing
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.evaluation import Evaluation, read_evaluation
from dwiml_func.experiment.folder import read_config
from dwiml_func.files.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PlottedRun", "check_format", "draw_experiments", "plot_runs", "save_figure", "save_run_figure"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers tell apart too (https://jfly.uni-koeln.de/color/), without its
yellow, which is faint on white."""

_GREY = "#666666"
_FORMATS = ("png", "svg", "pdf")
_FEW = 40  # epochs that are marked one by one
_BLUE, _ORANGE, _BLACK = _COLOURS[0], _COLOURS[1], _COLOURS[-1]
_TRAINING = {"linestyle": "--", "linewidth": 1.5}
_VALIDATION = {"linestyle": "-", "linewidth": 2}
_BASELINES = (("keep_straight", "keep going straight", ":"), ("principal_direction", "principal direction", "-."))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlottedRun:
    """A run to draw.

    Args:
        label: its name, and what sets it apart from the others.
        history: the reports of its epochs.
        evaluation: of its best model beside the baselines, if it is known.

    Example:
        >>> PlottedRun(label="first_run", history=()).evaluation is None
        True
    """

    label: str
    history: tuple[EpochReport, ...]
    evaluation: Evaluation | None = None


def plot_runs(runs: Sequence[PlottedRun]) -> Figure:
    """Draw runs over each other.

    Args:
        runs: what to draw; those without an epoch are left out.

    Returns:
        Five axes: loss, angular error, gradient norm, learning rate and speed; with several runs, a legend below them.

    Raises:
        ValueError: no run has an epoch.

    Example:
        >>> plot_runs([])
        Traceback (most recent call last):
        ...
        ValueError: Nothing to draw: expected a run with a finished epoch, received none.
    """
    from matplotlib.figure import Figure

    runs = [run for run in runs if run.history]
    if not runs:
        raise ValueError("Nothing to draw: expected a run with a finished epoch, received none.")
    legend = 0.3 + 0.25 * len(runs) if len(runs) > 1 else 0.0  # its height in inches
    figure = Figure(figsize=(12, 7.5 + legend))
    for panel, draw in zip(_panels(figure, legend, len(runs) == 1), _DRAWINGS, strict=True):
        for number, run in enumerate(runs):
            draw(panel, run, number)
        if draw is _angular_errors:
            _baselines(panel, runs)
        panel.finish(num_epochs=max(run.history[-1].epoch for run in runs))
    if len(runs) == 1:
        figure.suptitle(runs[0].label)
    else:
        from matplotlib.lines import Line2D

        lines = [Line2D([], [], color=_COLOURS[number % len(_COLOURS)], linewidth=3) for number in range(len(runs))]
        figure.legend(lines, [run.label for run in runs], loc="lower left", frameon=False)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure, whole or not at all.

    Args:
        figure: what `plot_runs` gave.
        path: where; its ending is the format, .png, .svg or .pdf.

    Raises:
        ValueError: another ending.
        OSError: it cannot be written there.

    Example:
        >>> save_figure(plot_runs(runs), "runs.svg")  # doctest: +SKIP
    """
    content = io.BytesIO()
    figure.savefig(content, format=check_format(path), dpi=110)
    atomic_write(Path(path), content.getvalue())


def check_format(path: str | Path) -> str:
    """The format of a picture by its name.

    Args:
        path: where it shall be written.

    Returns:
        "png", "svg" or "pdf".

    Raises:
        ValueError: the name ends in something else.

    Example:
        >>> check_format("runs.bmp")
        Traceback (most recent call last):
        ...
        ValueError: 'runs.bmp': expected a name that ends in .png, .svg or .pdf.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in _FORMATS:
        raise ValueError(f"{str(path)!r}: expected a name that ends in .png, .svg or .pdf.")
    return kind


def _panels(figure: Figure, legend: float, is_alone: bool) -> list[_Panel]:
    """Two panels above three. They have fixed places: to fit them to their texts takes longer than all the drawing."""
    height = figure.get_figheight()
    middle, space = (3.75 + legend) / height, 0.4 / height
    above = figure.add_gridspec(1, 2, left=0.065, right=0.985, top=1 - 0.7 / height, bottom=middle + space, wspace=0.15)
    below = figure.add_gridspec(
        1, 3, left=0.065, right=0.985, top=middle - space, bottom=0.55 / height + legend / height, wspace=0.28
    )
    return [_Panel(figure.add_subplot(place), is_alone=is_alone) for place in (*above, *below)]


class _Panel:
    """One axes. Of one run, each thing has its colour; of several, each run has, and things differ in style."""

    def __init__(self, axes: Axes, *, is_alone: bool) -> None:
        self.axes = axes
        self._is_alone = is_alone
        self._named: set[str] = set()

    def name(self, title: str, unit: str) -> None:
        self.axes.set_title(title, loc="left", fontweight="bold")
        self.axes.set_ylabel(unit)

    def draw(self, x: Any, y: Any, number: int, text: str, *, colour: str, note: str = "", **style: Any) -> None:
        style["zorder"] = 3 - number / 1000  # the first above: a fork shows where it leaves its source
        if self._is_alone:
            self.axes.plot(x, y, color=colour, label=text + note, **style)
            return
        self.axes.plot(x, y, color=_COLOURS[number % len(_COLOURS)], **style)
        if text not in self._named:
            self._named.add(text)
            self.axes.plot([], [], color=_GREY, label=text, **style)

    def curve(self, run: PlottedRun, values: Sequence[float], number: int, text: str, **style: Any) -> None:
        """A value an epoch, as a line with gaps; each is marked that would not show otherwise."""
        y = np.array(values, dtype=np.float64)
        known = np.isfinite(y)
        if not known.any():
            return
        y[~known] = np.nan
        neighbours = np.concatenate([[False], known[:-1]]) | np.concatenate([known[1:], [False]])
        marked = known if len(y) <= _FEW else known & ~neighbours
        x = [report.epoch for report in run.history]
        self.draw(x, y, number, text, marker="o", markersize=4, markevery=marked.tolist(), **style)

    def finish(self, *, num_epochs: int) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

        axes = self.axes
        axes.set_xlabel("epoch")
        margin = max(0.5, 0.02 * num_epochs)
        axes.set_xlim(1 - margin, num_epochs + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=(1, 2, 5, 10), min_n_ticks=1))
        axes.grid(color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        values = np.concatenate([np.ravel(line.get_ydata()) for line in axes.get_lines()] or [[]]).astype(np.float64)
        values = values[np.isfinite(values)]
        if len(values) == 0:
            axes.text(0.5, 0.5, "not on record", transform=axes.transAxes, ha="center", va="center", color=_GREY)
            axes.set_yticks([])
            return
        decades = math.log10(values.max() / values.min()) if values.min() > 0 else 0
        if decades > 1:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
            if values.min() >= 0:
                axes.set_ylim(0, 1.08 * values.max() or 1)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)


def _losses(panel: _Panel, run: PlottedRun, number: int) -> None:
    panel.name("Loss", "loss (mean over points)")
    _train_and_valid(panel, run, number, "loss")
    best = run.history[-1].best
    if best.epoch is not None:
        ring = {"marker": "o", "markersize": 11, "fillstyle": "none", "markeredgewidth": 2, "linestyle": "none"}
        panel.draw(best.epoch, best.value, number, "best epoch", note=f" ({best.epoch})", colour=_BLACK, **ring)


def _angular_errors(panel: _Panel, run: PlottedRun, number: int) -> None:
    panel.name("Angular error", "mean angle (degrees)")
    _train_and_valid(panel, run, number, "angular_error")
    best, value = run.history[-1].best.epoch, run.evaluation.model if run.evaluation else math.nan
    if best is not None and math.isfinite(value):
        diamond = {"marker": "D", "markersize": 7, "linestyle": "none"}
        text = "best model at the baselines' points"
        panel.draw(best, value, number, text, note=f" ({value:.2f}°)", colour=_BLACK, **diamond)


def _baselines(panel: _Panel, runs: Sequence[PlottedRun]) -> None:
    """Lines across, the same for all runs on the same data."""
    for name, text, dashes in _BASELINES:
        found = [getattr(run.evaluation, name) for run in runs if run.evaluation is not None]
        values = sorted({round(value, 2) for value in found if value is not None and math.isfinite(value)})
        label = f"{text} ({', '.join(f'{value:.2f}°' for value in values)})"
        for value in values:
            panel.axes.axhline(value, color=_GREY, linestyle=dashes, linewidth=1.5, label=label)
            label = None


def _norms(panel: _Panel, run: PlottedRun, number: int) -> None:
    panel.name("Gradient", "norm (mean over batches)")
    before, after = (_means(run, "train", name) for name in ("unclipped_grad_norm", "grad_norm"))
    if np.array_equal(before, after, equal_nan=True):
        panel.curve(run, after, number, "not clipped", colour=_BLUE, **_VALIDATION)
    else:
        panel.curve(run, before, number, "before clipping", colour=_BLUE, **_TRAINING)
        panel.curve(run, after, number, "after clipping", colour=_ORANGE, **_VALIDATION)


def _rates(panel: _Panel, run: PlottedRun, number: int) -> None:
    panel.name("Learning rate", "learning rate")
    rates = [report.learning_rate for report in run.history]
    panel.curve(run, rates, number, "", colour=_BLUE, drawstyle="steps-mid")


def _speeds(panel: _Panel, run: PlottedRun, number: int) -> None:
    panel.name("Speed of training", "points per second")
    speeds = [report.points_per_second for report in run.history]
    panel.curve(run, speeds, number, "", colour=_BLUE)


def _train_and_valid(panel: _Panel, run: PlottedRun, number: int, metric: str) -> None:
    panel.curve(run, _means(run, "train", metric), number, "training", colour=_BLUE, **_TRAINING)
    panel.curve(run, _means(run, "valid", metric), number, "validation", colour=_ORANGE, **_VALIDATION)


def _means(run: PlottedRun, part: str, metric: str) -> list[float]:
    return [getattr(report, part).get(metric, math.nan) for report in run.history]


_DRAWINGS = (_losses, _angular_errors, _norms, _rates, _speeds)
"""What the panels show, in their order."""


_MOST = 4  # options that a label names
_log = logging.getLogger(__name__)


def draw_experiments(directories: Sequence[str | Path]) -> Figure:
    """Draw experiments over each other; each is labelled with its name and the options that it alone does not share.

    Args:
        directories: the experiments.

    Returns:
        The figure, see `plot_runs`.

    Raises:
        FileNotFoundError: one is no experiment.
        ValueError: one has no finished epoch yet, or is corrupt.

    Example:
        >>> draw_experiments(["/no/such/experiment"])
        Traceback (most recent call last):
        ...
        FileNotFoundError: '/no/such/experiment' is not an experiment: it has no config.json.
    """
    paths = [Path(directory) for directory in directories]
    configs = [read_config(path) for path in paths]
    options = distinguishing([replace(config, origin=None).to_dict() for config in configs])
    runs = []
    for path, config, own in zip(paths, configs, options, strict=True):
        checkpoint = newest(path)
        if checkpoint is None or not checkpoint.history:
            raise ValueError(f"{str(path)!r} has no finished epoch on record yet: there is nothing to draw.")
        for sentence in checkpoint.corrupt.values():
            _log.warning("%s Drawn from %s.", sentence, checkpoint.name)
        runs.append(
            PlottedRun(label=_label(path, config, own), history=checkpoint.history, evaluation=read_evaluation(path))
        )
    return plot_runs(runs)


def _label(directory: Path, config: RunConfig, options: Mapping[str, str]) -> str:
    named = [f"{name.rpartition('.')[2]} {value}" for name, value in options.items() if name != "hdf5_file"]
    if "hdf5_file" in options:
        named.append(Path(options["hdf5_file"]).name)
    if len(named) > _MOST:
        named[_MOST:] = [f"and {len(named) - _MOST} more"]
    if config.origin is not None:
        named.insert(0, f"forked from {Path(config.origin.experiment).name} at {config.origin.checkpoint}")
    name = directory.resolve().name
    return f"{name}: {', '.join(named)}" if named else name


def save_run_figure(directory: Path) -> None:
    """Draw an experiment into its `plots/training.png`. A failure costs a warning and nothing else.

    Args:
        directory: the experiment.

    Example:
        >>> save_run_figure(Path("/no/such/experiment"))
    """
    try:
        figure = draw_experiments([directory])
        (directory / "plots").mkdir(exist_ok=True)
        save_figure(figure, directory / "plots" / "training.png")
    except Exception as error:
        _log.warning("No picture of %s was drawn: %s", directory, error)
