"""Figures of how well a run's best model tracks: its streamlines beside real ones, and how it drifts from them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dwiml_func.experiment.figures.panel import COLOURS, plain_axes
from dwiml_func.experiment.figures.plots import save_figure, without_formulas
from dwiml_func.experiment.figures.streamline_views import (
    LineGroup,
    bundle_colours,
    draw_views,
    labels_of,
    view_limits,
    view_rows,
)
from dwiml_func.experiment.folder import is_run, read_config
from dwiml_func.experiment.tracking.evaluation import ORACLE, TrackingEvaluation
from dwiml_func.experiment.tracking.recorded import (
    Drift,
    ShownLines,
    TrackedLines,
    has_tracking_evaluation,
    read_drift,
    read_scores,
    read_tracked_lines,
    read_tracking,
)
from dwiml_func.tracking.protocols import ProtocolScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "NOT_VALID",
    "draw_drift",
    "draw_drifts",
    "draw_recorded_lines",
    "draw_tracked",
    "drift_figure_path",
    "save_tracking_figures",
    "tracked_figure_path",
    "tracking_figures",
]

NOT_VALID = COLOURS[-1]
"""The black of streamlines that are not valid."""

_GIVEN = {
    "continue": "continue (the first 6 mm of each real one are given)",
    "free": "free (seeds anywhere in the mask)",
    "core": "core (seeds on real streamlines)",
}
_OTHERS = (("principal direction", "#666666", "-."), ("keep going straight", "#666666", ":"), (ORACLE, "#000000", "--"))
_MOST_LETTERS = 45  # of a label of which two stand side by side
_log = logging.getLogger(__name__)


def draw_tracked(by_protocol: Mapping[Any, ProtocolScores], lines: TrackedLines, *, title: str) -> Figure:
    """Real streamlines in the top row, below them those of each protocol, in colours of bundles; what is not valid is
    black, above the others."""
    from matplotlib.lines import Line2D

    num_real = by_protocol["continue"].num_started if "continue" in by_protocol else None
    rows: list[tuple[str, ShownLines]] = [(f"real streamlines{_some(lines.real, num_real)}", lines.real)]
    for protocol, shown in lines.tracked.items():
        scores = by_protocol[protocol]
        share = f"{100 * scores.valid:.0f} % of {scores.num_streamlines} valid{_some(shown, scores.num_streamlines)}"
        rows.append((f"tracked, {_GIVEN[protocol]}: {share}", shown))
    colours = bundle_colours(np.bincount(lines.real.bundle, minlength=len(lines.names)).tolist())
    labels = labels_of(lines.names, colours, kind="bundles")
    figure, panels = view_rows(len(rows), above=0.75, below=0.65 + 0.22 * -(-(len(labels) + 1) // 4))
    limits = view_limits([shown.lines for _, shown in rows])
    for row, (text, shown) in zip(panels, rows, strict=True):
        draw_views(row, _groups(shown, colours), limits, is_last=row is panels[-1])
        row[0].set_title(text, loc="left", fontsize=10, fontweight="bold")
        if len(shown.lines) == 0:
            row[1].text(0.5, 0.5, "none", transform=row[1].transAxes, ha="center", va="center")
    left, bottom, top = 0.65 / figure.get_figwidth(), 0.02 / figure.get_figheight(), 1 - 0.12 / figure.get_figheight()
    entries = {**labels, NOT_VALID: "not valid"}
    figure.legend(
        [Line2D([], [], color=colour, linewidth=3) for colour in entries],
        list(entries.values()),
        loc="lower left",
        bbox_to_anchor=(left, bottom),
        bbox_transform=figure.transFigure,
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(title, x=left, y=top, ha="left", va="top", fontsize=12)
    return figure


def _groups(shown: ShownLines, colours: Sequence[str]) -> list[LineGroup]:
    of_bundle = [np.flatnonzero(shown.valid & (shown.bundle == row)) for row in range(len(colours))]
    groups = [LineGroup(shown.lines.select(rows), colour) for rows, colour in zip(of_bundle, colours, strict=True)]
    return [*groups, LineGroup(shown.lines.select(np.flatnonzero(~shown.valid)), NOT_VALID, width=0.4)]


def _some(shown: ShownLines, num: int | None) -> str:
    return "" if num is None or num == len(shown.lines) else f", {len(shown.lines)} drawn"


def draw_drift(drifts: Mapping[str, Drift]) -> Figure:
    """The lag by the distance gone, of models by label, beside the baselines and the oracle of each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot()
    curves: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, (label, drift) in enumerate(drifts.items()):
        style = {"color": COLOURS[number % (len(COLOURS) - 1)], "linewidth": 2.5, "zorder": 3}
        curves[label, drift.gone_mm, drift.lag_mm["model"]] = style
    for drift in drifts.values():
        for name, colour, dashes in _OTHERS:
            if name in drift.lag_mm:  # of models on the same data they are the same, and drawn once
                style = {"color": colour, "linewidth": 1.5, "linestyle": dashes}
                curves[name, drift.gone_mm, drift.lag_mm[name]] = style
    highest, furthest = 0.0, 0.0
    entries = {}  # given as they are: in a legend that is made by itself, names that begin with _ are hidden
    for (name, gone_mm, values), style in curves.items():
        y = np.array(values, dtype=np.float64)  # None becomes NaN
        known = np.flatnonzero(np.isfinite(y))
        if len(known) == 0:
            continue
        end = f"{y[known[-1]]:.1f} mm after {gone_mm[known[-1]]:g} mm"
        furthest = max(furthest, gone_mm[known[-1]])
        text = f"{name} ({end})"
        (entries[text],) = axes.plot(gone_mm, y, label=text, **style)
        if name != "keep going straight":
            highest = max(highest, float(y[known].max()))
    axes.set_title("Drift from the real streamline", loc="left", fontweight="bold")
    axes.set_xlabel("distance gone alone (mm)")
    axes.set_ylabel("mean distance from the real streamline (mm)")
    axes.set_xlim(0, furthest or 1.0)
    axes.set_ylim(0, 1.25 * highest or 1.0)  # what never turns leaves the figure
    plain_axes(axes)
    columns = 2 if max(map(len, entries), default=0) <= _MOST_LETTERS else 1
    below = 0.25 * -(-len(entries) // columns) + 0.05
    figure.set_figheight(4.9 + below)
    where = {"loc": "lower left", "bbox_to_anchor": (0.03, 0.0)}
    figure.legend([*entries.values()], [*entries], **where, ncols=columns, frameon=False, fontsize=9)
    without_formulas(figure)
    figure.tight_layout(rect=(0, below / figure.get_figheight(), 1, 1))
    return figure


def draw_drifts(directories: Sequence[str | Path]) -> Figure:
    """The drift of experiments, as their `tracking.json` records it, over each other."""
    drifts = {}
    for directory in map(Path, directories):
        if not is_run(directory):
            read_config(directory)  # which says what it is
        drift = read_drift(directory)
        if drift is None:
            raise ValueError(
                f"Expected an experiment whose tracking.json has the drift. Received: {directory}. Make it with "
                f"dwiml-func evaluate {directory} --write, from data with bundles."
            )
        name = directory.resolve().name
        drifts[name if name not in drifts else str(directory)] = drift
    return draw_drift(drifts)


def drift_figure_path(directory: Path) -> Path:
    """Where an experiment has the figure of its drift."""
    return directory / "plots" / "drift.png"


def draw_recorded_lines(directory: Path) -> Figure:
    """The tracked streamlines of an experiment again, as it has recorded them."""
    if not is_run(directory):
        read_config(directory)  # which says what it is
    tracking, lines = read_tracking(directory), read_tracked_lines(directory)
    if tracking is None or lines is None or lines.epoch != tracking.epoch:
        raise ValueError(
            f"Expected an experiment with tracking.json and plots/tracking.npz of one epoch. Received: {directory}. "
            f"Make them with dwiml-func evaluate {directory} --write, from data with bundles."
        )
    by_protocol = {name: ProtocolScores(**found) for name, found in read_scores(directory)["model"].items()}
    title = _title(directory, tracking.epoch, tracking.subset, tracking.subject, tracking.step_size)
    return draw_tracked(by_protocol, lines.lines, title=title)


def tracked_figure_path(directory: Path) -> Path:
    """Where an experiment has the figure of its tracked streamlines."""
    return directory / "plots" / "tracking.png"


def _title(directory: Path, epoch: int, subset: str, subject: str, step_size: float) -> str:
    name = directory.resolve().name
    return f"{name}: best model (epoch {epoch}), {subset} subject {subject}, steps of {step_size:g} mm"


def tracking_figures(directory: Path) -> tuple[Path, ...]:
    """Where an experiment has its figures of tracking; none where it has no evaluation of tracking."""
    if not has_tracking_evaluation(directory):
        return ()
    return tracked_figure_path(directory), drift_figure_path(directory)


def save_tracking_figures(directory: Path, evaluation: TrackingEvaluation, *, epoch: int) -> None:
    """Draw `plots/tracking.png` and `plots/drift.png` of an experiment; an error is only a warning."""
    tracked, drifted = tracked_figure_path(directory), drift_figure_path(directory)
    try:
        tracked.parent.mkdir(exist_ok=True)
        if evaluation.lines is not None:
            title = _title(directory, epoch, evaluation.subset, evaluation.subject, evaluation.step_size)
            save_figure(draw_tracked(evaluation.scores["model"], evaluation.lines, title=title), tracked)
        if evaluation.drift is not None:
            save_figure(draw_drift({"model": evaluation.drift}), drifted)
    except Exception as error:
        _log.warning("The figures of tracking of %s were not drawn: %s", directory, error)
