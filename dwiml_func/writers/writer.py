"""A writer is a callable on the reports of epochs; `fan_out` joins several into one that cannot stop a training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dwiml_func._checks import one_line
from dwiml_func.core.report import EpochReport
from dwiml_func.types import Number

__all__ = ["StepWriter", "WithScalars", "Writer", "fan_out", "from_history", "whole_epochs"]


class Writer(Protocol):
    """Takes reports of epochs in order: `write(report)` after an epoch, and `write(*history)` first in a resumed run.

    A report of an epoch that was reported before replaces that report and all after it. Reports of validations within
    an epoch may be among them; the writers here leave them to the report of the whole epoch.

    Example:
        >>> def write(*reports: EpochReport) -> None:
        ...     for report in reports:
        ...         print(report.epoch, report.monitor, report.monitored)
    """

    def __call__(self, *reports: EpochReport) -> None: ...


class StepWriter(Writer, Protocol):
    """A writer that also takes values of single steps: `write.write_scalars(step, {"loss": 0.5})`.

    Values of a step that was written before replace those of the same names, and all after it, so that nothing is
    counted twice after a resume. `write.write_scalars(state.step, {})`, in a run that is resumed from `state`, removes
    what was written after it.

    Example:
        >>> import tempfile
        >>> from dwiml_func.writers import jsonl
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     jsonl(directory).write_scalars(50, {"loss": 0.5})
    """

    def write_scalars(self, step: int, values: Mapping[str, Number], /) -> None: ...


@dataclass(frozen=True, slots=True)
class WithScalars:
    """A writer of reports that takes values of steps too."""

    write: Writer
    write_scalars: Callable[[int, Mapping[str, Number]], None]

    def __call__(self, *reports: EpochReport) -> None:
        self.write(*reports)


def fan_out(*writers: Writer) -> StepWriter:
    """Join writers into one. None of them can stop the training or the others.

    Args:
        writers: each is called with every report, in this order, and with the values of steps if it has `write_scalars`
            (`jsonl`, `tensorboard` and `Comet` have). One that raises an error is called again with the next
            report, since the disk may have space again. Only the first error of a writer is logged, as a warning; an
            error of the disk that several writers raise is logged once.

    Returns:
        A writer that raises nothing.

    Example:
        >>> import tempfile
        >>> from dwiml_func.writers import jsonl, npy
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write = fan_out(npy(directory), jsonl(directory))
        ...     history = ()  # those of the checkpoint, in a resumed run
        ...     write(*history)
    """
    warned: set[tuple[str, int]] = set()

    def each(call: Callable[[Writer], object]) -> None:
        for number, writer in enumerate(writers):
            try:
                call(writer)
            except Exception as error:
                reasons = {("writer", number)}
                if isinstance(error, OSError) and error.errno:
                    reasons.add(("errno", error.errno))
                if not reasons & warned:
                    logging.getLogger(__name__).warning(
                        "Logs were not written: %s. Training continues; the next resume writes them.", _reason(error)
                    )
                warned.update(reasons)

    def write(*reports: EpochReport) -> None:
        each(lambda writer: writer(*reports))

    def write_scalars(step: int, values: Mapping[str, Number]) -> None:
        each(lambda writer: getattr(writer, "write_scalars", lambda *_: None)(step, values))

    return WithScalars(write, write_scalars)


def from_history(rewrite: Callable[[Sequence[EpochReport]], None]) -> Writer:
    """A writer that calls `rewrite` with the reports of all epochs so far, which repairs whatever was lost or corrupt.

    It raises ValueError if a report before the first that it gets is missing.
    """
    history: list[EpochReport] = []

    def write(*reports: EpochReport) -> None:
        reports = whole_epochs(reports)
        for report in reports:
            if report.epoch > len(history) + 1:
                raise ValueError(
                    f"Expected the report of epoch {len(history) + 1}. Received: epoch {report.epoch}. "
                    f"To resume from a checkpoint, call write(*history) first."
                )
            history[report.epoch - 1 :] = [report]
        if reports:
            rewrite(tuple(history))

    return write


def whole_epochs(reports: Sequence[EpochReport]) -> tuple[EpochReport, ...]:
    """The reports without those of validations within an epoch, unless the run has ended there."""
    return tuple(report for report in reports if not report.batch or report.stop is not None)


def _reason(error: Exception) -> str:
    text = one_line(error).rstrip(".")
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}"
