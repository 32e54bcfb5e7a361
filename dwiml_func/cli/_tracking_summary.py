"""The part of a training's summary that says how well the best model tracks."""

from __future__ import annotations

import math

from dwiml_func.experiment.tracking.evaluation import ORACLE, TrackingEvaluation
from dwiml_func.tracking.protocols import LAG_MM, ProtocolScores

__all__ = ["format_tracking"]

_GIVEN = {
    "continue": "the first 6 mm of each real streamline are given",
    "free": "1000 seeds anywhere in the mask",
    "core": "500 seeds on real streamlines",
}
_WIDTH = 15


def format_tracking(evaluation: TrackingEvaluation) -> str:
    """Shares of valid streamlines by protocol, beside the ceiling and the baselines; and the lag."""
    protocols = list(evaluation.scores["model"])
    where = " within the mask" if evaluation.has_mask else ""
    lines = [
        f"Tracking on {evaluation.subset} subject {evaluation.subject}, steps of {evaluation.step_size:g} mm{where}:",
        "share of streamlines that run from end to end of a bundle, along it (in brackets: from end to end)",
        _row("", [str(protocol) for protocol in protocols]),
    ]
    lines += [
        _row(name, [_share(evaluation.scores[name][protocol]) for protocol in protocols])
        for name in ("model", "principal direction", "keep going straight")
        if name in evaluation.scores
    ]
    if ORACLE in evaluation.scores:
        cells = [_share(evaluation.scores[ORACLE][protocol]) for protocol in protocols]
        lines.append(_row("oracle", cells) + "  follows the nearest real direction")
    if evaluation.ceiling_valid is not None:
        real = f"{evaluation.ceiling_valid:.2f} ({evaluation.ceiling_both_ends:.2f})"
        lines.append(_row("real streamlines", [real]) + "  half of them beside the other half")
    lines += [f"  {protocol}: {_GIVEN[protocol]}" for protocol in protocols]
    lag = evaluation.scores["model"]["continue"].lag_mm or ()
    known = [(way, value) for way, value in zip(LAG_MM, lag, strict=False) if math.isfinite(value)]
    if known:
        ways = ", ".join(f"{way:g}" for way, _ in known)
        values = ", ".join(f"{value:.1f}" for _, value in known)
        lines.append(f"Mean distance from the real streamline after {ways} mm: {values} mm")
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return (f"  {name:<19}" + "".join(f"  {cell:<{_WIDTH}}" for cell in cells)).rstrip()


def _share(scores: ProtocolScores) -> str:
    return f"{scores.valid:.2f} ({scores.both_ends:.2f})"
