"""Signals that end a run: the current batch is finished, then the state is saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from dwiml_func.distributed.sharding import SINGLE_PROCESS, ProcessGroup

__all__ = ["StopRequest", "TrainingStopped", "stop_on_signals"]

_TIME_LIMIT = signal.SIGALRM
_AT_ONCE = (signal.SIGINT, signal.SIGTERM)  # a second one of these ends the program immediately
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)  # of schedulers: Slurm; LSF and Grid Engine; their limits
_SIGNALS = (*_AT_ONCE, signal.SIGHUP, *_WARNINGS)  # SIGHUP: a lost terminal


@dataclass(slots=True)
class StopRequest:
    """A request to stop a run: the signal that asked for it, None while there is none.

    At `deadline`, a time of `time.monotonic`, the run is asked to stop as if by SIGALRM.
    """

    signal: signal.Signals | None = None
    process_group: ProcessGroup = SINGLE_PROCESS
    deadline: float | None = None

    def agreed(self) -> bool:
        """Whether this or another process of the group was asked to stop.

        All processes call it at the same points of the run and get the same answer.
        """
        if self.signal is None and self.deadline is not None and time.monotonic() >= self.deadline:
            self.signal = _TIME_LIMIT
        if self.process_group.size == 1:
            return self.signal is not None
        asked = torch.tensor([0 if self.signal is None else int(self.signal)])
        number = max(int(given) for given in self.process_group.gather(asked))
        if number:  # else a signal that came since `asked` is kept for the next call, which tells all
            self.signal = signal.Signals(number)
        return number > 0


class TrainingStopped(Exception):
    """A run ended because a signal asked for it; its state is saved as the checkpoint `name`, None if there is none.

    `error` is another error that occurred between the signal and the end.
    """

    def __init__(
        self, signal: signal.Signals, directory: Path, name: str | None, *, error: Exception | None = None
    ) -> None:
        besides = "" if error is None else f" and by an error ({type(error).__name__}: {error})"
        super().__init__(f"stopped by {'--stop-after' if signal == _TIME_LIMIT else signal.name}{besides}")
        self.signal = signal
        self.directory = directory
        self.name = name

    @property
    def exit_code(self) -> int:
        """The exit code that shells give to a program ended by the signal."""
        return 128 + self.signal


@contextmanager
def stop_on_signals(
    process_group: ProcessGroup = SINGLE_PROCESS,
    *,
    at_second: Callable[[signal.Signals], object] | None = None,
    deadline: float | None = None,
) -> Iterator[StopRequest]:
    """Turn the first SIGINT (Ctrl-C), SIGTERM, SIGHUP or scheduler's warning in the block into a request, yielded.

    `at_second` is called at a later SIGINT or SIGTERM; without it, later signals act as usual. SIGHUP stays ignored
    where it is, as under nohup. Outside the main thread, where Python cannot handle signals, only `deadline` fills the
    request.
    """
    request = StopRequest(process_group=process_group, deadline=deadline)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    if previous[signal.SIGHUP] == signal.SIG_IGN:
        del previous[signal.SIGHUP]

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
            for each in previous:
                signal.signal(each, handle_second if each in _AT_ONCE else signal.SIG_IGN)
        request.signal = signal.Signals(number)
        # Not print: the signal may have interrupted a write to standard error.
        with suppress(OSError):  # it was closed, or its terminal is gone
            os.write(2, b"\nFinishing the current batch, then saving. Press Ctrl-C again to quit immediately.\n")

    for number in previous:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        restore()
