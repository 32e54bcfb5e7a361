"""A torch DataLoader whose workers start safely, leave the global random state alone, and ignore signals."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

__all__ = ["WorkerLoader", "process_context"]

T_co = TypeVar("T_co", covariant=True)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class WorkerLoader(DataLoader[T_co]):
    """A DataLoader whose workers ignore Ctrl-C and SIGTERM: the process that iterates decides when they end.

    If it is killed, they end too. The server that forks them ignores the signals as well, from its start on. `preload`
    is a module that it imports first.
    """

    def __init__(
        self, dataset: Dataset[T_co], *, num_workers: int = 0, preload: str = __name__, **options: Any
    ) -> None:
        super().__init__(
            dataset,
            num_workers=num_workers,
            multiprocessing_context=process_context(preload) if num_workers > 0 else None,
            # iter() takes a seed for the workers from torch's global generator unless it is given one.
            generator=torch.Generator(),
            worker_init_fn=_begin,
            **options,
        )

    def __iter__(self) -> Any:
        if self.num_workers == 0:
            return super().__iter__()
        resource_tracker.ensure_running()  # to start it later would take the mask away
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the new processes inherit it
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)  # signals that arrived meanwhile are handled now


def _begin(_: int) -> None:
    """What a worker does first. Its server, if other code has started that, has left it the signals."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """torch's workers watch their server instead, which lives as long as they do."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def process_context(preload: str) -> multiprocessing.context.BaseContext:
    """How processes start, which import `preload` first.

    Forking this process is unsafe once a library (JAX, under orbax) runs threads.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server imports torch once, then each worker of each epoch starts in 0.1 s instead of 1.5 s.
    context.set_forkserver_preload([preload])
    return context
