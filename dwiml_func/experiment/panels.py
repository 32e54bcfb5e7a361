"""The panels of a figure of runs: loss, angular error, gradient norm, learning rate and speed, by epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dwiml_func.core.report import EpochReport
from dwiml_func.experiment.evaluation import Evaluation
from dwiml_func.experiment.window_lag import WINDOW_LAG
from dwiml_func.models.autoencoder.autoencoder import RECONSTRUCTION_ERROR

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "DRAWINGS", "Panel", "PlottedRun", "angular_errors", "draw_baselines", "metric_apart"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers tell apart too (https://jfly.uni-koeln.de/color/), without its
yellow, which is faint on white."""

_GREY = "#666666"
_FEW = 40  # epochs that are marked one by one
_BLUE, _ORANGE, _BLACK = COLOURS[0], COLOURS[1], COLOURS[-1]
_TRAINING = {"linestyle": "--", "linewidth": 1.5}
_VALIDATION = {"linestyle": "-", "linewidth": 2}
_BASELINES = (("keep_straight", "keep going straight", ":"), ("principal_direction", "principal direction", "-."))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlottedRun:
    """A run to draw; `evaluation` compares its best model with the baselines."""

    label: str
    history: tuple[EpochReport, ...]
    evaluation: Evaluation | None = None


class Panel:
    """One axes. With one run, each curve has its colour; with several, each run has, and the curves differ in style."""

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
        self.axes.plot(x, y, color=COLOURS[number % len(COLOURS)], **style)
        if text not in self._named:
            self._named.add(text)
            self.axes.plot([], [], color=_GREY, label=text, **style)

    def curve(self, run: PlottedRun, values: Sequence[float], number: int, text: str, **style: Any) -> None:
        """One value per epoch, as a line with gaps; values are marked where they are few, or between gaps."""
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
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=_GREY)
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


def _losses(panel: Panel, run: PlottedRun, number: int) -> None:
    panel.name("Loss", "loss (mean over points)")
    _train_and_valid(panel, run, number, "loss")
    _ring(panel, run, number, "loss")


def metric_apart(run: PlottedRun) -> str | None:
    """The metric of the third panel: the monitored one, where it has no other panel, else the window lag, if known."""
    if run.history[-1].monitor not in ("loss", "angular_error", RECONSTRUCTION_ERROR):
        return run.history[-1].monitor
    return WINDOW_LAG if any(WINDOW_LAG in report.valid for report in run.history) else None


def _apart(panel: Panel, run: PlottedRun, number: int) -> None:
    metric = metric_apart(run)
    if metric is None:
        return
    is_lag = metric == WINDOW_LAG
    panel.name(*(("Window lag", "distance after 20 mm alone (mm)") if is_lag else ("Monitored metric", metric)))
    _train_and_valid(panel, run, number, metric)
    _ring(panel, run, number, metric)


def _ring(panel: Panel, run: PlottedRun, number: int, metric: str) -> None:
    """A ring at the best epoch, where the metric chose it."""
    best = run.history[-1].best
    if best.epoch is None or run.history[-1].monitor != metric:
        return
    ring = {"marker": "o", "markersize": 11, "fillstyle": "none", "markeredgewidth": 2, "linestyle": "none"}
    x = best.epoch if not best.batch else _within(run.history[best.epoch - 1], best.batch)
    panel.draw(x, best.value, number, "best epoch", note=f" ({best.epoch})", colour=_BLACK, **ring)


def _within(report: EpochReport, batch: int) -> float:
    """A place within an epoch on the axis of epochs; of an epoch that has not ended, the last batch is its end."""
    return report.epoch - 1 + batch / max(report.num_batches, batch, 1)


