"""The next batch while the current one trains: made ahead in a thread, or moved to a device ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.shards import ShardedBatch

__all__ = ["MovedAhead", "Prefetched", "SizedBatches"]

T_co = TypeVar("T_co", covariant=True)


class SizedBatches(Protocol[T_co]):
    """Batches that can be counted and iterated, such as a torch DataLoader."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[T_co]: ...


class Prefetched(Generic[T_co]):
    """The same batches in the same order, made by a thread of this process, one ahead of the one in use.

    Most of loading (reading, gathering, interpolating) runs without Python's lock, and so does most of a training step.
    An error of the batches is raised here, in its turn. The thread ends with the iteration, also with one that is left
    early.

    Args:
        batches: what to iterate; each iteration of this object iterates it once. Making a batch must touch no global
            state, as it runs beside the training.

    Example:
        >>> loader = Prefetched([1, 2, 3])
        >>> len(loader), list(loader)
        (3, [1, 2, 3])
    """

    def __init__(self, batches: SizedBatches[T_co]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[T_co]:
        made: queue.Queue[tuple[bool, object]] = queue.Queue(1)
        left = threading.Event()

        def put(is_batch: bool, item: object) -> bool:
            """Wait for room in the queue, but not for a consumer that has left."""
            while not left.is_set():
                try:
                    made.put((is_batch, item), timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def work() -> None:
            try:
                for batch in self._batches:
                    if not put(True, batch):
                        return
                put(False, None)
            except BaseException as error:  # whatever it is, it belongs to whoever iterates
                put(False, error)

        thread = threading.Thread(target=work, name="dwiml_func prefetch", daemon=True)
        thread.start()
        try:
            while True:
                is_batch, item = made.get()
                if is_batch:
                    yield item  # pyright: ignore[reportReturnType] # of the batches
                elif isinstance(item, BaseException):
                    raise item
                else:
                    return
        finally:
            left.set()
            thread.join()


Batch = TypeVar("Batch", StreamlineBatch, ShardedBatch)


@dataclass(frozen=True, slots=True, eq=False)
class MovedAhead(Generic[Batch]):
    """The results of `make`, which moves a batch of the host to the device, in the same order.

    While a batch is in use, copies and kernels of the next one are queued already, on a GPU in a stream of their own:
    they run beside the training step. Pinned memory makes the copies asynchronous.
    """

    batches: SizedBatches[Batch]
    make: Callable[[Batch], Batch]
    device: torch.device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))  # which may still fill what `make` reads
        waiting: list[tuple[Batch, Any]] = []
        for batch in self.batches:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                made = self.make(batch)
                ready = None if stream is None else stream.record_event()
            waiting.append((made, ready))
            if len(waiting) > 1:
                yield self._handed_over(*waiting.pop(0))
        for made, ready in waiting:
            yield self._handed_over(made, ready)

    def _handed_over(self, batch: Batch, ready: Any) -> Batch:
        """Let the current stream wait for the batch; neither the host nor the other stream does."""
        if ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            batch.record_stream(current)
        return batch
