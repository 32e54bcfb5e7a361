"""Progress on a terminal: a bar of epochs, a bar of batches, and one line per epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.types import Metrics

__all__ = ["Progress"]

_SHOWN = ("loss", "angular_error", "tracking_window_lag", "reconstruction_error")  # named in the line by themselves
_SECONDS_BETWEEN_READINGS = 0.5  # reading the loss waits for the device


class Progress:
    """A writer that prints one line per epoch on standard output, and shows bars on standard error if it is a terminal.

    `track` shows the bar of batches, `on_batch` the loss and the speed beside it. In a `with` block the bar of epochs
    is above it, with the best loss and the remaining time.

    Args:
        max_epochs: number of epochs at which the run ends.
        clock: returns seconds; for tests.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from dwiml_func import init_state, module_loss, sgd, train_and_validate, train_step
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
        >>> with Progress(max_epochs=2) as progress:
        ...     for state, report in train_and_validate(
        ...         init_state(model, sgd(), seed=0),
        ...         train=lambda key, epoch, start_batch: [torch.zeros(4, 2)] * (3 - start_batch),
        ...         step=partial(train_step, loss_fn=loss_fn, optimizer=sgd()),
        ...         learning_rate=0.1,
        ...         max_epochs=2,
        ...         track=progress.track,
        ...         on_batch=progress.on_batch,
        ...     ):
        ...         progress(report)  # doctest: +ELLIPSIS
        Epoch 1/2  training loss ... s  best
        Epoch 2/2  training loss ...
    """

    def __init__(self, *, max_epochs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_epochs = max_epochs
        self._clock = clock
        self._is_open = False
        self._epochs: Any = None
        self._batches: Any = None
        self._read_at = 0.0
        self._points: float | None = None  # of the current epoch, when they were last read

    def __enter__(self) -> Progress:
        self._is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        for bar in (self._batches, self._epochs):
            if bar is not None:
                bar.close()

    def __call__(self, *reports: EpochReport) -> None:
        """Print the line of the last of these epochs, and move the bar of epochs."""
        if not reports:
            return
        report = reports[-1]
        within = f", batch {report.batch}" if report.batch else ""
        parts = [f"Epoch {report.epoch}/{self._max_epochs}{within}", f"training loss {report.train['loss']:.4f}"]
        if report.valid:
            parts.append(f"validation loss {report.valid['loss']:.4f}")
        if "angular_error" in report.valid:
            parts.append(f"angular error {report.valid['angular_error']:.1f} deg")
        if "reconstruction_error" in report.valid:
            parts.append(f"reconstruction error {report.valid['reconstruction_error']:.2f} voxels")
        if "tracking_window_lag" in report.valid:
            parts.append(f"window lag {report.valid['tracking_window_lag']:.2f} mm")
        means = report.valid or report.train
        if report.monitor not in _SHOWN and report.monitor in means:
            parts.append(f"{report.monitor} {means[report.monitor]:.4f}")
        seconds = 60 * (report.train_minutes + report.valid_minutes)
        parts.append(f"{seconds:.1f} s")
        if self._epochs is not None:
            self._epochs.set_postfix_str(f"best {report.monitor} {report.best.value:.4f}", refresh=False)
            self._epochs.update(report.epoch - bool(report.batch) - self._epochs.n)
        tqdm.write("  ".join(parts) + ("  best" if report.is_best else ""), file=sys.stdout)
        sys.stdout.flush()  # a file or a pipe would hold back the lines of many epochs, which may take hours

    def track(self, batches: Iterable[Any], label: str, *, epoch: int, start_batch: int) -> Iterator[Any]:
        """Yield the batches of an epoch from `start_batch` on and move a bar, for `train_and_validate(track=...)`.

        Args:
            batches: batches, in order.
            label: text of the bar, "training" or "validation".
            epoch: number of epochs done.
            start_batch: number of batches done in the epoch.
        """
        if self._is_open and self._epochs is None:
            self._epochs = _bar("Epochs", self._max_epochs, epoch, "epoch", position=0)
        description = f"Epoch {epoch + 1}/{self._max_epochs} {label}"
        total = len(batches) + start_batch if isinstance(batches, Sized) else None
        self._read_at, self._points, around = self._clock(), None, self._batches
        position = int(self._epochs is not None) + int(around is not None)
        self._batches = _bar(description, total, start_batch, "batch", position=position)
        try:
            with self._batches as bar:
                for batch in batches:
                    yield batch
                    bar.update()
        finally:
            self._batches = around
            if around is not None:
                self._read_at, self._points = self._clock(), None

    def on_batch(self, state: TrainState, metrics: Metrics) -> None:
        """Show the loss of the epoch so far and the speed beside the bar of batches, which `track` shows.

        Args:
            state: the state after the batch.
            metrics: the batch's sums.
        """
        if self._batches is None or self._batches.disable or "loss" not in metrics:  # of a batch that was left out
            return
        now, is_first = self._clock(), self._points is None
        if now - self._read_at < _SECONDS_BETWEEN_READINGS and not is_first:
            return
        total, points = (float(part) for part in state.sums["loss"])
        before = points - float(metrics["loss"].weight) if self._points is None else self._points
        speed = (points - before) / max(now - self._read_at, 1e-9)
        self._batches.set_postfix_str(f"loss {total / points:.4f}, {speed:,.0f} points/s", refresh=False)
        self._read_at, self._points = now, points


class _Terminal:
    """Standard error for a bar: one that was closed, or a terminal that is gone, costs the bar and not the training."""

    def __eq__(self, other: object) -> bool:
        return other is sys.stderr  # so that tqdm.write clears the bar above a line

    __hash__ = None  # type: ignore[assignment]
    encoding = property(lambda self: getattr(sys.stderr, "encoding", None))

    def isatty(self) -> bool:
        return bool(self._try("isatty"))

    def write(self, text: str) -> None:
        self._try("write", text)

    def flush(self) -> None:
        self._try("flush")

    def fileno(self) -> int:
        number = self._try("fileno")
        return -1 if number is None else number

    def _try(self, method: str, *arguments: Any) -> Any:
        with suppress(OSError, ValueError, AttributeError):  # ValueError of a closed file, AttributeError of None
            return getattr(sys.stderr, method)(*arguments)
        return None


def _bar(description: str, total: int | None, initial: int, unit: str, *, position: int) -> Any:
    """A bar that is shown only on a terminal, and leaves nothing behind."""
    return tqdm(
        desc=description,
        file=_Terminal(),
        total=total,
        initial=initial,
        unit=unit,
        position=position,
        leave=False,
        disable=None,
        dynamic_ncols=True,
    )
