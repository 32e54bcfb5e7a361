"""`logs/tensorboard/`: event files for TensorBoard, by epoch and by step. Requires the extra `tensorboard`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dwiml_func.core.report import EpochReport
from dwiml_func.types import Number
from dwiml_func.writers.writer import StepWriter, WithScalars, from_history

__all__ = ["scalars", "tensorboard"]

_SUFFIX = ".dwiml_func"


def tensorboard(directory: str | Path) -> StepWriter:
    """A writer of event files for TensorBoard.

    New epochs are appended. A resumed run replaces the files of earlier processes by one with the whole history, so no
    epoch is counted twice. Times are those of the training, without the pauses between stops and resumes. Values of
    steps are a run of their own, `steps`, since their axis is another; TensorBoard leaves out what an earlier process
    wrote of the steps that this one repeats (the `purge_step` of torch).

    Args:
        directory: the experiment.

    Returns:
        The writer. It raises ModuleNotFoundError without the package tensorboard, and OSError if the disk is full or
        the folder is not writable.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write = tensorboard(directory)
        ...     for state, report in train_and_validate(state, ...):  # doctest: +SKIP
        ...         write(report)
    """
    folder = Path(directory) / "logs" / "tensorboard"
    return WithScalars(from_history(_EventFile(folder)), _StepEvents(folder / "steps"))


def scalars(report: EpochReport) -> dict[str, float]:
    """An epoch's values by tag, such as `loss/train`; durations in minutes, angular errors in degrees."""
    return {
        "learning_rate": report.learning_rate,
        **{f"{name}/train": value for name, value in report.train.items()},
        **{f"{name}/valid": value for name, value in report.valid.items()},
        "minutes/train": report.train_minutes,
        "minutes/valid": report.valid_minutes,
        f"best_{report.monitor}": report.best.value,
    }


class _EventFile:
    """The open file, and the reports that it holds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: tuple[EpochReport, ...] = ()
        self._writer: Any = None

    def __call__(self, history: Sequence[EpochReport]) -> None:
        history, written = tuple(history), self._written
        self._written = ()  # after an error the file is rewritten
        if not written or history[: len(written)] != written:
            self._open(history)
            written = ()
        seconds = sum(map(_seconds, written))
        for report in history[len(written) :]:
            seconds += _seconds(report)
            for tag, value in scalars(report).items():
                self._writer.add_scalar(tag, value, report.epoch, walltime=self._start + seconds)
        self._writer.flush()
        self._written = history

    def _open(self, history: Sequence[EpochReport]) -> None:
        open_writer = _summary_writer()
        if self._writer is not None:
            with suppress(OSError):  # the error that the last call has raised
                self._writer.close()
        for old in self._folder.glob(f"*tfevents*{_SUFFIX}"):
            old.unlink()
        self._start = time.time() - sum(map(_seconds, history))
        self._writer = open_writer(str(self._folder), filename_suffix=_SUFFIX)


class _StepEvents:
    """The event file of the steps of this process, opened with the first of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._last, self._values = 0, dict[str, Number]()  # of the last step

    def __call__(self, step: int, values: Mapping[str, Number]) -> None:
        kept, new = self._values if step == self._last else {}, values
        if self._writer is None or step < self._last or not values or kept.keys() & values.keys():
            if not values and not self._folder.exists():
                return
            if self._writer is not None:
                self._writer.close()
            self._writer = _summary_writer()(str(self._folder), purge_step=step if values else step + 1)
            new = {**kept, **values} if values else {}  # the purge removes them
        for tag, value in new.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()
        self._last, self._values = step, {**kept, **values}


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}. Install it: pip install "dwiml_func[tensorboard]"') from None
    return SummaryWriter


def _seconds(report: EpochReport) -> float:
    return 60 * (report.train_minutes + report.valid_minutes)
