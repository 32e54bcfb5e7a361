"""From streamline ids to a batch with its inputs, alone or as the collate function of a torch DataLoader."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dwiml_func.core.rng import Key
from dwiml_func.data.augmentation import (
    Augmentation,
    Kind,
    normal_noise,
    reverse_streamlines,
    rng_of,
    split_streamlines,
)
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.interpolation import Interpolation
from dwiml_func.data.neighborhood import Neighborhood, direction_units, interpolate_neighborhood
from dwiml_func.data.resampling import Resampling, resample_others, resample_streamlines
from dwiml_func.data.sampler import EpochPlan, SamplerSpec, sample_epoch
from dwiml_func.data.streamlines import Streamlines, input_rows, scale_streamlines
from dwiml_func.data.workers import WorkerLoader

__all__ = ["BatchRequest", "LoaderSpec", "epoch_batches", "load_batch", "noise_of", "split_and_reverse"]


class BatchRequest(NamedTuple):
    """Which batch to load: a few hundred bytes to send to a worker.

    Args:
        ids: (S,) int64, streamline ids in the dataset.
        key: of the stream of augmentation; `load_batch` folds epoch and batch in. None without augmentation.
        epoch: the epoch of the batch, 0 for the first.
        batch: its position in the epoch, 0 for the first.

    Example:
        >>> BatchRequest(np.array([3, 1]), None, epoch=0, batch=7).batch
        7
    """

    ids: NDArray[np.int64]
    key: Key | None
    epoch: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderSpec:
    """How a batch is made from its streamlines.

    Args:
        interpolation: "trilinear", "trilinear-corner" or "nearest", see `dwiml_func.data.interpolation.interpolate`.
        neighborhood: where around each point the volume is read too; None for the point alone.
        resampling: how streamlines are sampled; what the file has already is not done again.
        augmentation: for training batches only; validation takes a spec without.
        add_eos: read the volume at the last point of each streamline too, for models that learn the end of streamlines.
        streamlines_only: for models that read nothing but streamlines of one number of points: the inputs have a row of
            no features at every point, and halves of split streamlines are resampled as whole ones are.

    Example:
        >>> LoaderSpec(augmentation=Augmentation(reverse_ratio=0.5)).interpolation
        'trilinear'
    """

    interpolation: Interpolation = "trilinear"
    neighborhood: Neighborhood | None = None
    resampling: Resampling = field(default_factory=Resampling)
    augmentation: Augmentation = field(default_factory=Augmentation)
    add_eos: bool = False
    streamlines_only: bool = False

    def num_inputs(self, dataset: StreamlineDataset) -> int:
        """Features of a batch's inputs at a point: those of the volume, at the point and at each neighbour."""
        if self.streamlines_only:
            return 0
        return dataset.num_features * (self.neighborhood.num_points if self.neighborhood else 1)


def load_batch(request: BatchRequest, *, dataset: StreamlineDataset, spec: LoaderSpec) -> StreamlineBatch:
    """Gather the streamlines of a request and interpolate their subjects' volumes along them.

    In this order: resampling, splitting, reversing, interpolation of the inputs, noise. Where a subject's voxels are no
    cubes, the batch's points are in mm along the voxel axes, so angles, lengths and noise are those of space. Pure: the
    same arguments give the same bytes, in any process, on any number of threads, from memory or lazily.

    Args:
        request: which streamlines, and with augmentation the key.
        dataset: where they are.
        spec: how to make the batch.

    Returns:
        The batch, its streamlines in the order of `request.ids`, in new memory. The halves of a split streamline
        are neighbours with the same id.

    Raises:
        ValueError: there is augmentation and no key, or no such interpolation; or what a lazy dataset reads is not
            finite, or corrupt.

    Example:
        >>> from pathlib import Path
        >>> from dwiml_func.data.dataset import DatasetIndex
        >>> from dwiml_func.data.streamlines import Streamlines
        >>> dataset = StreamlineDataset(
        ...     path=Path("example.hdf5"),
        ...     subset="training",
        ...     index=DatasetIndex(("subj0",), np.array([1])),
        ...     volumes=(torch.ones(4, 4, 4, 2),),
        ...     streamlines=Streamlines.from_list([[[0, 0, 0], [1, 0, 0], [2, 1, 0]]]),
        ...     voxel_sizes=torch.ones(1, 3),
        ...     input_attributes={},
        ... )
        >>> batch = load_batch(BatchRequest(np.array([0]), None, 0, 0), dataset=dataset, spec=LoaderSpec())
        >>> batch.inputs.shape
        torch.Size([2, 2])
    """
    lines = dataset.streamlines.select(request.ids)
    if spec.resampling != dataset.resampling:
        sizes = dataset.voxel_sizes[torch.from_numpy(dataset.index.subject_of(request.ids))]
        lines = resample_streamlines(lines, sizes, spec.resampling)
    lines, ids, subject = split_and_reverse(lines, request, dataset=dataset, spec=spec)
    inputs = _inputs(lines, subject, dataset, spec)
    units = direction_units(dataset.voxel_sizes)
    if (units != 1).any():
        lines = scale_streamlines(lines, units[subject])
    forward, targets = noise_of(len(lines.points), request, spec.augmentation)
    return StreamlineBatch(
        points=lines.points,
        offsets=lines.offsets,
        subject=subject,
        ids=ids,
        inputs=inputs,
        noisy_points=None if forward is None else lines.points + forward,
        noisy_targets=None if targets is None else lines.points + targets,
    )


