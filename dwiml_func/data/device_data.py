"""A dataset in the memory of a device, and batches that are made there.

The host decides what is in a batch: which streamlines, where they are split, which are reversed, and the noise. That is
a plan: a batch whose points are numbers of rows of the dataset. The device gathers, adds the noise and interpolates. So
points, targets and order are bitwise those of `load_batch`; interpolated inputs are too, where the device adds eight
numbers as the CPU does. Streamlines that a run resamples are resampled once, on the host, before they are copied: to
rounding the points that `load_batch` makes of them batch by batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.interpolation import FlatVolumes
from dwiml_func.data.loader import BatchRequest, LoaderSpec, noise_of, split_and_reverse
from dwiml_func.data.neighborhood import direction_units, neighborhood_vectors
from dwiml_func.data.resampling import resample_streamlines
from dwiml_func.data.shards import ShardedBatch
from dwiml_func.data.streamlines import Streamlines, consecutive_rows, input_rows, join_streamlines

__all__ = ["DeviceData", "copy_to_device", "device_bytes", "make_on_device", "plan_batch"]

_CHUNK = 10_000  # streamlines that are resampled at once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceData:
    """The streamlines and the volumes of a dataset on a device.

    points: (P, 3) float32 on the device, of all streamlines, sampled as the run asks for.
    offsets: (S + 1,) int64 on the host.
    volumes: on the device; None where nothing reads them.
    units: (num_subjects, 3) on the device, see `direction_units`; None where all are 1.
    vectors: (V, 3) on the device, of the neighbourhood; None without one.
    """

    dataset: StreamlineDataset
    points: Tensor
    offsets: NDArray[np.int64]
    volumes: FlatVolumes | None
    units: Tensor | None
    vectors: Tensor | None


def device_bytes(dataset: StreamlineDataset) -> int:
    """Bytes of a dataset's streamlines, as stored, and volumes."""
    num_values = sum(int(np.prod(shape, dtype=np.int64)) for shape in dataset.volume_shapes)
    return 4 * num_values + 12 * int(dataset.streamlines.lengths.sum())


def copy_to_device(dataset: StreamlineDataset, spec: LoaderSpec, device: torch.device) -> DeviceData:
    """Copy what batches of a spec read to a device; lazy volumes are read one at a time."""
    lines = dataset.streamlines if spec.resampling == dataset.resampling else _resampled(dataset, spec)
    units, shapes = direction_units(dataset.voxel_sizes), dataset.volume_shapes
    reads_volumes = bool(shapes) and not spec.streamlines_only
    return DeviceData(
        dataset=dataset,
        points=lines.points.to(device),
        offsets=lines.offsets.numpy(),
        volumes=FlatVolumes.of(dataset.volumes, shapes, device) if reads_volumes else None,
        units=units.to(device) if (units != 1).any() else None,
        vectors=None if spec.neighborhood is None else neighborhood_vectors(spec.neighborhood).to(device),
    )


def _resampled(dataset: StreamlineDataset, spec: LoaderSpec) -> Streamlines:
    parts = []
    for ids in np.split(np.arange(dataset.index.num_total), range(_CHUNK, dataset.index.num_total, _CHUNK)):
        sizes = dataset.voxel_sizes[torch.from_numpy(dataset.index.subject_of(ids))]
        parts.append(resample_streamlines(dataset.streamlines.select(ids), sizes, spec.resampling))
    return join_streamlines(parts)


def plan_batch(request: BatchRequest, *, data: DeviceData, spec: LoaderSpec) -> StreamlineBatch:
    """The host's part of a batch: rows of `data.points` as points (P,), noise as noisy points, and no inputs."""
    starts, ends = (torch.from_numpy(data.offsets[request.ids + after]) for after in (0, 1))
    lines = Streamlines(*consecutive_rows(starts, ends - starts))
    lines, ids, subject = split_and_reverse(lines, request, dataset=data.dataset, spec=spec)
    num_points = len(lines.points)
    noise, noise_of_targets = noise_of(num_points, request, spec.augmentation)
    return StreamlineBatch(
        points=lines.points,
        offsets=lines.offsets,
        subject=subject,
        ids=ids,
        inputs=torch.empty(num_points if spec.add_eos or spec.streamlines_only else num_points - len(lines), 0),
        noisy_points=noise,
        noisy_targets=noise_of_targets,
    )


def make_on_device(
    plan: StreamlineBatch | ShardedBatch, *, data: DeviceData, spec: LoaderSpec
) -> StreamlineBatch | ShardedBatch:
    """Make the batch, or the shards, of a plan that was moved to the device. No device is waited for."""
    if isinstance(plan, ShardedBatch):
        return plan.mapped(lambda shard: _made(shard, data, spec))
    return _made(plan, data, spec)


def _made(plan: StreamlineBatch, data: DeviceData, spec: LoaderSpec) -> StreamlineBatch:
    points = data.points.index_select(0, plan.points)
    inputs = plan.inputs if data.volumes is None else _inputs(points, plan, data.volumes, data, spec)
    if data.units is not None:
        lengths = plan.offsets.diff()
        points = points * data.units[plan.subject].repeat_interleave(lengths, dim=0, output_size=len(points))
    noise, targets = plan.noisy_points, plan.noisy_targets
    return replace(
        plan,
        points=points,
        inputs=inputs,
        noisy_points=None if noise is None else points + noise,
        noisy_targets=None if targets is None else points + targets,
    )


def _inputs(points: Tensor, plan: StreamlineBatch, volumes: FlatVolumes, data: DeviceData, spec: LoaderSpec) -> Tensor:
    """(N, F): what `load_batch` reads subject by subject, of all subjects at once."""
    if not plan.has_last_points:
        points = points.index_select(0, input_rows(plan.offsets, len(points)))
    num_rows, subject = len(points), None
    if len(data.dataset.index.subjects) > 1:
        subject = plan.subject.repeat_interleave(plan.input_offsets.diff(), output_size=num_rows)
    if data.vectors is not None:
        points = (points[:, None, :] + data.vectors).reshape(-1, 3)
        subject = None if subject is None else subject.repeat_interleave(len(data.vectors), output_size=len(points))
    return volumes.read(points, subject, mode=spec.interpolation).reshape(num_rows, -1)
