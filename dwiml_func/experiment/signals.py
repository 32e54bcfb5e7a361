"""Stopping a run at a batch's end when a signal asks for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from dwiml_func.distributed.sharding import SINGLE_PROCESS, ProcessGroup

__all__ = ["StopRequest", "TrainingStopped", "stop_on_signals"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class StopRequest:
    """Whether a run should stop.

    Args:
        signal: the signal that asked for it; None while nothing did.
        process_group: the processes that train together; when one is asked to stop, all do.

    Example:
        >>> StopRequest().agreed()
        False
    """

    signal: signal.Signals | None = None
    process_group: ProcessGroup = SINGLE_PROCESS

    def agreed(self) -> bool:
        """Whether this process, or another that trains with it, was asked to stop.

        Returns:
            The same in all processes. They all call it at the same points of the run.
        """
        if self.process_group.size > 1:
            asked = torch.tensor([0 if self.signal is None else int(self.signal)])
            number = max(int(given) for given in self.process_group.gather(asked))
            self.signal = signal.Signals(number) if number else None
        return self.signal is not None


class TrainingStopped(Exception):
    """A run stopped because it was asked to; its state is saved.

    Args:
        signal: the signal that asked for it.
        directory: the experiment.
        name: the name of the newest checkpoint; None when there is none.
        error: what went wrong between the signal and the end; None when nothing did.

    Example:
        >>> TrainingStopped(signal.SIGTERM, Path("experiments/a"), "3-17").exit_code
        143
    """

    def __init__(
        self, signal: signal.Signals, directory: Path, name: str | None, *, error: Exception | None = None
    ) -> None:
        besides = "" if error is None else f" and by an error ({type(error).__name__}: {error})"
        super().__init__(f"stopped by {signal.name}{besides}")
        self.signal = signal
        self.directory = directory
        self.name = name

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that a signal ended: 128 and the signal's number."""
        return 128 + self.signal


@contextmanager
def stop_on_signals(
    process_group: ProcessGroup = SINGLE_PROCESS, *, at_second: Callable[[signal.Signals], object] | None = None
) -> Iterator[StopRequest]:
    """Turn the first SIGINT (Ctrl-C) or SIGTERM within the block into a request.

    Args:
        process_group: the processes that train together.
        at_second: called at a second signal, in the main thread; None lets that act as usual.

    Yields:
        The request, to look at after each batch. Outside the main thread, where Python cannot handle signals, it stays
        empty.

    Example:
        >>> with stop_on_signals() as stop:
        ...     signal.raise_signal(signal.SIGINT)
        ...     stop.signal.name
        'SIGINT'
    """
    request = StopRequest(process_group=process_group)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle_second(number: int, _: FrameType | None) -> None:
        if at_second is not None:
            at_second(signal.Signals(number))

    def handle(number: int, _: FrameType | None) -> None:
        if at_second is None:
            restore()
        else:
            for each in _SIGNALS:
                signal.signal(each, handle_second)
        request.signal = signal.Signals(number)
        # Not print: the signal may have come while standard error was being written to.
        os.write(2, b"\nStopping after the batch under way, to save it. Once more stops at once.\n")

    for number in _SIGNALS:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        restore()
