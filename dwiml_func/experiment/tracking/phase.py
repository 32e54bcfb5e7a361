"""The tracking phase of a run's validations, as dwi_ml has it: where do lines end that the model continues?

One more batch, of whole streamlines, follows the validation's own. Source: dwi_ml, `trainers_withGV.py`; there the step
size in mm counts as voxels, here all is in mm.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwiml_func.core.batch_source import Batches
from dwiml_func.core.epoch import EvalStep
from dwiml_func.core.metrics import weighted_sum
from dwiml_func.core.rng import Key, Stream, fold_in, numpy_rng
from dwiml_func.core.state import TrainState
from dwiml_func.core.weights import load_into
from dwiml_func.data.creation.connectivity import Connectivity, read_connectivity
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.hdf5.layout import group_of, read_volume, subject_group
from dwiml_func.data.hdf5.problems import open_hdf5, raise_first
from dwiml_func.data.resampling import resample_streamlines
from dwiml_func.data.streamlines import Streamlines, pieces, scale_streamlines
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.tracking.lag_validation import Followed, space_of_subject
from dwiml_func.experiment.training_config import PHASE_METRICS
from dwiml_func.tracking.connectivity import (
    connection_counts,
    connectivity_scores,
    end_points,
    regions_of_blocs,
    regions_of_labels,
)
from dwiml_func.tracking.distances import final_distances, line_lengths
from dwiml_func.tracking.space import TrackingMask
from dwiml_func.tracking.spec import TrackingSpec
from dwiml_func.tracking.window_lag import continue_lines
from dwiml_func.types import Metrics, Optimizer

__all__ = ["TrackingPhase", "open_phase", "with_tracking_phase"]

_MOST_LINES = 1000
_LONGEST_MM = 200.0
_LINES = 0x6E6  # of the tracking stream's random numbers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrackingPhase:
    """The streamlines of a tracking phase in voxel space, subject by subject; masks and connectivity by subject."""

    real: Streamlines
    subject: Tensor
    masks: tuple[Tensor, ...]
    connectivity: tuple[Connectivity | None, ...]
    step_size: float


def with_tracking_phase(
    valid: Batches,
    evaluate: EvalStep,
    *,
    config: RunConfig,
    dataset: StreamlineDataset,
    model: Any,
    optimizer: Optimizer,
) -> tuple[Batches, EvalStep]:
    """Validation batches followed by a tracking phase, where one is due, and the step that also runs it."""
    phase, tracker = open_phase(config, dataset), copy.deepcopy(model).eval()

    def batches(key: Key, epoch: int, start_batch: int) -> Any:
        own: Any = valid(key, epoch, start_batch)
        is_due = (epoch + 1) % config.training.tracking_phase_frequency == 0
        return Followed(own, phase) if is_due else own

    def step(state: TrainState, batch: Any) -> Metrics:
        if not isinstance(batch, TrackingPhase):
            return evaluate(state, batch)
        load_into(tracker, state, optimizer=optimizer)
        return _measure(tracker, batch, config, dataset)

    return batches, step


def open_phase(config: RunConfig, dataset: StreamlineDataset) -> TrackingPhase:
    """Read masks and connectivity, and choose streamlines: all of them, or 1,000 at random, the same in all runs."""
    ids = numpy_rng(fold_in(Key(0), Stream.TRACK, _LINES)).permutation(dataset.index.num_total)
    ids = np.sort(ids[:_MOST_LINES])
    subject = torch.from_numpy(dataset.index.subject_of(ids))
    sizes = dataset.voxel_sizes[subject]
    real = resample_streamlines(dataset.streamlines.select(ids), sizes, config.batches.resampling)
    in_mm = scale_streamlines(real, sizes)
    steps = line_lengths(in_mm) / (real.lengths.numpy() - 1)
    masks, connectivity = [], []
    with open_hdf5(dataset.path) as file:
        for name in dataset.index.subjects:
            parent = raise_first(subject_group(file, name), dataset.path)
            mask = raise_first(group_of(parent, config.training.tracking_mask or "", "volume"), dataset.path)
            lines = raise_first(group_of(parent, config.data.streamline_group_name, "streamlines"), dataset.path)
            masks.append(torch.from_numpy(raise_first(read_volume(mask), dataset.path)[..., 0]))
            connectivity.append(read_connectivity(lines))
    return TrackingPhase(
        real=real,
        subject=subject,
        masks=tuple(masks),
        connectivity=tuple(connectivity),
        step_size=config.batches.step_size or float(np.median(steps)),
    )


def _measure(model: Any, phase: TrackingPhase, config: RunConfig, dataset: StreamlineDataset) -> Metrics:
    spec = TrackingSpec(step_size=phase.step_size, theta=180.0, min_length=0.0, discard_last_point=True)
    num_given = config.training.tracking_phase_nb_segments_init + 1
    num_ahead = math.floor(_LONGEST_MM / spec.step_size) - num_given
    if (max_len := getattr(model, "max_len", None)) is not None:  # of a transformer
        num_ahead = min(num_ahead, max_len - num_given)
    space_of, distances, scores = space_of_subject(config, dataset, model), [], []
    for row in phase.subject.unique().tolist():
        real = phase.real.select((phase.subject == row).nonzero()[:, 0])
        space = space_of(row)
        space = replace(space, mask=TrackingMask(values=phase.masks[row].to(space.volume.device)))
        given = _first_points(real, num_given)
        lines = continue_lines(given, model=model, space=space, spec=spec, distance=num_ahead * spec.step_size)
        sizes = torch.tensor(space.voxel_sizes)
        in_mm = (scale_streamlines(each, sizes) for each in (lines, real))
        distances.append(final_distances(*in_mm))
        if (known := phase.connectivity[row]) is not None:
            ends = np.stack([end_points(real)[:, 0], end_points(lines)[:, 1]], axis=1)
            regions = _regions(known, ends, space.volume.shape)
            scores.append((len(real), connectivity_scores(connection_counts(regions, len(known.matrix)), known.matrix)))
    all_distances = np.concatenate(distances)
    metrics = {PHASE_METRICS[0]: weighted_sum(float(all_distances.mean()), len(all_distances))}
    if scores:
        weights = [num for num, _ in scores]
        for place, name in enumerate(PHASE_METRICS[1:]):
            mean = float(np.average([score[place] for _, score in scores], weights=weights))
            metrics[name] = weighted_sum(mean, sum(weights))
    return metrics


def _first_points(lines: Streamlines, num: int) -> Streamlines:
    """The first points of each line: `num`, or all of a shorter one."""
    return pieces(lines.points, lines.offsets[:-1], lines.lengths.clamp(max=num))


def _regions(known: Connectivity, ends: np.ndarray, shape: torch.Size) -> np.ndarray:
    if known.labels is not None:
        return regions_of_labels(ends, known.labels)
    assert known.blocs is not None
    return regions_of_blocs(ends, (shape[0], shape[1], shape[2]), known.blocs)
