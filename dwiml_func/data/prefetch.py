"""Loading ahead in a thread: the next batch is made while the current one trains."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

__all__ = ["Prefetched", "SizedBatches"]

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
        ahead: how many finished batches may wait, at least 1.

    Raises:
        ValueError: `ahead` is below 1.

    Example:
        >>> loader = Prefetched([1, 2, 3])
        >>> len(loader), list(loader)
        (3, [1, 2, 3])
    """

    def __init__(self, batches: SizedBatches[T_co], *, ahead: int = 1) -> None:
        if ahead < 1:
            raise ValueError(f"Expected at least 1 batch ahead. Received: {ahead}")
        self._batches = batches
        self._ahead = ahead

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[T_co]:
        made: queue.Queue[tuple[bool, object]] = queue.Queue(self._ahead)
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
