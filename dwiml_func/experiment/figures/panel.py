"""A panel of a figure of runs: axes on which each run has its colour, and all that was drawn there as rows.

`run_panels` has the panels themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dwiml_func.core.report import EpochReport
from dwiml_func.experiment.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "GREY", "DrawnValue", "Panel", "PlottedRun", "marker_of", "plain_axes"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers tell apart too (https://jfly.uni-koeln.de/color/), without its
yellow, which is faint on white."""

GREY = "#666666"
"""The colour of what belongs to no run."""

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_FEW = 40  # epochs that are marked one by one
_APART = 8  # marks on a long curve, where colours repeat


@dataclass(frozen=True, slots=True, kw_only=True)
class PlottedRun:
    """A run to draw: `label` tells it from the others in the figure, `name` in tables (by default the label).

    evaluation: compares its best model with the baselines.
    loss_kind: what its loss is, by option; runs whose losses differ in it are drawn on axes of their own.
    tracking: the recorded scores of tracking, by who tracked, protocol and score.
    """

    label: str
    history: tuple[EpochReport, ...]
    name: str = ""
    evaluation: Evaluation | None = None
    loss_kind: dict[str, str] = field(default_factory=dict)
    tracking: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)


class DrawnValue(NamedTuple):
    """A value that a figure shows; `epoch` is None for what belongs to no epoch."""

    run: str
    panel: str
    curve: str
    epoch: float | None
    value: float


def marker_of(number: int) -> str:
    """The marker of a run: each palette of colours has another one."""
    return _MARKERS[number // len(COLOURS) % len(_MARKERS)]


def plain_axes(axes: Axes, *, linewidth: float = 0.8) -> None:
    """A light grid behind what is drawn, and no frame above and on the right."""
    axes.grid(color="#e5e5e5", linewidth=linewidth)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


class Panel:
    """One axes. With one run, each curve has its colour; with several, each run has, and the curves differ in style."""

    def __init__(self, axes: Axes, *, is_alone: bool) -> None:
        self.axes = axes
        self.rows: list[DrawnValue] = []
        self._is_alone = is_alone
        self._named: set[str] = set()
        self._title = ""

    def name(self, title: str, unit: str) -> None:
        self._title = title
        self.axes.set_title(title, loc="left", fontweight="bold", y=1)  # nothing stands above the axes to be avoided
        self.axes.set_ylabel(unit)

    def draw(
        self, run: PlottedRun, x: Any, y: Any, number: int, text: str, *, colour: str, note: str = "", **style: Any
    ) -> None:
        style["zorder"] = 3 - number / 1000  # the first above: a fork shows where it leaves its source
        self.record(run.name or run.label, text or self._title.lower(), x, y)
        if self._is_alone:
            self.axes.plot(x, y, color=colour, label=text + note, **style)
            return
        self.axes.plot(x, y, color=COLOURS[number % len(COLOURS)], **style)
        if text not in self._named:
            self._named.add(text)
            self.axes.plot([], [], color=GREY, label=text, **{**style, "markevery": None})

    def record(self, run: str, text: str, x: Any, y: Any) -> None:
        """Note what is drawn, gaps apart; an `x` that is None belongs to no epoch."""
        for epoch, value in zip(np.ravel(x), np.ravel(y), strict=True):
            if math.isfinite(value):
                at = None if epoch is None else float(epoch)
                self.rows.append(DrawnValue(run, self._title, text, at, float(value)))

    def curve(self, run: PlottedRun, values: Sequence[float], number: int, text: str, **style: Any) -> None:
        """One value per epoch, as a line with gaps; values are marked where they are few, or between gaps."""
        y = np.array(values, dtype=np.float64)
        known = np.isfinite(y)
        if not known.any():
            return
        y[~known] = np.nan
        neighbours = np.concatenate([[False], known[:-1]]) | np.concatenate([known[1:], [False]])
        marked = known if len(y) <= _FEW else known & ~neighbours
        if number >= len(COLOURS) and not self._is_alone:
            marked[:: max(len(y) // _APART, 1)] = True
        x = [report.epoch for report in run.history]
        marks = {"marker": marker_of(0 if self._is_alone else number), "markersize": 4, "markevery": marked.tolist()}
        self.draw(run, x, y, number, text, **marks, **style)

    def finish(self, *, num_epochs: int, limits: tuple[float, float] | None = None) -> None:
        """Scales, ticks and legend, for curves by epoch; `limits` are those of y."""
        from matplotlib.ticker import MaxNLocator

        axes = self.axes
        axes.set_xlabel("epoch")
        margin = max(0.5, 0.02 * num_epochs)
        axes.set_xlim(1 - margin, num_epochs + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=(1, 2, 5, 10), min_n_ticks=1))
        self.scale(limits)
        if axes.get_legend_handles_labels()[0]:
            legend = axes.legend(framealpha=0.8, edgecolor="none")  # curves show through, and do not cross the words
            box = legend.get_window_extent()
            curves = [line.get_transform().transform_path(line.get_path()) for line in axes.get_lines()]
            if limits is None and any(curve.intersects_bbox(box, filled=False) for curve in curves):
                legend.set_loc("upper right")
                self._make_room(box.height / axes.bbox.height + 0.04)

    def _make_room(self, share: float) -> None:
        """Leave this share of the height empty at the top."""
        axes = self.axes
        to_scale, back = axes.transScale, axes.transScale.inverted()
        (_, low), (_, high) = to_scale.transform([(1, value) for value in axes.get_ylim()])
        axes.set_ylim(top=back.transform((1, low + (high - low) / max(1 - share, 0.4)))[1])

    def scale(self, limits: tuple[float, float] | None = None) -> None:
        """The scale of y: logarithmic where the values span more than a decade, else from 0 where none is negative."""
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

        axes = self.axes
        plain_axes(axes)
        values = np.concatenate([np.ravel(line.get_ydata()) for line in axes.get_lines()] or [[]]).astype(np.float64)
        values = values[np.isfinite(values)]
        if limits is not None:
            axes.set_ylim(*limits)
        decades = math.log10(values.max() / values.min()) if len(values) and values.min() > 0 else 0
        if decades > 1 and (limits is None or limits[0] > 0):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            return
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        if limits is None and len(values) and values.min() >= 0:
            axes.set_ylim(0, 1.08 * values.max() or 1)
