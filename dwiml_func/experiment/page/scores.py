"""The scores of a page: how the best model tracks, beside baselines and ceilings, and its angular error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from dwiml_func.core.report import EpochReport
from dwiml_func.experiment.evaluation import read_evaluation
from dwiml_func.experiment.page.curves import drift_curve
from dwiml_func.experiment.page.html import image, rows_table, tag
from dwiml_func.experiment.reconstruction import read_reconstruction
from dwiml_func.experiment.tracking.evaluation import ORACLE
from dwiml_func.experiment.tracking.recorded import read_drift, read_tracking

__all__ = ["GIVEN", "score_sections"]

GIVEN = {
    "continue": "the first 6 mm of each real streamline are given",
    "free": "seeds anywhere in the mask",
    "core": "seeds on real streamlines",
}
"""What a model is given, by protocol."""

_LABELS = {ORACLE: "oracle (follows the nearest real direction)"}


def score_sections(directory: Path, history: Sequence[EpochReport]) -> Iterator[Element]:
    """The sections of tracking and of directions, or what is missing."""
    best = history[-1].best.epoch
    yield tag("section", tag("h2", "Tracking scores"), *_tracking(directory, best), id="scores")
    yield tag("section", tag("h2", "Best epoch"), *_best(directory, history, best), id="best")


def _tracking(directory: Path, best: int | None) -> Iterator[Element]:
    try:
        found = read_tracking(directory)
    except ValueError as error:
        yield tag("p", str(error))
        return
    if found is None:
        yield tag(
            "p",
            "No tracking is recorded: tracking.json is missing. A run has it where its data say of which bundle each "
            "streamline is.",
        )
        return
    if found.epoch != best:
        yield tag("p", f"These are the scores of epoch {found.epoch}; the best epoch by now is {best}.")
    where = f"{found.subset} subject {found.subject}, steps of {found.step_size:g} mm"
    where += " within the mask" if found.has_mask else ""
    protocols = list(found.shares["model"])
    others = [name for name in found.shares if name != "model"]
    others.sort(key=lambda name: name == ORACLE)
    rows = [
        [_LABELS.get(name, name), *(_share(found.shares[name].get(p)) for p in protocols)]
        for name in ("model", *others)
    ]
    if found.ceiling is not None:
        rows.append(
            [
                "ceiling: half of the real streamlines beside the other half",
                _share(found.ceiling),
                *[""] * (len(protocols) - 1),
            ]
        )
    caption = (
        f"Share of streamlines that run from end to end of a bundle, along it (in brackets: from end to end); {where}"
    )
    yield rows_table(("", *protocols), rows, caption=caption, kind="wide numbers")
    given = [part for name in protocols for part in (tag("dt", name), tag("dd", GIVEN.get(name, "")))]
    yield tag("dl", *given)
    drift = read_drift(directory)
    if drift is not None:
        drawing = drift_curve(drift)
        yield tag("figure", image(drawing.svg, text=drawing.text), class_="drift")


def _best(directory: Path, history: Sequence[EpochReport], best: int | None) -> Iterator[Element]:
    if best is None or best > len(history):
        yield tag("p", f"There is no best epoch: {history[-1].monitor} was never finite.")
        return
    report = history[best - 1]
    inner = f", batch {report.best.batch}" if report.best.batch else ""
    yield tag(
        "p", f"Epoch {best}{inner} of {history[-1].epoch} has the best {report.monitor}, {history[-1].best.value:.6g}."
    )
    names = dict.fromkeys((*report.valid, *report.train))
    rows = [(name, _number(report.train, name), _number(report.valid, name)) for name in names]
    yield rows_table(("mean", "training", "validation"), rows, kind="wide numbers")
    evaluation, reconstruction = read_evaluation(directory), read_reconstruction(directory)
    if evaluation is not None:
        angles = {
            "best model": evaluation.model,
            "principal direction": evaluation.principal_direction,
            "keep going straight": evaluation.keep_straight,
        }
        known = {name: angle for name, angle in angles.items() if angle is not None and math.isfinite(angle)}
        cells = [(name, f"{known[name]:.2f} deg" if name in known else "unknown") for name in angles]
        caption = f"Mean angular error at {evaluation.num_points:,} points that have a previous direction"
        yield rows_table(("", ""), cells, caption=caption)
    elif reconstruction is not None:
        distances = {
            "best model": reconstruction.model,
            "principal components": reconstruction.principal_components,
            "mean streamline": reconstruction.mean_streamline,
        }
        caption = f"Mean distance between {reconstruction.num_streamlines:,} streamlines and their reconstructions"
        cells = [(name, f"{value:.2f} mm") for name, value in distances.items() if value is not None]
        yield rows_table(("", ""), cells, caption=caption)
    else:
        yield tag("p", "The best model is not compared with baselines: evaluation.json is missing.")


def _share(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.2f} ({pair[1]:.2f})"


def _number(means: Mapping[str, Any], name: str) -> str:
    return f"{means[name]:.6g}" if name in means else ""
