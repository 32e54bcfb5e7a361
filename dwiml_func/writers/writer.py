"""What a writer is: a callable on the reports of epochs, and how several make one that cannot stop a training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from dwiml_func.core.loop import EpochReport

__all__ = ["Writer", "fan_out", "from_history"]


class Writer(Protocol):
    """Takes reports of epochs in order: `write(report)` after an epoch; `write(*history)` first, when a run goes on.

    A report of an epoch that was reported before takes the place of that report and of all after it.

    Example:
        >>> def write(*reports: EpochReport) -> None:
        ...     for report in reports:
        ...         print(report.epoch, report.monitored_loss)
    """

    def __call__(self, *reports: EpochReport) -> None: ...


def fan_out(*writers: Writer) -> Writer:
    """Make one writer of several, none of which can stop the training or the others.

    Args:
        writers: each is called with every report, in this order. One that raises an error is called again with the
            next report, since a disk may have space again; only its first error is logged, as a warning, and what the
            disk refuses to several of them only once.

    Returns:
        A writer that raises nothing.

    Example:
        >>> import tempfile
        >>> from dwiml_func.writers.jsonl import jsonl
        >>> from dwiml_func.writers.npy import npy
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write = fan_out(npy(directory), jsonl(directory))
        ...     history = ()  # of the epochs that a checkpoint has, where the run goes on from one
        ...     write(*history)
    """
    told: set[tuple[str, int]] = set()

    def write(*reports: EpochReport) -> None:
        for number, writer in enumerate(writers):
            try:
                writer(*reports)
            except Exception as error:
                reasons = {("writer", number)}
                if isinstance(error, OSError) and error.errno:
                    reasons.add(("errno", error.errno))
                if not reasons & told:
                    logging.getLogger(__name__).warning(
                        "Logs were not written: %s. Training goes on; the next resume writes them.", _one_line(error)
                    )
                told.update(reasons)

    return write


def from_history(rewrite: Callable[[Sequence[EpochReport]], None]) -> Writer:
    """Make a writer of a function that writes a log anew from the reports of all epochs.

    Such a log needs nothing of what was written before: whatever was lost or corrupt is whole again with the next
    report.

    Args:
        rewrite: called with the reports of all epochs so far.

    Returns:
        The writer. It keeps the reports, and raises ValueError where one before the first that it gets is missing.

    Example:
        >>> write = from_history(lambda history: print([report.epoch for report in history]))
        >>> write(report(1), report(2))  # doctest: +SKIP
        [1, 2]
        >>> write(report(3))  # doctest: +SKIP
        [1, 2, 3]
    """
    history: list[EpochReport] = []

    def write(*reports: EpochReport) -> None:
        for report in reports:
            if report.epoch > len(history) + 1:
                raise ValueError(
                    f"a report of epoch {report.epoch} came after that of epoch {len(history)}. Expected all in order: "
                    f"when a run goes on from a checkpoint, give the writer its history first, write(*history)"
                )
            history[report.epoch - 1 :] = [report]
        if reports:
            rewrite(tuple(history))

    return write


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}"
