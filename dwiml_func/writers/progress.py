"""Progress on a terminal: a bar of epochs, a bar of batches, and a line an epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import Any

from tqdm import tqdm

from dwiml_func.core.loop import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.types import Metrics

__all__ = ["Progress"]

_SECONDS_BETWEEN_READINGS = 0.5  # reading the loss waits for the device


class Progress:
    """A writer that prints a line an epoch on standard output, and shows bars on standard error if that is a terminal.

    `track` shows the bar of batches. The bar of epochs, with the best loss and the time that is left,
    stands above it within `with Progress(...) as progress:`.

    Args:
        max_epochs: for "epoch 3/100".
        clock: gives seconds; for tests.

    Example:
        >>> progress = Progress(max_epochs=2)
        >>> list(progress.track([1, 2, 3], "training", epoch=0, start_batch=0))
        [1, 2, 3]
    """

    def __init__(self, *, max_epochs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_epochs = max_epochs
        self._clock = clock
        self._is_open = False
        self._epochs: Any = None
        self._batches: Any = None
        self._read_at = 0.0
        self._points: float | None = None  # in the epoch under way, when they were last read

    def __enter__(self) -> Progress:
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False
        for bar in (self._batches, self._epochs):
            if bar is not None:
                bar.close()

    def __call__(self, *reports: EpochReport) -> None:
        """Print the line of the last of these epochs, and move the bar of epochs.

        Args:
            *reports: the reports of one or more epochs.
        """
        if not reports:
            return
        report = reports[-1]
        parts = [f"Epoch {report.epoch}/{self._max_epochs}", f"training loss {report.train['loss']:.4f}"]
        if report.valid:
            parts.append(f"validation loss {report.valid['loss']:.4f}")
        if "angular_error" in report.valid:
            parts.append(f"angular error {report.valid['angular_error']:.1f} deg")
        seconds = 60 * (report.train_minutes + report.valid_minutes)
        parts.append(f"{seconds:.1f} s")
        if self._epochs is not None:
            self._epochs.set_postfix_str(f"best loss {report.best.value:.4f}", refresh=False)
            self._epochs.update(report.epoch - self._epochs.n)
        tqdm.write("  ".join(parts) + ("  best" if report.is_best else ""), file=sys.stdout)
        sys.stdout.flush()  # an epoch may take an hour, and a file or pipe would hold its line back for many of them

    def track(self, batches: Iterable[Any], label: str, *, epoch: int, start_batch: int) -> Iterator[Any]:
        """Give back the same batches and move a bar with them, for `train_and_validate(..., track=...)`.

        Args:
            batches: the batches of an epoch from `start_batch` on.
            label: what the bar says, "training" or "validation".
            epoch: number of epochs done.
            start_batch: number of batches done in the epoch.

        Yields:
            The batches.
        """
        if self._is_open and self._epochs is None:
            self._epochs = _bar("Epochs", self._max_epochs, epoch, "epoch", position=0)
        description = f"Epoch {epoch + 1}/{self._max_epochs} {label}"
        total = len(batches) + start_batch if isinstance(batches, Sized) else None
        self._read_at, self._points = self._clock(), None
        self._batches = _bar(description, total, start_batch, "batch", position=int(self._epochs is not None))
        with self._batches as bar:
            for batch in batches:
                yield batch
                bar.update()

    def on_batch(self, state: TrainState, metrics: Metrics) -> None:
        """Show the loss of the epoch so far and the speed beside the bar of batches.

        Args:
            state: the run.
            metrics: the batch's sums.
        """
        if self._batches is None or self._batches.disable:
            return
        now, is_first = self._clock(), self._points is None
        if now - self._read_at < _SECONDS_BETWEEN_READINGS and not is_first:
            return
        total, points = (float(part) for part in state.sums["loss"])
        before = points - float(metrics["loss"].weight) if self._points is None else self._points
        speed = (points - before) / max(now - self._read_at, 1e-9)
        self._batches.set_postfix_str(f"loss {total / points:.4f}, {speed:,.0f} points/s", refresh=False)
        self._read_at, self._points = now, points


def _bar(description: str, total: int | None, initial: int, unit: str, *, position: int) -> Any:
    """A bar that is shown on a terminal only, and leaves nothing behind."""
    return tqdm(
        desc=description,
        total=total,
        initial=initial,
        unit=unit,
        position=position,
        leave=False,
        disable=None,
        dynamic_ncols=True,
    )
