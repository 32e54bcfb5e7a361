"""How well a run's best model tracks on a held-out subject, beside baselines, in `tracking.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwiml_func.core.rng import Key
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.hdf5.layout import group_of, read_volume, subject_group
from dwiml_func.data.hdf5.problems import open_hdf5, raise_first
from dwiml_func.data.resampling import resample_streamlines
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.experiment.config import RunConfig
from dwiml_func.files.atomic import atomic_write
from dwiml_func.files.json import null_if_not_finite
from dwiml_func.models.tractography_model import TractographyModel
from dwiml_func.tracking.baselines import KeepStraight, PrincipalDirection
from dwiml_func.tracking.protocols import Protocol, ProtocolScores, score_protocols
from dwiml_func.tracking.scores import ceiling_scores, reference_bundles
from dwiml_func.tracking.space import TrackingMask, TrackingSpace
from dwiml_func.tracking.spec import TrackingSpec
from dwiml_func.tracking.window_lag import even_step

__all__ = ["MASK_GROUP", "TrackingEvaluation", "evaluate_tracking", "write_tracking_evaluation"]

MASK_GROUP = "wm_mask"
"""The volume group that, where a subject has it, holds the mask of seeds and lines (or --tracking-mask)."""

_NAME = "tracking.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingEvaluation:
    """Scores of tracking on one subject.

    scores: by who tracked ("model", "principal direction", "keep going straight"), then by protocol.
    ceiling_valid, ceiling_both_ends: what half of the real streamlines reaches beside the other half; None where there
        are too few.
    step_size: mm.
    has_mask: whether lines stay within a mask, in which free seeds lie.
    """

    subject: str
    subset: str
    step_size: float
    has_mask: bool
    scores: dict[str, dict[Protocol, ProtocolScores]]
    ceiling_valid: float | None
    ceiling_both_ends: float | None


def evaluate_tracking(
    model: TractographyModel, dataset: StreamlineDataset, config: RunConfig
) -> TrackingEvaluation | None:
    """Track in the first subject of a dataset; None where it does not say of which bundle its streamlines are, where
    they have no even steps, or a bundle has a single one. The model is in evaluation mode, on the CPU.
    """
    if dataset.bundles is None or not hasattr(model, "run_step"):
        return None
    numbers = torch.arange(int(dataset.index.num_streamlines[0]))
    bundles = Bundles(dataset.bundles.names, dataset.bundles.ids[: len(numbers)])
    x, y, z = dataset.voxel_sizes[0].tolist()
    sizes = dataset.voxel_sizes[:1].expand(len(numbers), 3)
    real = resample_streamlines(dataset.streamlines.select(numbers), sizes, config.batches.resampling)
    step = even_step(real, sizes)
    counts = torch.bincount(torch.from_numpy(bundles.ids), minlength=len(bundles.names))
    if step is None or (counts == 1).any() or counts.sum() == 0:
        return None
    in_mm = Streamlines(real.points * dataset.voxel_sizes[0], real.offsets)
    references = reference_bundles(in_mm, bundles)
    mask = _mask(dataset, dataset.index.subjects[0], config.training.tracking_mask or MASK_GROUP)
    space = TrackingSpace(
        volume=dataset.volumes[0],
        voxel_sizes=(x, y, z),
        mask=None if mask is None else TrackingMask(values=mask),
        interpolation=config.data.interpolation,
        neighborhood=config.data.neighborhood,
    )
    trackers: dict[str, Any] = {"model": model, "keep going straight": KeepStraight()}
    if "sh_order" in dataset.input_attributes:
        trackers["principal direction"] = PrincipalDirection(dataset.input_attributes)
    spec = TrackingSpec(step_size=config.batches.step_size or round(step, 3))
    scores = {
        name: score_protocols(
            tracker, real, bundles, references, space=space, spec=spec, seeding_mask=mask, key=Key(config.training.rng)
        )
        for name, tracker in trackers.items()
    }
    ceiling = ceiling_scores(in_mm, bundles, voxel_sizes=(x, y, z), key=Key(0))
    return TrackingEvaluation(
        subject=dataset.index.subjects[0],
        subset=dataset.subset,
        step_size=spec.step_size,
        has_mask=mask is not None,
        scores=scores,
        ceiling_valid=None if ceiling is None else ceiling.all.valid,
        ceiling_both_ends=None if ceiling is None else ceiling.all.both_ends,
    )


def write_tracking_evaluation(directory: str | Path, evaluation: TrackingEvaluation, *, epoch: int) -> None:
    """Write the scores of a run's best model, of a best epoch."""
    scores = {
        name: {protocol: found._asdict() for protocol, found in by_protocol.items()}
        for name, by_protocol in evaluation.scores.items()
    }
    values: dict[str, Any] = {"epoch": epoch, **asdict(evaluation), "scores": scores}
    atomic_write(Path(directory) / _NAME, json.dumps(null_if_not_finite(values), indent=2) + "\n")


def _mask(dataset: StreamlineDataset, subject: str, name: str) -> Tensor | None:
    with open_hdf5(dataset.path) as file:
        parent = raise_first(subject_group(file, subject), dataset.path)
        if name not in parent:
            return None
        group = raise_first(group_of(parent, name, "volume"), dataset.path)
        values = raise_first(read_volume(group), dataset.path)
    mask = torch.from_numpy(values[..., 0])
    return mask if mask.shape == dataset.volumes[0].shape[:3] and bool((mask > 0).any()) else None
