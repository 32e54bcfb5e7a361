"""A batch cut into shards of whole streamlines, for processes that train together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.streamlines import input_offsets

__all__ = ["ShardedBatch", "cut_batch"]


@dataclass(frozen=True, slots=True, eq=False)
class ShardedBatch(Sequence[StreamlineBatch | None]):
    """The shards of a batch, in order; None where one has no point to learn from. The first has.

    Args:
        shards: the parts.
        ids: (S,) int64, the numbers of all streamlines, for error messages.

    Example:
        >>> len(ShardedBatch((None, None), torch.zeros(0)))
        2
    """

    shards: tuple[StreamlineBatch | None, ...]
    ids: Tensor

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
        """Move every shard to a device.

        Args:
            device: where to.
            non_blocking: let copies from pinned memory overlap with computation.

        Returns:
            The same shards there.

        Example:
            >>> ShardedBatch((None,), torch.zeros(0)).to("cpu").shards
            (None,)
        """
        moved = (None if shard is None else shard.to(device, non_blocking=non_blocking) for shard in self.shards)
        return ShardedBatch(tuple(moved), self.ids)


def cut_batch(batch: StreamlineBatch, num_shards: int) -> ShardedBatch:
    """Cut a batch into shards of consecutive streamlines, with nearly equal numbers of points.

    Args:
        batch: S streamlines, on the CPU.
        num_shards: how many; a batch of fewer streamlines has empty shards at its end.

    Returns:
        The shards; their tensors are views of the batch's. The order of streamlines is kept.

    Raises:
        ValueError: the number of shards is below 1, or the batch has no streamline of two points or more.

    Example:
        >>> from dwiml_func.data.streamlines import Streamlines
        >>> lines = Streamlines.from_list([[[0, 0, 0], [1, 0, 0]]] * 3)
        >>> one = torch.zeros(3, dtype=torch.int64)
        >>> batch = StreamlineBatch(
        ...     points=lines.points, offsets=lines.offsets, subject=one, ids=one, inputs=torch.zeros(3, 2)
        ... )
        >>> [shard and len(shard) for shard in cut_batch(batch, 2)], cut_batch(batch, 4)[3] is None
        ([1, 2], True)
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
