"""From streamline ids to a batch with its inputs, alone or as the collate function of a torch DataLoader."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from dwiml_func.data.batch_sampler import EpochPlan, SamplerSpec, sample_epoch
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.interpolation import Interpolation, interpolate, require_mode
from dwiml_func.data.streamlines import StreamlineBatch, input_rows
from dwiml_func.rng import Key

__all__ = ["BatchRequest", "LoaderSpec", "epoch_batches", "load_batch"]


class BatchRequest(NamedTuple):
    """All that says which batch to load, a few hundred bytes to send to a worker.

    Args:
        ids: (S,) int64, streamline ids in the dataset.
        key: of the draws made while loading; None where loading draws nothing.
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
        interpolation: "trilinear" or "trilinear-corner", see `dwiml_func.data.interpolation.interpolate`.

    Raises:
        ValueError: the interpolation is neither.

    Example:
        >>> LoaderSpec()
        LoaderSpec(interpolation='trilinear')
    """

    interpolation: Interpolation = "trilinear"

    def __post_init__(self) -> None:
        require_mode(self.interpolation)


def load_batch(request: BatchRequest, *, dataset: StreamlineDataset, spec: LoaderSpec) -> StreamlineBatch:
    """Gather the streamlines of a request and interpolate their subjects' volumes along them.

    Pure: the same arguments give the same bytes, in any process, on any number of threads.

    Args:
        request: which streamlines.
        dataset: where they are.
        spec: how to make the batch.

    Returns:
        The batch, its streamlines in the order of `request.ids`, with memory of its own.

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
    subject = torch.from_numpy(dataset.index.subject_of(request.ids))
    points = lines.points[input_rows(lines.offsets, len(lines.points))]
    subject_of_point = subject.repeat_interleave(lines.lengths - 1)
    inputs = torch.empty(len(points), dataset.num_features)
    for number in subject.unique().tolist():
        rows = (subject_of_point == number).nonzero()[:, 0]
        inputs[rows] = interpolate(dataset.volumes[number], points[rows], mode=spec.interpolation)
    return StreamlineBatch(
        points=lines.points,
        offsets=lines.offsets,
        subject=subject,
        ids=torch.from_numpy(np.array(request.ids)),  # copied: torch warns when it wraps a read-only array
        inputs=inputs,
    )


def epoch_batches(
    dataset: StreamlineDataset,
    sampler_spec: SamplerSpec,
    loader_spec: LoaderSpec,
    *,
    key: Key,
    epoch: int,
    start_batch: int = 0,
    num_workers: int = 0,
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

    Returns:
        The loader; its length is the number of batches left.

    Raises:
        ValueError: `start_batch` is not between 0 and the number of batches, or `num_workers` is negative.

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
    if num_workers < 0:
        raise ValueError(f"Expected a number of workers of at least 0. Received: {num_workers}")
    plan = sample_epoch(dataset.index, sampler_spec, key, epoch)
    if not 0 <= start_batch <= len(plan):
        raise ValueError(f"Expected a first batch between 0 and {len(plan)}. Received: {start_batch}")
    requests = _EpochRequests(plan, epoch, start_batch)
    collate_fn: Any = partial(load_batch, dataset=dataset, spec=loader_spec)  # torch expects it to take a list
    num_workers = min(num_workers, len(requests))
    return DataLoader(
        requests,
        batch_size=None,
        collate_fn=collate_fn,
        num_workers=num_workers,
        multiprocessing_context=_worker_context() if num_workers > 0 else None,
        # iter() draws a seed for the workers, from torch's global generator unless it is given one. Nothing here
        # draws from the workers' generators.
        generator=torch.Generator(),
    )


class _EpochRequests(Dataset[Any]):  # torch types a loader by its dataset, not by what collate_fn makes of it
    """The requests of an epoch from `start_batch` on."""

    def __init__(self, plan: EpochPlan, epoch: int, start_batch: int) -> None:
        self.plan = plan
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        return len(self.plan) - self.start_batch

    def __getitem__(self, position: int) -> BatchRequest:
        batch = self.start_batch + position
        return BatchRequest(self.plan[batch], None, self.epoch, batch)


def _worker_context() -> multiprocessing.context.BaseContext:
    """How workers start. Not by fork from this process: unsafe once a library (JAX, under orbax) runs threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server imports torch once, then each worker of each epoch starts in 0.1 s instead of 1.5 s.
    context.set_forkserver_preload([__name__])
    return context
