"""How well a run's best model tracks on a held-out subject, beside baselines, in `tracking.json`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dwiml_func.core.rng import Key
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.grid import Grid
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.tracking.case import ORACLE, tracking_case
from dwiml_func.experiment.tracking.recorded import TRACKING_FILE, Drift, ShownLines, TrackedLines
from dwiml_func.files.json import write_checked
from dwiml_func.models.tractography_model import TractographyModel
from dwiml_func.tracking.protocols import DRIFT_MM, Protocol, ProtocolScores
from dwiml_func.tracking.space import TrackingSpace
from dwiml_func.tracking.spec import TrackingSpec

__all__ = [
    "ORACLE",
    "TrackingEvaluation",
    "evaluate_tracking",
    "write_tracking_evaluation",
]

_MOST_SHOWN = 300  # streamlines of a protocol that are kept for figures


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingEvaluation:
    """Scores of tracking on one subject.

    scores: by who tracked ("model", "principal direction", "keep going straight", `ORACLE`), then by protocol.
    ceiling_valid, ceiling_both_ends: what half of the real streamlines reaches beside the other half; None where there
        are too few.
    step_size: mm.
    has_mask: whether lines stay within a mask, in which free seeds lie.
    drift: by who tracked, of *continue*.
    lines: the model's, for a figure; they are not written.
    """

    subject: str
    subset: str
    step_size: float
    has_mask: bool
    scores: dict[str, dict[Protocol, ProtocolScores]]
    ceiling_valid: float | None
    ceiling_both_ends: float | None
    drift: Drift | None = None
    lines: TrackedLines | None = field(default=None, repr=False, compare=False)


def evaluate_tracking(
    model: TractographyModel, dataset: StreamlineDataset, config: RunConfig
) -> TrackingEvaluation | None:
    """Track in the first subject of a dataset; None where it does not say of which bundle its streamlines are, where
    they have no even steps, or a bundle has a single one. The model is in evaluation mode, on the CPU.
    """
    case = tracking_case(dataset, config) if hasattr(model, "run_step") else None
    if case is None:
        return None
    case = case._replace(spec=_readable(case.spec, model))
    trackers: dict[str, tuple[Any, TrackingSpace]] = {"model": (model, case.space), **case.baselines()}
    key = Key(config.training.rng)
    scores: dict[str, dict[Protocol, ProtocolScores]] = {}
    drift: dict[str, tuple[float | None, ...]] = {}
    shown: dict[Protocol, ShownLines] = {}
    for name, (tracker, where) in trackers.items():
        tracked = case.track(tracker, where, key=key)
        scores[name] = {protocol: lines.scores for protocol, lines in tracked.items()}
        drift[name] = tracked["continue"].drift_mm or ()
        if name == "model":
            shown = {
                protocol: _shown(found.lines, found.found.bundle, found.found.valid, case.grid, dataset.voxel_sizes[0])
                for protocol, found in tracked.items()
            }
    ceiling, sizes = case.ceiling(), dataset.voxel_sizes[0]
    names = tuple(reference.name for reference in case.references)
    of_real = np.array([names.index(case.bundles.names[number]) for number in case.bundles.ids])
    return TrackingEvaluation(
        subject=case.subject,
        subset=dataset.subset,
        step_size=case.spec.step_size,
        has_mask=case.mask is not None,
        scores=scores,
        ceiling_valid=None if ceiling is None else ceiling.all.valid,
        ceiling_both_ends=None if ceiling is None else ceiling.all.both_ends,
        drift=Drift(DRIFT_MM, drift),
        lines=TrackedLines(
            names, _shown(case.in_mm, of_real, np.ones(len(of_real), dtype=bool), case.grid, sizes), shown
        ),
    )


def write_tracking_evaluation(directory: str | Path, evaluation: TrackingEvaluation, *, epoch: int) -> None:
    """Write the scores of a run's best model, of a best epoch."""
    values = {each.name: getattr(evaluation, each.name) for each in fields(evaluation) if each.name != "lines"}
    values["scores"] = {
        name: {protocol: found._asdict() for protocol, found in by_protocol.items()}
        for name, by_protocol in evaluation.scores.items()
    }
    values["drift"] = None if evaluation.drift is None else evaluation.drift._asdict()
    write_checked(Path(directory) / TRACKING_FILE, {"epoch": epoch, **values})


def _readable(spec: TrackingSpec, model: TractographyModel) -> TrackingSpec:
    """The options for lines that are at most as long as a transformer can read."""
    max_len = getattr(model, "max_len", None)
    if max_len is None or max_len >= spec.max_steps:
        return spec
    longest = max_len * spec.step_size
    return replace(spec, max_length=longest, min_length=min(spec.min_length, longest))


def _shown(
    lines: Streamlines, bundle: NDArray[np.int64], valid: NDArray[np.bool_], grid: Grid, voxel_sizes: Tensor
) -> ShownLines:
    """At most 300 of streamlines in mm from the corner of the grid."""
    rows = np.linspace(0, len(lines) - 1, min(len(lines), _MOST_SHOWN)).round().astype(np.int64)
    chosen = lines.select(rows)
    affine = torch.from_numpy(grid.affine)
    points = (chosen.points / voxel_sizes - 0.5).double() @ affine[:3, :3].T + affine[:3, 3]
    return ShownLines(Streamlines(points.float(), chosen.offsets), bundle[rows], valid[rows])
