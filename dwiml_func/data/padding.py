"""To how many rows models pad the streamlines of a batch: one of a few lengths, fixed by the dataset.

A batch's length depends on its own streamlines and on the dataset, never on other batches, so neither do its results.
Few lengths also mean few CUDA graphs and few plans of cuDNN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.resampling import Resampling, steps_for
from dwiml_func.data.shards import ShardedBatch

__all__ = ["NUM_LENGTHS", "padded_lengths", "with_fixed_shape", "with_padded_length"]

NUM_LENGTHS = 8
"""How many lengths there are. Padding adds the shortest of them at most."""

Batch = TypeVar("Batch", StreamlineBatch, ShardedBatch)


def padded_lengths(datasets: Iterable[StreamlineDataset], resampling: Resampling) -> tuple[int, ...]:
    """The lengths of all batches: multiples of an eighth of the longest streamline, rounded up."""
    longest = max((_longest(dataset, resampling) for dataset in datasets if dataset.index.num_total), default=1)
    step = -(-longest // NUM_LENGTHS)
    return tuple(range(step, (NUM_LENGTHS + 1) * step, step))


def _longest(dataset: StreamlineDataset, resampling: Resampling) -> int:
    """Points of the longest streamline, to rounding: what is longer is padded to a further multiple."""
    if resampling.nb_points is not None:
        return resampling.nb_points
    lengths_mm, step_size = dataset.index.lengths_mm, resampling.step_size
    if step_size is not None and resampling != dataset.resampling and lengths_mm is not None:
        return int(steps_for(np.asarray([lengths_mm.max()]), step_size, resampling.step_rule)[0]) + 1
    return int(dataset.streamlines.lengths.max())


def with_padded_length(batch: Batch, lengths: Sequence[int], max_len: int | None = None) -> Batch:
    """A batch on the host, or its shards, with a `padded_length`: the first of `lengths` that fits its streamlines.

    Where none does, it is a multiple of the first. A model that reads `max_len` rows at most pads to no more, unless a
    streamline has more: the model then says so.
    """
    if isinstance(batch, ShardedBatch):
        own = (None if shard is None else with_padded_length(shard, lengths, max_len) for shard in batch)
        return ShardedBatch(tuple(own), batch.ids)
    longest = int(batch.input_offsets.diff().max())
    length = next((own for own in lengths if own >= longest), -(-longest // lengths[0]) * lengths[0])
    return replace(batch, padded_length=length if max_len is None else min(length, max(longest, max_len)))


def with_fixed_shape(batch: StreamlineBatch) -> StreamlineBatch:
    """A batch on the host with a `padded_length`, filled up to a shape that many batches have, for CUDA graphs.

    All streamlines get that many rows of inputs, by their last points again, and the last streamline comes again until
    their number has at most four binary digits that are not zero. `is_real` marks the rows that count. Results are
    those of the batch as it was, to rounding.
    """
    assert batch.padded_length is not None
    length, num = batch.padded_length, _rounded(len(batch))
    points_each = length if batch.has_last_points else length + 1
    rows, _ = _padded_rows(batch.offsets, points_each, num)
    input_rows, is_real = _padded_rows(batch.input_offsets, length, num)
    last = torch.arange(num).clamp(max=len(batch) - 1)

    def at(values: Tensor | None, places: Tensor) -> Tensor | None:
        return None if values is None else values.index_select(0, places)

    return replace(
        batch,
        points=batch.points.index_select(0, rows),
        offsets=torch.arange(num + 1) * points_each,
        subject=batch.subject.index_select(0, last),
        ids=batch.ids.index_select(0, last),
        inputs=batch.inputs.index_select(0, input_rows),
        noisy_points=at(batch.noisy_points, rows),
        noisy_targets=at(batch.noisy_targets, rows),
        is_real=is_real,
    )


def _rounded(number: int) -> int:
    """The least number of at least this one that is a multiple of an eighth of the power of two below it."""
    unit = max(1 << (number.bit_length() - 4), 1) if number >= 8 else 1
    return -(-number // unit) * unit


def _padded_rows(offsets: Tensor, length: int, num: int) -> tuple[Tensor, Tensor]:
    """The flat row of each padded one, and which are real: (num * length,) each."""
    steps, lengths = torch.arange(length), offsets.diff()[:, None]
    rows = (offsets[:-1, None] + torch.minimum(steps, lengths - 1)).clamp(min=0)
    is_real = steps < lengths
    rest = num - len(rows)
    rows = torch.cat([rows, rows[-1:].expand(rest, -1)])
    return rows.flatten(), torch.cat([is_real, is_real.new_zeros(rest, length)]).flatten()
