"""Progress on a terminal: a bar of batches, and a line an epoch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sized
from typing import Any

from tqdm import tqdm

from dwiml_func.loop import Batches, EpochReport
from dwiml_func.metrics import Metrics, read_means
from dwiml_func.rng import Key
from dwiml_func.state import TrainState

__all__ = ["Progress"]


class Progress:
    """A bar on standard error while an epoch runs, if that is a terminal, and a line on standard output after it.

    Args:
        max_epochs: for "epoch 3/100".

    Example:
        >>> progress = Progress(max_epochs=2)
        >>> list(progress.track(lambda key, epoch, start: [1, 2, 3], "training")(Key(0), 0, 0))
        [1, 2, 3]
    """

    def __init__(self, *, max_epochs: int) -> None:
        self._max_epochs = max_epochs
        self._bar: Any = None

    def track(self, batches: Batches, label: str) -> Batches:
        """Wrap a source of batches so that iterating it moves a bar.

        Args:
            batches: the source.
            label: what the bar says, "training" or "validation".

        Returns:
            A source of the same batches.
        """

        def tracked(key: Key, epoch: int, start_batch: int) -> Iterator[Any]:
            loader = batches(key, epoch, start_batch)
            description = f"Epoch {epoch + 1}/{self._max_epochs} {label}"
            total = len(loader) + start_batch if isinstance(loader, Sized) else None
            with tqdm(
                desc=description, total=total, initial=start_batch, unit="batch", leave=False, disable=None
            ) as bar:
                self._bar = bar
                for batch in loader:
                    yield batch
                    bar.update()

        return tracked

    def on_batch(self, state: TrainState, metrics: Metrics) -> None:
        """Show the loss of the epoch so far beside the bar.

        Args:
            state: the run.
            metrics: the batch's sums, not used.
        """
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(f"loss {read_means(state.sums)['loss']:.4f}", refresh=False)

    def report(self, report: EpochReport) -> None:
        """Print an epoch's line.

        Args:
            report: the epoch's report.
        """
        parts = [f"Epoch {report.epoch}/{self._max_epochs}", f"training loss {report.train['loss']:.4f}"]
        if report.valid:
            parts.append(f"validation loss {report.valid['loss']:.4f}")
        if "angular_error" in report.valid:
            parts.append(f"angular error {report.valid['angular_error']:.1f} deg")
        seconds = 60 * (report.train_minutes + report.valid_minutes)
        parts.append(f"{seconds:.1f} s")
        tqdm.write("  ".join(parts) + ("  best" if report.is_best else ""), file=sys.stdout)
        sys.stdout.flush()  # an epoch may take an hour, and a file or pipe would hold its line back for many of them