def split_and_reverse(
    lines: Streamlines, request: BatchRequest, *, dataset: StreamlineDataset, spec: LoaderSpec
) -> tuple[Streamlines, Tensor, Tensor]:
    """Split and reverse the streamlines of a request: those that result, their ids and their subjects."""
    augmentation = spec.augmentation
    if augmentation.needs_key and request.key is None:
        raise ValueError("Augmentation needs random numbers. Expected a key in the request. Received: None")
    ids = torch.from_numpy(np.array(request.ids))  # copied: torch warns when it wraps a read-only array
    subject = torch.from_numpy(dataset.index.subject_of(request.ids))
    rng = _rng(request)
    if augmentation.split_ratio > 0:
        lines, origin = split_streamlines(lines, augmentation.split_ratio, rng(Kind.SPLIT))
        ids, subject = ids[origin], subject[origin]
        if spec.streamlines_only:
            lines = resample_others(lines, dataset.voxel_sizes[subject], spec.resampling)
    if augmentation.reverse_ratio > 0:
        lines = reverse_streamlines(lines, augmentation.reverse_ratio, rng(Kind.REVERSE))
    return lines, ids, subject


def noise_of(num_points: int, request: BatchRequest, augmentation: Augmentation) -> tuple[Tensor | None, Tensor | None]:
    """(num_points, 3) noise of the points that the model sees, and of those of the targets; None for none."""
    forward, targets = augmentation.noise_gaussian_size_forward, augmentation.noise_gaussian_size_loss
    rng = _rng(request)
    return (
        normal_noise(num_points, forward, rng(Kind.NOISE_FORWARD)) if forward > 0 else None,
        normal_noise(num_points, targets, rng(Kind.NOISE_LOSS)) if targets > 0 else None,
    )


def _rng(request: BatchRequest) -> Callable[[Kind], np.random.Generator]:
    return partial(rng_of, request.key or Key(0), request.epoch, request.batch)  # Key(0): without augmentation, unused


def _inputs(lines: Streamlines, subject: Tensor, dataset: StreamlineDataset, spec: LoaderSpec) -> Tensor:
    """(N, F): each subject's volume along its streamlines, with `add_eos` at all points, else at all but the last."""
    if spec.streamlines_only:
        return torch.empty(len(lines.points), 0)
    # index_select and index_copy_ move whole rows, several times faster than indexing.
    points, lengths = lines.points, lines.lengths
    if not spec.add_eos:
        points, lengths = points.index_select(0, input_rows(lines.offsets, len(points))), lengths - 1
    interpolated = partial(interpolate_neighborhood, neighborhood=spec.neighborhood, mode=spec.interpolation)
    numbers = subject.unique().tolist()
    if len(numbers) == 1:
        return interpolated(dataset.volumes[numbers[0]], points)
    subject_of_point = subject.repeat_interleave(lengths)
    inputs = torch.empty(len(points), spec.num_inputs(dataset))
    for number in numbers:
        rows = (subject_of_point == number).nonzero()[:, 0]
        inputs.index_copy_(0, rows, interpolated(dataset.volumes[number], points.index_select(0, rows)))
    return inputs


