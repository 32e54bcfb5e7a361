"""`logs/tensorboard/`: an event file for TensorBoard, in step with the history. Needs the extra `tensorboard`."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from pathlib import Path

from dwiml_func.core.loop import EpochReport
from dwiml_func.files.atomic import atomic_write
from dwiml_func.writers.writer import Writer, from_history

__all__ = ["scalars", "tensorboard"]


def tensorboard(directory: str | Path) -> Writer:
    """A writer of an event file for TensorBoard.

    New epochs are appended. When a run goes on, one file of the whole history takes the place of all before, so that no
    epoch is shown twice. Times are those of the training, without the pauses between stops and resumes.

    Args:
        directory: the experiment.

    Returns:
        The writer. It raises ModuleNotFoundError without the package tensorboard, and OSError when the disk is full, or
        the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write = tensorboard(directory)
        ...     for state, report in train_and_validate(state, ...):  # doctest: +SKIP
        ...         write(report)
    """
    return from_history(_EventFile(Path(directory) / "logs" / "tensorboard"))


def scalars(report: EpochReport) -> dict[str, float]:
    """What TensorBoard gets of an epoch.

    Args:
        report: the epoch's report.

    Returns:
        Values by tag, such as `loss/train` and `loss/valid`; durations in minutes, angular errors in degrees.

    Example:
        >>> scalars(report)["loss/train"]  # doctest: +SKIP
        0.5
    """
    return {
        "learning_rate": report.learning_rate,
        **{f"{name}/train": value for name, value in report.train.items()},
        **{f"{name}/valid": value for name, value in report.valid.items()},
        "minutes/train": report.train_minutes,
        "minutes/valid": report.valid_minutes,
        "best_loss": report.best.value,
    }


class _EventFile:
    """The file of this writer, and the reports that stand in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: tuple[EpochReport, ...] = ()
        self._path = folder
        self._start = 0.0

    def __call__(self, history: Sequence[EpochReport]) -> None:
        history, written = tuple(history), self._written
        self._written = ()  # after an error the file is not to be trusted
        if written and history[: len(written)] == written:
            with self._path.open("ab") as file:
                file.write(self._records(history, len(written)))
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in self._folder.glob("*tfevents*"):
                old.unlink()
            self._start = time.time() - 60 * sum(_minutes(report) for report in history)
            self._path = self._folder / f"events.out.tfevents.{time.time_ns()}.dwiml_func"
            atomic_write(self._path, self._records(history, 0), flush=False)
        self._written = history

    def _records(self, history: Sequence[EpochReport], first: int) -> bytes:
        try:
            from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
            from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f'{error}; for TensorBoard: pip install "dwiml_func[tensorboard]"') from None

        content = io.BytesIO()
        writer = RecordWriter(content)
        if first == 0:
            writer.write(Event(wall_time=self._start, file_version="brain.Event:2").SerializeToString())
        now = self._start + 60 * sum(_minutes(report) for report in history[:first])
        for report in history[first:]:
            now += 60 * _minutes(report)
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(report).items()]
            event = Event(wall_time=now, step=report.epoch, summary=Summary(value=values))
            writer.write(event.SerializeToString())
        return content.getvalue()


def _minutes(report: EpochReport) -> float:
    return report.train_minutes + report.valid_minutes