def angular_errors(panel: Panel, run: PlottedRun, number: int) -> None:
    """Angular errors of the epochs, and of the best model at the points where the baselines give a direction too.

    Of an autoencoder the distance between points and their reconstructions.
    """
    if RECONSTRUCTION_ERROR in run.history[-1].train:
        panel.name("Reconstruction error", "mean distance (voxels)")
        _train_and_valid(panel, run, number, RECONSTRUCTION_ERROR)
        _ring(panel, run, number, RECONSTRUCTION_ERROR)
        return
    panel.name("Angular error", "mean angle (degrees)")
    _train_and_valid(panel, run, number, "angular_error")
    _ring(panel, run, number, "angular_error")
    best, value = run.history[-1].best.epoch, run.evaluation.model if run.evaluation else math.nan
    if best is not None and math.isfinite(value):
        diamond = {"marker": "D", "markersize": 7, "linestyle": "none"}
        text = "best model"
        panel.draw(best, value, number, text, note=f" ({value:.2f}°)", colour=_BLACK, **diamond)


def draw_baselines(panel: Panel, runs: Sequence[PlottedRun]) -> None:
    """Horizontal lines, the same for all runs on the same data."""
    for name, text, dashes in _BASELINES:
        found = [getattr(run.evaluation, name) for run in runs if run.evaluation is not None]
        values = sorted({round(value, 2) for value in found if value is not None and math.isfinite(value)})
        label = f"{text} ({', '.join(f'{value:.2f}°' for value in values)})"
        for value in values:
            panel.axes.axhline(value, color=_GREY, linestyle=dashes, linewidth=1.5, label=label)
            label = None


def _norms(panel: Panel, run: PlottedRun, number: int) -> None:
    panel.name("Gradient", "norm (mean over batches)")
    before, after = (_means(run, "train", name) for name in ("unclipped_grad_norm", "grad_norm"))
    if np.array_equal(before, after, equal_nan=True):
        panel.curve(run, after, number, "not clipped", colour=_BLUE, **_VALIDATION)
    else:
        panel.curve(run, before, number, "before clipping", colour=_BLUE, **_TRAINING)
        panel.curve(run, after, number, "after clipping", colour=_ORANGE, **_VALIDATION)


def _rates(panel: Panel, run: PlottedRun, number: int) -> None:
    panel.name("Learning rate", "learning rate")
    rates = [report.learning_rate for report in run.history]
    by_step = any(report.learning_rate_max is not None for report in run.history)
    panel.curve(run, rates, number, "last step" if by_step else "", colour=_BLUE, drawstyle="steps-mid")
    decays = _means(run, "train", "weight_decay")  # of `with_weight_decay`
    panel.curve(run, decays, number, "weight decay", colour=_ORANGE, drawstyle="steps-mid", linestyle="--")
    if by_step:
        lowest = [math.nan if r.learning_rate_min is None else r.learning_rate_min for r in run.history]
        highest = [math.nan if r.learning_rate_max is None else r.learning_rate_max for r in run.history]
        for values, text in ((highest, "highest"), (lowest, "lowest")):
            panel.curve(run, values, number, text, colour=_GREY, linestyle=":", linewidth=1.5)


def _speeds(panel: Panel, run: PlottedRun, number: int) -> None:
    panel.name("Speed of training", "points per second")
    speeds = [report.points_per_second for report in run.history]
    panel.curve(run, speeds, number, "", colour=_BLUE)


def _train_and_valid(panel: Panel, run: PlottedRun, number: int, metric: str) -> None:
    panel.curve(run, _means(run, "train", metric), number, "training", colour=_BLUE, **_TRAINING)
    panel.curve(run, _means(run, "valid", metric), number, "validation", colour=_ORANGE, **_VALIDATION)
    inner = [
        (_within(report, each.batch), each.means.get(metric, math.nan))
        for report in run.history
        for each in report.validations
    ]
    if inner:
        style = {"marker": ".", "markersize": 4, "linestyle": "none"}
        x, y = zip(*inner, strict=True)
        panel.draw(x, y, number, "validation within epochs", colour=_ORANGE, **style)


def _means(run: PlottedRun, part: str, metric: str) -> list[float]:
    return [getattr(report, part).get(metric, math.nan) for report in run.history]


DRAWINGS = (_losses, angular_errors, _apart, _norms, _rates, _speeds)
"""What the panels show, in their order; the third only where a run has a metric for it, see `metric_apart`."""