def epoch_batches(
    dataset: StreamlineDataset,
    sampler_spec: SamplerSpec,
    loader_spec: LoaderSpec,
    *,
    key: Key,
    epoch: int,
    start_batch: int = 0,
    num_workers: int = 0,
    augment_key: Key | None = None,
    load: Callable[[BatchRequest], StreamlineBatch] | None = None,
) -> DataLoader[StreamlineBatch]:
    """Make a torch DataLoader over the batches of an epoch, from one of them on.

    The batches depend neither on the number of workers nor on `start_batch`, and neither making the loader nor
    iterating it touches a global random state. It can be iterated again, for the same batches.

    Args:
        dataset: what to load from.
        sampler_spec: how the epoch is cut into batches.
        loader_spec: how a batch is made.
        key: of the stream of plans; the epoch is folded in by `sample_epoch`.
        epoch: 0 for the first.
        start_batch: how many of the epoch's batches are done already.
        num_workers: processes that load ahead; 0 loads in this one. They start by multiprocessing's forkserver (spawn
            where there is none), so a script that asks for workers needs its `if __name__ == "__main__":`.
        augment_key: of the stream of augmentation, where `loader_spec` asks for any.
        load: makes a batch, or the host's part of one; None for `load_batch`.

    Returns:
        The loader; its length is the number of batches left.

    Raises:
        ValueError: `start_batch` is not between 0 and the number of batches, `num_workers` is negative (DataLoader's
            error), or there is augmentation and no key for it.

    Warns:
        UserWarning: noise may reach beyond half a step of the streamlines.

    Example:
        >>> from pathlib import Path
        >>> from dwiml_func.data.dataset import DatasetIndex
        >>> from dwiml_func.data.streamlines import Streamlines
        >>> dataset = StreamlineDataset(
        ...     path=Path("example.hdf5"),
        ...     subset="training",
        ...     index=DatasetIndex(("subj0",), np.array([3])),
        ...     volumes=(torch.ones(4, 4, 4, 2),),
        ...     streamlines=Streamlines.from_list(np.ones((3, 5, 3))),
        ...     voxel_sizes=torch.ones(1, 3),
        ...     input_attributes={},
        ... )
        >>> spec = SamplerSpec(batch_size=2)
        >>> for batch in epoch_batches(dataset, spec, LoaderSpec(), key=Key(1), epoch=0):
        ...     print(len(batch), batch.num_points)
        2 8
        1 4
    """
    plan = sample_epoch(dataset.index, sampler_spec, key, epoch)
    if not 0 <= start_batch <= len(plan):
        raise ValueError(f"Expected a first batch between 0 and {len(plan)}. Received: {start_batch}")
    if loader_spec.augmentation.needs_key and augment_key is None:
        raise ValueError("Augmentation needs random numbers. Expected an augment_key. Received: None")
    _warn_of_large_noise(dataset, loader_spec)
    requests = _EpochRequests(plan, epoch, start_batch, augment_key)
    # torch expects it to take a list
    collate_fn: Any = partial(load_batch, dataset=dataset, spec=loader_spec) if load is None else load
    num_workers = min(num_workers, len(requests))
    return WorkerLoader(requests, batch_size=None, collate_fn=collate_fn, num_workers=num_workers, preload=__name__)


class _EpochRequests(Dataset[Any]):  # torch types a loader by its dataset, not by what collate_fn makes of it
    """The requests of an epoch from `start_batch` on."""

    def __init__(self, plan: EpochPlan, epoch: int, start_batch: int, key: Key | None) -> None:
        self.plan = plan
        self.epoch = epoch
        self.start_batch = start_batch
        self.key = key

    def __len__(self) -> int:
        return len(self.plan) - self.start_batch

    def __getitem__(self, position: int) -> BatchRequest:
        batch = self.start_batch + position
        return BatchRequest(self.plan[batch], self.key, self.epoch, batch)


def _warn_of_large_noise(dataset: StreamlineDataset, spec: LoaderSpec) -> None:
    """Warn where noise may flip directions, by the step size of the spec, of the file, or of the mean streamline."""
    if not spec.augmentation.needs_key or dataset.index.num_total == 0 or spec.streamlines_only:
        return
    asked = spec.resampling if spec.resampling != Resampling() else dataset.resampling
    step = asked.step_size
    if step is None:
        if dataset.index.lengths_mm is None:
            return
        nb_points = asked.nb_points or dataset.streamlines.lengths.double().mean().item()
        step = float(dataset.index.lengths_mm.mean()) / (nb_points - 1)
    units = direction_units(dataset.voxel_sizes)
    largest = (dataset.voxel_sizes / units).max().item()  # mm; 1 where noise is in mm
    unit = "mm" if (units != 1).any(dim=1).all() else "voxels"
    message = spec.augmentation.too_large_for(step / largest, unit)
    if message is not None:
        warnings.warn(message, stacklevel=3)
