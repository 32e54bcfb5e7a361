"""Which streamlines make which batch: an epoch's plan, a pure function of index, spec, key and epoch.

The whole plan is made at once, so the number of batches is known, and a batch costs nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dwiml_func._checks import check_choice, check_number, pluralize
from dwiml_func.core.rng import Key, fold_in, numpy_rng
from dwiml_func.data.dataset import DatasetIndex

__all__ = ["BatchUnits", "EpochPlan", "SamplerSpec", "sample_epoch"]

BatchUnits = Literal["nb_streamlines", "length_mm"]
"""What the size of a batch counts."""

_DEFAULT_CHUNK = 256
# Lengths are added as whole numbers, rounded up: no order of summation can take a batch above its size.
_UNITS_PER_MM = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSpec:
    """How an epoch is cut into batches.

    Args:
        batch_size: most streamlines in a batch, or most mm in the sum of their lengths; at least 1.
        max_batches: most batches in an epoch, at least 1; None for all.
        batch_size_units: "nb_streamlines" or "length_mm".
        nb_streamlines_per_chunk: how many streamlines are sampled at once while a batch of "length_mm" is filled from
            chosen subjects; None for 256. The plan's distribution does not depend on it.
        nb_subjects_per_batch: most subjects that share a batch; None: all subjects.
        cycles: how many batches come from the same subjects before others are chosen; None: as many as they fill.

    Raises:
        ValueError: a number is below 1, the units are unknown, or there are cycles without a number of subjects.

    Example:
        >>> SamplerSpec(batch_size=50).max_batches
        1000
    """

    batch_size: int = 100
    max_batches: int | None = 1000
    batch_size_units: BatchUnits = "nb_streamlines"
    nb_streamlines_per_chunk: int | None = None
    nb_subjects_per_batch: int | None = None
    cycles: int | None = None

    def __post_init__(self) -> None:
        check_choice("batch_size_units", self.batch_size_units, get_args(BatchUnits))
        for name in ("batch_size", "max_batches", "nb_streamlines_per_chunk", "nb_subjects_per_batch", "cycles"):
            if (number := getattr(self, name)) is not None:
                check_number(name, number, at_least=1)
        if self.cycles is not None and self.nb_subjects_per_batch is None:
            raise ValueError("cycles: requires nb_subjects_per_batch.")


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

    def __repr__(self) -> str:
        return f"<EpochPlan: {pluralize(len(self), 'batch')}, {pluralize(len(self.ids), 'streamline')}>"

    def __len__(self) -> int:
        return len(self.batch_offsets) - 1

    def __getitem__(self, batch: int) -> NDArray[np.int64]:
        if not 0 <= batch < len(self):
            raise IndexError(f"Expected a batch between 0 and {len(self) - 1}. Received: {batch}")
        return self.ids[self.batch_offsets[batch] : self.batch_offsets[batch + 1]]


def sample_epoch(index: DatasetIndex, spec: SamplerSpec, key: Key, epoch: int) -> EpochPlan:
    """Shuffle all streamlines and cut them into batches.

    Every streamline comes exactly once an epoch, unless `spec.max_batches` ends the epoch earlier. A batch takes what
    fits next; it is smaller at the epoch's end, where its subjects have no more, and in "length_mm". A streamline that
    is longer than a whole batch makes a batch alone. Subjects are chosen with weights of what is left of them: all
    streamlines left are equally likely to come next, among all or among the subjects chosen for `spec.cycles` batches.

    Args:
        index: the dataset's index; "length_mm" needs its lengths.
        spec: the size and number of batches.
        key: of the stream of plans; the epoch is folded in here.
        epoch: 0 for the first.

    Returns:
        The plan; without batches if the dataset has no streamlines.

    Raises:
        ValueError: the units are "length_mm" and the index has no lengths.

    Example:
        >>> plan = sample_epoch(DatasetIndex(("subj0",), np.array([5])), SamplerSpec(batch_size=2), Key(1), 0)
        >>> [len(plan[i]) for i in range(len(plan))], sorted(plan.ids.tolist())
        ([2, 2, 1], [0, 1, 2, 3, 4])
    """
    rng = numpy_rng(fold_in(key, epoch))
    sizes, budget = _sizes(index, spec)
    if spec.nb_subjects_per_batch is None:
        ids = rng.permutation(index.num_total)
        batch_offsets = _cut(None if sizes is None else sizes[ids], len(ids), budget, spec.max_batches)
        ids = ids[: batch_offsets[-1]]
    else:
        ids, batch_offsets = _sample_by_subjects(index, spec, rng, sizes, budget)
    ids.flags.writeable = False  # batches are views of it
    return EpochPlan(ids, batch_offsets)


def _sizes(index: DatasetIndex, spec: SamplerSpec) -> tuple[NDArray[np.int64] | None, int]:
    """What each streamline takes of a batch, and how much a batch holds; None where each takes 1."""
    if spec.batch_size_units == "nb_streamlines":
        return None, spec.batch_size
    if index.lengths_mm is None:
        raise ValueError(
            "Batches in length_mm need the streamlines' lengths, and this dataset holds none (euclidean_lengths in the "
            "HDF5 file). Create it again, or count batches in nb_streamlines"
        )
    sizes = np.ceil(index.lengths_mm.astype(np.float64) * _UNITS_PER_MM).astype(np.int64)
    return sizes, spec.batch_size * _UNITS_PER_MM


def _cut(sizes: NDArray[np.int64] | None, num: int, budget: int, max_batches: int | None) -> NDArray[np.int64]:
    """Cut a sequence into batches: each takes what fits next, and at least one. Returns (B + 1,) offsets."""
    if sizes is None:
        offsets = np.append(np.arange(0, num, budget), num)
    else:
        ends = np.cumsum(sizes)
        # Where a batch that starts at each position would end: one search for all; then the chain from 0 is followed.
        after = np.maximum(np.searchsorted(ends, ends - sizes + budget, side="right"), np.arange(num) + 1).tolist()
        chain = [0]
        while chain[-1] < num:
            chain.append(after[chain[-1]])
        offsets = np.array(chain)
    return offsets if max_batches is None else offsets[: max_batches + 1]


def _sample_by_subjects(
    index: DatasetIndex, spec: SamplerSpec, rng: np.random.Generator, sizes: NDArray[np.int64] | None, budget: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ids and batch offsets of an epoch whose batches each hold streamlines of a few subjects."""
    starts = np.cumsum(index.num_streamlines) - index.num_streamlines
    orders = [start + rng.permutation(num) for start, num in zip(starts, index.num_streamlines, strict=True)]
    used = np.zeros(len(orders), dtype=np.int64)
    left = index.num_streamlines.astype(np.int64)
    num_chosen = min(spec.nb_subjects_per_batch or 1, np.count_nonzero(left))
    parts: list[NDArray[np.int64]] = []
    batch_sizes: list[NDArray[np.int64]] = []
    num_batches = 0
    while (num_left := int(left.sum())) and (spec.max_batches is None or num_batches < spec.max_batches):
        # The smallest of exponential samples with rates `left`: weighted sampling without replacement.
        times = rng.standard_exponential(len(left)) / np.maximum(left, 1e-300)  # those that have none come last
        chosen = np.sort(np.argpartition(times, num_chosen - 1)[:num_chosen])
        chosen = chosen[left[chosen] > 0]
        pool = int(left[chosen].sum())
        cycles = num_left if spec.cycles is None else spec.cycles
        if spec.max_batches is not None:
            cycles = min(cycles, spec.max_batches - num_batches)
        chunk = min(pool, cycles * budget) if sizes is None else spec.nb_streamlines_per_chunk or _DEFAULT_CHUNK
        if spec.cycles is None and sizes is not None:
            chunk = max(chunk, -(-pool // 8))  # all of it is wanted: few large chunks
        drawn = np.empty(0, dtype=np.int64)
        owners = np.empty(0, dtype=np.int64)
        while True:
            counts = rng.multivariate_hypergeometric(left[chosen], min(chunk, pool - len(drawn)))
            new_owners = rng.permuted(np.repeat(chosen, counts))
            new_ids = np.empty(len(new_owners), dtype=np.int64)
            new_ids[np.argsort(new_owners, kind="stable")] = np.concatenate(
                [orders[s][used[s] : used[s] + n] for s, n in zip(chosen, counts, strict=True)]
            )
            used[chosen] += counts
            left[chosen] -= counts
            drawn, owners = np.concatenate([drawn, new_ids]), np.concatenate([owners, new_owners])
            offsets = _cut(None if sizes is None else sizes[drawn], len(drawn), budget, None)
            # The last batch is whole once something after it did not fit, or nothing is left that might fit.
            if len(drawn) == pool or len(offsets) - 1 > cycles or (sizes is None and len(offsets) - 1 == cycles):
                break
            chunk = 2 * chunk
        offsets = offsets[: cycles + 1]
        num_taken = int(offsets[-1])
        returned = np.bincount(owners[num_taken:], minlength=len(left))  # they come next of their subject
        used -= returned
        left += returned
        parts.append(drawn[:num_taken])
        batch_sizes.append(np.diff(offsets))
        num_batches += len(offsets) - 1
    ids = np.concatenate([np.empty(0, dtype=np.int64), *parts])
    sizes_in_ids = np.concatenate([np.zeros(1, dtype=np.int64), *batch_sizes])
    return ids, np.cumsum(sizes_in_ids)
