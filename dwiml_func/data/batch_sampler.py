"""Which streamlines make which batch: an epoch's plan, a pure function of index, spec, key and epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dwiml_func.data.dataset import DatasetIndex
from dwiml_func.rng import Key, fold_in, numpy_rng

__all__ = ["EpochPlan", "SamplerSpec", "sample_epoch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSpec:
    """How an epoch is cut into batches.

    Args:
        batch_size: streamlines a batch, at least 1.
        max_batches: most batches in an epoch, at least 1; None for all.

    Raises:
        ValueError: a number is below 1.

    Example:
        >>> SamplerSpec(batch_size=50)
        SamplerSpec(batch_size=50, max_batches=1000)
    """

    batch_size: int = 100
    max_batches: int | None = 1000

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"Expected a batch size of at least 1 streamline. Received: {self.batch_size}")
        if self.max_batches is not None and self.max_batches < 1:
            raise ValueError(f"Expected at least 1 batch an epoch, or no limit. Received: {self.max_batches}")


@dataclass(frozen=True, slots=True, eq=False)
class EpochPlan:
    """The batches of one epoch. `len(plan)` is their number, `plan[i]` the streamline ids of batch i.

    Args:
        ids: (N,) int64, streamline ids in the order of the epoch, read-only.
        batch_offsets: (B + 1,) int64: batch i is `ids[batch_offsets[i]:batch_offsets[i + 1]]`.

    Example:
        >>> plan = EpochPlan(np.array([4, 1, 3]), np.array([0, 2, 3]))
        >>> len(plan), plan[1]
        (2, array([3]))
    """

    ids: NDArray[np.int64]
    batch_offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.batch_offsets) - 1

    def __getitem__(self, batch: int) -> NDArray[np.int64]:
        if not 0 <= batch < len(self):
            raise IndexError(f"Expected a batch between 0 and {len(self) - 1}. Received: {batch}")
        return self.ids[self.batch_offsets[batch] : self.batch_offsets[batch + 1]]


def sample_epoch(index: DatasetIndex, spec: SamplerSpec, key: Key, epoch: int) -> EpochPlan:
    """Shuffle all streamlines and cut them into batches.

    Every streamline comes exactly once an epoch, unless `spec.max_batches` ends the epoch earlier. The last batch
    may be smaller. The cost is that of one permutation an epoch; a batch costs nothing more.

    Args:
        index: the dataset's index.
        spec: the size and number of batches.
        key: of the stream of plans; the epoch is folded in here.
        epoch: 0 for the first.

    Returns:
        The plan; without batches if the dataset has no streamlines.

    Example:
        >>> plan = sample_epoch(DatasetIndex(("subj0",), np.array([5])), SamplerSpec(batch_size=2), Key(1), 0)
        >>> [len(plan[i]) for i in range(len(plan))], sorted(plan.ids.tolist())
        ([2, 2, 1], [0, 1, 2, 3, 4])
    """
    num_ids = index.num_total
    if spec.max_batches is not None:
        num_ids = min(num_ids, spec.max_batches * spec.batch_size)
    ids = numpy_rng(fold_in(key, epoch)).permutation(index.num_total)[:num_ids]
    ids.flags.writeable = False  # batches are views of it
    return EpochPlan(ids, np.append(np.arange(0, num_ids, spec.batch_size), num_ids))
