"""The panels of a figure of runs: losses, angular errors, lag, gradient norms, learning rates, speed and tracking."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import numpy as np

from dwiml_func.core.report import EpochReport
from dwiml_func.experiment.comparison.run_labels import kind_names
from dwiml_func.experiment.figures.panel import COLOURS, GREY, Panel, PlottedRun
from dwiml_func.experiment.training_config import WINDOW_LAG
from dwiml_func.models.autoencoder.autoencoder import RECONSTRUCTION_ERROR

__all__ = ["PANELS", "PanelDrawing", "PanelName", "draw_rates", "panel_drawings"]

PanelName = Literal["loss", "angle", "lag", "monitored", "gradient", "rate", "speed", "tracking"]
"""What `--panels` names."""
PANELS: tuple[PanelName, ...] = get_args(PanelName)
"""All of them, in the order of a figure."""

_BLUE, _ORANGE, _BLACK = COLOURS[0], COLOURS[1], COLOURS[-1]
_TRAINING = {"linestyle": "--", "linewidth": 1.5}
_VALIDATION = {"linestyle": "-", "linewidth": 2}
_BASELINES = (("keep_straight", "keep going straight", ":"), ("principal_direction", "principal direction", "-."))
_WITH_OWN_PANEL = ("loss", "angular_error", RECONSTRUCTION_ERROR, WINDOW_LAG)
_HATCHES = ("", "///", "...", "xxx")
_BASELINE = "principal direction"
_LEAST_LIMIT = 0.1  # of the axis of shares
_MOST_WRITTEN = 21  # bars with their value above them


class PanelDrawing(NamedTuple):
    """A panel: its name for `--panels`, or "graph"; the runs that it shows, by their numbers; what draws them; the
    limits of its y axis."""

    name: PanelName | Literal["graph"]
    runs: dict[int, PlottedRun]
    draw: Callable[[Panel, dict[int, PlottedRun]], None]
    limits: tuple[float, float] | None = None


def panel_drawings(runs: Sequence[PlottedRun], names: Sequence[PanelName] = ()) -> list[PanelDrawing]:
    """The panels that these runs have something for, in their order. Losses that cannot be compared have one each.

    Without `names` they are all, but for the tracking of a run alone.
    """
    names = names or [name for name in PANELS if name != "tracking" or len(runs) > 1]
    each = dict(enumerate(runs))
    return [drawing for name in PANELS if name in names for drawing in _drawings_of(name, each) if drawing.runs]


def _drawings_of(name: PanelName, runs: dict[int, PlottedRun]) -> Iterator[PanelDrawing]:
    match name:
        case "loss":
            each = [run.loss_kind for run in runs.values()]
            kinds = [kind for number, kind in enumerate(each) if kind not in each[:number]]
            for kind, text in zip(kinds, kind_names(kinds), strict=True):
                of_kind = {number: run for number, run in runs.items() if run.loss_kind == kind}
                title = "Loss" if len(kinds) == 1 else f"Loss of {text}"
                yield PanelDrawing(name, of_kind, _of_metric("loss", title, "loss (mean over points)"))
        case "angle":
            yield PanelDrawing(name, _having(runs, "angular_error"), _angular_errors)
            draw = _of_metric(RECONSTRUCTION_ERROR, "Reconstruction error", "mean distance (voxels)")
            yield PanelDrawing(name, _having(runs, RECONSTRUCTION_ERROR), draw)
        case "lag":
            draw = _of_metric(WINDOW_LAG, "Window lag", "distance after 20 mm alone (mm)")
            yield PanelDrawing(name, _having(runs, WINDOW_LAG), draw)
        case "monitored":
            monitors = dict.fromkeys(run.history[-1].monitor for run in runs.values())
            for metric in [monitor for monitor in monitors if monitor not in _WITH_OWN_PANEL]:
                yield PanelDrawing(name, _having(runs, metric), _of_metric(metric, "Monitored metric", metric))
        case "gradient":
            yield PanelDrawing(name, _having(runs, "grad_norm"), partial(_each, draw=_norms))
        case "rate":
            yield PanelDrawing(name, runs, partial(_each, draw=draw_rates))
        case "speed":
            speeds = {n: [report.points_per_second for report in run.history] for n, run in runs.items()}
            timed = {n: run for n, run in runs.items() if any(map(math.isfinite, speeds[n]))}
            yield PanelDrawing(name, timed, partial(_each, draw=_speeds))
        case "tracking":
            scored = {n: run for n, run in runs.items() if run.tracking.get("model")}
            yield PanelDrawing(name, scored, _shares)


def _each(panel: Panel, runs: dict[int, PlottedRun], *, draw: Callable[[Panel, PlottedRun, int], None]) -> None:
    for number, run in runs.items():
        draw(panel, run, number)


def _having(runs: dict[int, PlottedRun], metric: str) -> dict[int, PlottedRun]:
    """The runs that know a finite value of a metric."""
    known = lambda run: any(  # noqa: E731
        math.isfinite(part.get(metric, math.nan)) for report in run.history for part in (report.train, report.valid)
    )
    return {number: run for number, run in runs.items() if known(run)}


def _of_metric(metric: str, title: str, unit: str) -> Callable[[Panel, dict[int, PlottedRun]], None]:
    """Draws a metric of each run."""

    def draw(panel: Panel, run: PlottedRun, number: int) -> None:
        panel.name(title, unit)
        _train_and_valid(panel, run, number, metric)

    return partial(_each, draw=draw)


def _ring(panel: Panel, run: PlottedRun, number: int, metric: str) -> None:
    """A ring at the best epoch, where the metric chose it."""
    best = run.history[-1].best
    if best.epoch is None or run.history[-1].monitor != metric:
        return
    ring = {"marker": "o", "markersize": 11, "fillstyle": "none", "markeredgewidth": 2, "linestyle": "none"}
    x, note = _place_of_best(run), f" ({best.epoch})"
    panel.draw(run, x, best.value, number, "best epoch", note=note, colour=_BLACK, **ring)


def _place_of_best(run: PlottedRun) -> float | None:
    """Where the best state is on the axis of epochs; None where there is none."""
    best = run.history[-1].best
    return best.epoch if best.epoch is None or not best.batch else _within(run.history[best.epoch - 1], best.batch)


def _within(report: EpochReport, batch: int) -> float:
    """A place within an epoch on the axis of epochs; of an epoch that has not ended, the last batch is its end."""
    return report.epoch - 1 + batch / max(report.num_batches, batch, 1)


def _angular_errors(panel: Panel, runs: dict[int, PlottedRun]) -> None:
    """Angular errors of the epochs, and of the best model at the points where the baselines give a direction too."""
    panel.name("Angular error", "mean angle (degrees)")
    for number, run in runs.items():
        _train_and_valid(panel, run, number, "angular_error")
        best, value = _place_of_best(run), run.evaluation.model if run.evaluation else math.nan
        if best is not None and math.isfinite(value):
            diamond = {"marker": "D", "markersize": 7, "linestyle": "none"}
            text = "best model"
            panel.draw(run, best, value, number, text, note=f" ({value:.2f}°)", colour=_BLACK, **diamond)
    for name, text, dashes in _BASELINES:  # the same for all runs on the same data
        found = [getattr(run.evaluation, name) for run in runs.values() if run.evaluation is not None]
        values = sorted({round(value, 2) for value in found if value is not None and math.isfinite(value)})
        label = f"{text} ({', '.join(f'{value:.2f}°' for value in values)})"
        for value in values:
            panel.axes.axhline(value, color=GREY, linestyle=dashes, linewidth=1.5, label=label)
            panel.record(text, "baseline", None, value)
            label = None


def _norms(panel: Panel, run: PlottedRun, number: int) -> None:
    panel.name("Gradient", "norm (mean over batches)")
    before, after = (_means(run, "train", name) for name in ("unclipped_grad_norm", "grad_norm"))
    if np.array_equal(before, after, equal_nan=True):
        panel.curve(run, after, number, "not clipped", colour=_BLUE, **_VALIDATION)
    else:
        panel.curve(run, before, number, "before clipping", colour=_BLUE, **_TRAINING)
        panel.curve(run, after, number, "after clipping", colour=_ORANGE, **_VALIDATION)


def draw_rates(panel: Panel, run: PlottedRun, number: int) -> None:
    """The learning rate of each epoch, and its range where it changes within epochs."""
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
            panel.curve(run, values, number, text, colour=GREY, linestyle=":", linewidth=1.5)


def _speeds(panel: Panel, run: PlottedRun, number: int) -> None:
    panel.name("Speed of training", "points per second")
    speeds = [report.points_per_second for report in run.history]
    panel.curve(run, speeds, number, "", colour=_BLUE)


def _train_and_valid(panel: Panel, run: PlottedRun, number: int, metric: str) -> None:
    """The means of the epochs, of validations within them, and a ring at the best epoch."""
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
        panel.draw(run, x, y, number, "validation within epochs", colour=_ORANGE, **style)
    _ring(panel, run, number, metric)


def _means(run: PlottedRun, part: str, metric: str) -> list[float]:
    return [getattr(report, part).get(metric, math.nan) for report in run.history]


def _shares(panel: Panel, runs: dict[int, PlottedRun]) -> None:
    """Bars of the share of valid streamlines of the best models, by protocol, below the line of the baseline."""
    panel.name("Tracking of the best models", "valid streamlines (%)")
    protocols = dict.fromkeys(protocol for run in runs.values() for protocol in run.tracking["model"])
    width = 0.8 / len(runs)
    baselines: set[tuple[int, float]] = set()  # the same for all runs on the same data
    for place, (number, run) in enumerate(runs.items()):
        for group, protocol in enumerate(protocols):
            value = _share(run, "model", protocol)
            if math.isfinite(value):
                x = group + (place + 0.5) * width - 0.4
                hatch = _HATCHES[number // len(COLOURS) % len(_HATCHES)]  # where colours repeat
                colour = COLOURS[number % len(COLOURS)]
                panel.axes.bar(x, value, 0.9 * width, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
                if len(runs) * len(protocols) <= _MOST_WRITTEN:
                    where = {"ha": "center", "va": "bottom", "fontsize": 8}
                    panel.axes.text(x, value, f"{100 * value:.0f}", **where)
                panel.record(run.name or run.label, protocol, run.history[-1].best.epoch, value)
            if math.isfinite(share := _share(run, _BASELINE, protocol)):
                baselines.add((group, share))
    for number, (group, share) in enumerate(sorted(baselines)):
        ends = [group - 0.45, group + 0.45]
        panel.axes.plot(ends, [share] * 2, color=GREY, linestyle="-.", label=None if number else _BASELINE)
        panel.record(_BASELINE, [*protocols][group], None, share)
    panel.scale((0.0, max([_LEAST_LIMIT, *(1.08 * row.value for row in panel.rows)])))
    panel.axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}")
    panel.axes.set_xticks(range(len(protocols)), [*protocols])
    panel.axes.set_xlim(-0.6, len(protocols) - 0.4)
    if baselines:
        panel.axes.legend(framealpha=0.8, edgecolor="none")


def _share(run: PlottedRun, who: str, protocol: str) -> float:
    value = run.tracking.get(who, {}).get(protocol, {}).get("valid")
    return math.nan if value is None else float(value)
