"""Correlation of two values over runs, and of two logs over the epochs of each run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dwiml_func.experiment.comparison.run_labels import loss_kind
from dwiml_func.experiment.comparison.run_values import check_names, find_log, run_value
from dwiml_func.experiment.comparison.runs import RunOverview
from dwiml_func.experiment.figures.panel import COLOURS, Panel, marker_of, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Correlation", "Pairs", "correlate", "draw_correlation", "pearson", "spearman"]


class Pairs(NamedTuple):
    """Two values of a run: of its epochs (E,), empty where one is no log, and in its best epoch, NaN where unknown."""

    run: str
    epochs: NDArray[np.float64]
    a: NDArray[np.float64]
    b: NDArray[np.float64]
    best: tuple[float, float]


class Correlation(NamedTuple):
    """The pairs of all runs; `mixes_losses` where one value is a loss whose kinds cannot be compared."""

    names: Sequence[str]
    pairs: list[Pairs]
    mixes_losses: bool

    @property
    def text(self) -> str:
        """A line for each run and for all."""
        lines: list[tuple[str, int, float, float | None]] = [
            (pair.run, len(pair.a), pearson(pair.a, pair.b), None) for pair in self.pairs if len(pair.a)
        ]
        if len(lines) > 1:
            a, b = (np.concatenate([getattr(pair, side) for pair in self.pairs]) for side in "ab")
            lines.append(("all epochs of all runs", len(a), pearson(a, b), spearman(a, b)))
        best = np.array([pair.best for pair in self.pairs if all(map(math.isfinite, pair.best))]).reshape(-1, 2)
        if len(best) > 1:
            lines.append(("best epochs of the runs", len(best), pearson(*best.T), spearman(*best.T)))
        width = max([3, *(len(name) for name, *_ in lines)])
        rows = [f"{name:<{width}}  {num:>6}  {_text(r):>6}  {_text(rank):>6}".rstrip() for name, num, r, rank in lines]
        return "\n".join([f"{'run':<{width}}  values       r    rank", *rows])


def correlate(runs: Sequence[RunOverview], names: Sequence[str]) -> Correlation:
    """Pair two values, named as for `runs --show`. ValueError where no run has one of them, or they are no numbers."""
    check_names(runs, names, option="--correlate")
    pairs = []
    for run in runs:
        best = tuple(_number(run_value(run, name)) for name in names)
        logs = [find_log(run.record.history, name) for name in names]
        known = np.zeros(0, dtype=bool)
        if logs[0] is not None and logs[1] is not None:
            known = np.isfinite(logs[0]) & np.isfinite(logs[1])
        epochs = np.array([float(report.epoch) for report in run.record.history])[: len(known)][known]
        a, b = (np.zeros(0) if log is None or not len(known) else log[known] for log in logs)
        pairs.append(Pairs(run.name, epochs, a, b, (best[0], best[1])))
    if not any(len(pair.a) or all(map(math.isfinite, pair.best)) for pair in pairs):
        raise ValueError(f"--correlate: expected two numbers of the same runs. Received: {' and '.join(names)}.")
    kinds = [loss_kind(run.record.config) for run in runs]
    is_mixed = any(kind != kinds[0] for kind in kinds) and any("loss" in name for name in names)
    return Correlation(names, pairs, is_mixed)


def draw_correlation(found: Correlation, labels: Sequence[str]) -> Figure:
    """The epochs of each run as dots, its best epoch as a large mark."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    legend = 0.15 + 0.22 * len(labels)
    height = 4.6 + legend
    figure = Figure(figsize=(12, height))
    axes = figure.add_axes((0.075, (0.6 + legend) / height, 0.9, 3.6 / height))
    panel = Panel(axes, is_alone=False)
    panel.name(f"{found.names[1]} by {found.names[0]}", found.names[1])
    for number, pair in enumerate(found.pairs):
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": marker_of(number),
            "linestyle": "none",
        }
        axes.plot(pair.a, pair.b, markersize=3, alpha=0.6, **style)
        axes.plot(*([value] for value in pair.best), markersize=9, markeredgecolor="#000000", **style)
    for scale in (axes.xaxis, axes.yaxis):
        scale.set_major_locator(MaxNLocator(nbins=7))
    axes.set_xlabel(found.names[0])
    plain_axes(axes)
    marks = [
        Line2D([], [], color=COLOURS[n % len(COLOURS)], marker=marker_of(n), markersize=9, linestyle="none")
        for n in range(len(labels))
    ]
    figure.legend(marks, list(labels), loc="lower left", frameon=False)
    return figure


def pearson(a: ArrayLike, b: ArrayLike) -> float:
    """The correlation coefficient; NaN of fewer than two pairs, or where one value is the same in all."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """The rank correlation, equal values having the mean of their ranks."""
    return pearson(_ranks(np.asarray(a)), _ranks(np.asarray(b)))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _number(value: float | str | None) -> float:
    try:
        return math.nan if value is None else float(value)
    except ValueError:
        return math.nan


def _text(value: float | None) -> str:
    return "" if value is None else "-" if math.isnan(value) else f"{value:.3f}"
