"""A batch cut into shards of whole streamlines, for processes that train together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from dwiml_func._checks import pluralize
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.streamlines import input_offsets

__all__ = ["ShardedBatch", "cut_batch"]


@dataclass(frozen=True, slots=True, eq=False)
class ShardedBatch(Sequence[StreamlineBatch | None]):
    """The shards of a batch, in order; None where one has no point to learn from, which the first always has.

    `ids` (S,) int64 are the numbers of all streamlines, for error messages.
    """

    shards: tuple[StreamlineBatch | None, ...]
    ids: Tensor

    def __repr__(self) -> str:
        num_points = sum(len(shard.points) for shard in self.shards if shard is not None)
        counts = (len(self), "shard"), (len(self.ids), "streamline"), (num_points, "point")
        return f"<ShardedBatch: {', '.join(pluralize(*count) for count in counts)}>"

    def __len__(self) -> int:
        return len(self.shards)

    @overload
    def __getitem__(self, index: int) -> StreamlineBatch | None: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[StreamlineBatch | None, ...]: ...
    def __getitem__(self, index: int | slice) -> StreamlineBatch | tuple[StreamlineBatch | None, ...] | None:
        return self.shards[index]

    def __iter__(self) -> Iterator[StreamlineBatch | None]:
        return iter(self.shards)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ShardedBatch:
        """Move every shard to a device."""
        return self.mapped(lambda shard: shard.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ShardedBatch:
        """Copy every shard to pinned memory."""
        return self.mapped(StreamlineBatch.pin_memory)

    def mapped(self, function: Callable[[StreamlineBatch], StreamlineBatch]) -> ShardedBatch:
        """Change every shard that there is."""
        return ShardedBatch(tuple(None if shard is None else function(shard) for shard in self.shards), self.ids)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of every shard until a CUDA stream has done what it was given so far."""
        for shard in self.shards:
            if shard is not None:
                shard.record_stream(stream)


def cut_batch(batch: StreamlineBatch, num_shards: int) -> ShardedBatch:
    """Cut a batch into shards of consecutive streamlines, with nearly equal numbers of points.

    Tensors are views of the batch's, which is on the CPU. A batch of fewer streamlines has empty shards at its end.
    """
    if num_shards < 1:
        raise ValueError(f"Expected a number of shards of at least 1. Received: {num_shards}")
    size, offsets = len(batch), batch.offsets
    wanted = offsets[-1] * torch.arange(1, num_shards) / num_shards
    middles = (offsets[:-1] + offsets[1:]) / 2
    cuts = torch.searchsorted(middles, wanted).tolist()
    at_least = [
        min(number, size) for number in range(1, num_shards)
    ]  # a streamline for each shard, if there are so many
    at_most = [size - (num_shards - number) for number in range(1, num_shards)]
    bounds = [max(min(cut, most), least) for cut, least, most in zip(cuts, at_least, at_most, strict=True)]
    shards = [_streamlines(batch, start, stop) for start, stop in zip([0, *bounds], [*bounds, size], strict=True)]
    filled = [shard for shard in shards if shard is not None and shard.num_points > 0]
    if not filled:
        raise ValueError("Expected a batch with streamlines of two points or more. Received: none")
    return ShardedBatch((*filled, *[None] * (num_shards - len(filled))), batch.ids)


def _streamlines(batch: StreamlineBatch, start: int, stop: int) -> StreamlineBatch | None:
    if start == stop:
        return None
    offsets = batch.offsets[start : stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    rows = batch.offsets if batch.has_last_points else input_offsets(batch.offsets)

    def points(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[first:last]

    return StreamlineBatch(
        points=batch.points[first:last],
        offsets=offsets - first,
        subject=batch.subject[start:stop],
        ids=batch.ids[start:stop],
        inputs=batch.inputs[int(rows[start]) : int(rows[stop])],
        noisy_points=points(batch.noisy_points),
        noisy_targets=points(batch.noisy_targets),
    )
