"""The summary at the end of a training: the best epoch, and its model compared with the baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dwiml_func._checks import pluralize
from dwiml_func.core.report import EpochReport
from dwiml_func.experiment.evaluation import Evaluation
from dwiml_func.experiment.reconstruction import Reconstruction
from dwiml_func.experiment.tracking.evaluation import ORACLE, TrackingEvaluation
from dwiml_func.experiment.training_config import WINDOW_LAG
from dwiml_func.tracking.protocols import LAG_MM, ProtocolScores

__all__ = ["NO_PRINCIPAL_DIRECTION", "format_degrees", "format_reconstruction", "format_summary", "format_tracking"]

NO_PRINCIPAL_DIRECTION = "unknown: the input has no attribute sh_order (order of its spherical harmonics)"
"""Printed instead of a number without a principal direction to compare with."""

_WHY_STRAIGHT_IS_GOOD = """
Keep going straight repeats the direction of the previous step. Its error is the turn between two steps, which is small
for short steps; a tracker that did this would never turn."""

_GIVEN = {
    "continue": "the first 6 mm of each real streamline are given",
    "free": "1000 seeds anywhere in the mask",
    "core": "500 seeds on real streamlines",
}
_CELL_WIDTH = 15


def format_summary(
    history: Sequence[EpochReport], evaluation: Evaluation | Reconstruction, *, subset: str, tracking: str | None = None
) -> str:
    """The summary as lines of text; `evaluation` is the best model's, on the subset "validation" or "training".

    `tracking` says how it tracks, which is what it is for: so that comes before the angular errors.
    """
    last, best = history[-1], history[(history[-1].best.epoch or 1) - 1]
    minutes = sum(report.train_minutes + report.valid_minutes for report in history)
    reason = {"patience": "stopped early", "max_epochs": "finished", None: "stopped"}[last.stop]
    after = f"batch {last.batch} of epoch {last.epoch}" if last.batch else pluralize(last.epoch, "epoch")
    within, means = f", batch {best.best.batch}" if best.best.batch else "", best.best_means
    lines = [
        f"{reason.capitalize()} after {after}, {_duration(minutes)}.",
        f"Best epoch {best.epoch}{within}: training loss {best.train['loss']:.4f}"
        + (f", validation loss {means['loss']:.4f}" if best.valid and "loss" in means else "")
        + ("" if best.monitor == "loss" else f", monitored {best.monitor} {last.best.value:.4f}"),
        *_window_lags(history, best),
        *([] if tracking is None else [tracking]),
    ]
    if isinstance(evaluation, Reconstruction):
        return "\n".join([*lines, format_reconstruction(evaluation, subset=subset)])
    lines += [
        f"Mean angular error of the best model on the {subset} subjects,",
        f"at the {evaluation.num_points} points of {evaluation.num_streamlines} streamlines that have a previous "
        "direction:",
        f"  model                {format_degrees(evaluation.model)}",
    ]
    for name, value in (
        ("principal direction", evaluation.principal_direction),
        ("keep going straight", evaluation.keep_straight),
    ):
        if value is None:
            lines.append(f"  {name}  {NO_PRINCIPAL_DIRECTION}")
        elif math.isnan(value - evaluation.model):
            lines.append(f"  {name}  {format_degrees(value)}")
        else:
            gain = value - evaluation.model
            verdict = f"the model is {abs(gain):.2f} deg {'better' if gain > 0 else 'worse'}"
            lines.append(f"  {name}  {value:6.2f} deg  ({verdict})")
    if evaluation.first_points is not None:
        lines.append(f"  model, first points  {evaluation.first_points:6.2f} deg  (nothing says which way to go)")
    return "\n".join(lines) + _WHY_STRAIGHT_IS_GOOD * (evaluation.keep_straight < evaluation.model)


def format_degrees(value: float) -> str:
    """A mean angular error; NaN where no streamline has a third point."""
    return "unknown: there are none" if math.isnan(value) else f"{value:6.2f} deg"


def format_reconstruction(evaluation: Reconstruction, *, subset: str) -> str:
    """Distances between streamlines and their reconstructions, beside the baselines that are known."""
    lines = [
        f"Mean distance between the points of {evaluation.num_streamlines} streamlines of the {subset} subjects and "
        "their reconstructions:",
        f"  model                 {evaluation.model:7.2f} mm  (of the streamlines' own means the median is "
        f"{evaluation.median:.2f} mm, the 95th percentile {evaluation.percentile_95:.2f} mm)",
    ]
    if evaluation.principal_components is not None:
        lines.append(
            f"  principal components  {evaluation.principal_components:7.2f} mm  ({evaluation.num_components} of the "
            "training streamlines, without a network)"
        )
    if evaluation.mean_streamline is not None:
        lines.append(f"  mean streamline       {evaluation.mean_streamline:7.2f} mm  (the same for each)")
    return "\n".join(lines)


def _window_lags(history: Sequence[EpochReport], best: EpochReport) -> list[str]:
    """The window lag of the best epoch, and of those that the least lag or loss would have chosen instead."""
    lags = {report.epoch: lag for report in history if (lag := report.valid.get(WINDOW_LAG)) is not None}
    if best.epoch not in lags:
        return []
    how = "up to 60 mm of a streamline are read, 20 mm predicted"
    lines = [f"Window lag of epoch {best.epoch}: {lags[best.epoch]:.2f} mm ({how})"]
    losses = {report.epoch: report.valid["loss"] for report in history if "loss" in report.valid}
    for name, values in (("window lag", lags), ("validation loss", losses)):
        least = min(values, key=lambda epoch: (values[epoch], epoch), default=best.epoch)
        if least != best.epoch and least in lags:
            difference = lags[least] - lags[best.epoch]
            change = f"{abs(difference):.2f} mm {'more' if difference > 0 else 'less'}"
            lines.append(f"The least {name} is that of epoch {least}, window lag {lags[least]:.2f} mm, {change}")
    return lines


def _duration(minutes: float) -> str:
    return f"{60 * minutes:.1f} seconds" if minutes < 1 else f"{minutes:.1f} minutes"


def format_tracking(evaluation: TrackingEvaluation) -> str:
    """Shares of valid streamlines by protocol, beside the ceiling and the baselines; and the lag."""
    protocols = list(evaluation.scores["model"])
    where = " within the mask" if evaluation.has_mask else ""
    lines = [
        f"Tracking on {evaluation.subset} subject {evaluation.subject}, steps of {evaluation.step_size:g} mm{where}:",
        "share of streamlines that run from end to end of a bundle, along it (in brackets: from end to end)",
        _tracking_row("", [str(protocol) for protocol in protocols]),
    ]
    lines += [
        _tracking_row(name, [_share(evaluation.scores[name][protocol]) for protocol in protocols])
        for name in ("model", "principal direction", "keep going straight")
        if name in evaluation.scores
    ]
    if ORACLE in evaluation.scores:
        cells = [_share(evaluation.scores[ORACLE][protocol]) for protocol in protocols]
        lines.append(_tracking_row("oracle", cells) + "  follows the nearest real direction")
    if evaluation.ceiling_valid is not None:
        real = f"{evaluation.ceiling_valid:.2f} ({evaluation.ceiling_both_ends:.2f})"
        lines.append(_tracking_row("real streamlines", [real]) + "  half of them beside the other half")
    lines += [f"  {protocol}: {_GIVEN[protocol]}" for protocol in protocols]
    lag = evaluation.scores["model"]["continue"].lag_mm or ()
    known = [(way, value) for way, value in zip(LAG_MM, lag, strict=False) if math.isfinite(value)]
    if known:
        ways = ", ".join(f"{way:g}" for way, _ in known)
        values = ", ".join(f"{value:.1f}" for _, value in known)
        lines.append(f"Mean distance from the real streamline after {ways} mm: {values} mm")
    return "\n".join(lines)


def _tracking_row(name: str, cells: list[str]) -> str:
    return (f"  {name:<19}" + "".join(f"  {cell:<{_CELL_WIDTH}}" for cell in cells)).rstrip()


def _share(scores: ProtocolScores) -> str:
    return f"{scores.valid:.2f} ({scores.both_ends:.2f})"
