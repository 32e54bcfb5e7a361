"""Batches moved to a device one ahead of the one in use, on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

import torch

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.prefetch import SizedBatches
from dwiml_func.data.shards import ShardedBatch

__all__ = ["MovedAhead"]

Batch = TypeVar("Batch", StreamlineBatch, ShardedBatch)


class MovedAhead(Generic[Batch]):
    """The results of `make`, which moves a batch of the host to the device, in the same order.

    While a batch is in use, copies and kernels of the next one are queued already, on a GPU in a stream of their own:
    they run beside the training step. Pinned memory makes the copies asynchronous.
    """

    def __init__(self, batches: SizedBatches[Batch], make: Callable[[Batch], Batch], device: torch.device) -> None:
        self._batches = batches
        self._make = make
        self._device = device

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self._device))  # which may still fill what `make` reads
        waiting: list[tuple[Batch, Any]] = []
        for batch in self._batches:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                made = self._make(batch)
                ready = None if stream is None else stream.record_event()
            waiting.append((made, ready))
            if len(waiting) > 1:
                yield self._handed_over(*waiting.pop(0))
        for made, ready in waiting:
            yield self._handed_over(made, ready)

    def _handed_over(self, batch: Batch, ready: Any) -> Batch:
        """Let the current stream wait for the batch; neither the host nor the other stream does."""
        if ready is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(ready)
            batch.record_stream(current)
        return batch
