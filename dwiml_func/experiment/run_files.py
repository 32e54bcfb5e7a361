"""What the training of a run writes into its directory: checkpoints, and with them the best model and the logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dwiml_func.checkpoint.background import AsyncCheckpointer
from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.checkpoint.history import one_an_epoch
from dwiml_func.checkpoint.manifest import CheckpointError
from dwiml_func.core.non_finite import check_finite
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.experiment.batches import RunData
from dwiml_func.experiment.best_model import save_best_model
from dwiml_func.experiment.setup import RunParts
from dwiml_func.files.fingerprint import FingerprintInBackground
from dwiml_func.files.lock import same_folder
from dwiml_func.writers.writer import Writer

__all__ = ["HASH_PATIENCE", "NoRunFiles", "RunFiles", "data_in_background", "run_files"]

HASH_PATIENCE = 1.0
"""Seconds that a save waits for the dataset's SHA-256. The run's last save waits until it is there."""


class RunFiles:
    """Saves the states of a run in the background; the best model and the logs follow each checkpoint.

    `write` takes the reports, `check()` raises where the directory is no longer the run's.
    """

    def __init__(
        self,
        directory: Path,
        parts: RunParts,
        history: Sequence[EpochReport],
        *,
        write: Writer,
        check: Callable[[], None],
    ) -> None:
        self._directory, self._parts, self._write, self._check = directory, parts, write, check
        self._history, self._is_last = tuple(history), False
        self._fingerprint = data_in_background(directory, parts.data, parts.config.hdf5_file)
        checkpoints, origin = parts.config.checkpoints, parts.config.origin
        self.checkpointer = AsyncCheckpointer(
            directory,
            config=parts.config.to_dict(),
            data=self.data,
            keep=checkpoints.keep,
            keep_always=() if origin is None else (origin.checkpoint,),  # a fork cannot make it again
        )

    def save(self, state: TrainState, reports: Sequence[EpochReport]) -> None:
        """Begin to save a state, after the save before. `reports` are those since then."""
        self._is_last = bool(reports) and reports[-1].stop is not None
        self._history = one_an_epoch((*self._history, *reports))

        def write_model_and_logs(state: TrainState) -> None:
            self._check()
            if reports and reports[-1].is_best:  # a best epoch is saved at once, so this is its state
                save_best_model(self._directory, state, self._parts)
            if reports:
                self._write(*reports)  # of a validation within an epoch too: what ends a run is logged

        self.checkpointer.save(state, self._history, then=write_model_and_logs)

    def data(self) -> Mapping[str, Any]:
        """The data's fingerprint, for which the last save of a run waits. Nothing is written before it is checked."""
        self._check()
        return self._fingerprint(patience=None if self._is_last else HASH_PATIENCE)

    def wait(self) -> None:
        """Wait until nothing is being saved; raises the error of a failed save."""
        self.checkpointer.wait()


class NoRunFiles:
    """Writes nothing: for all processes of a group but the first."""

    def save(self, state: TrainState, reports: Sequence[EpochReport]) -> None:
        """Raise what the first process raises at once; save nothing."""
        check_finite(state)

    def data(self) -> Mapping[str, Any]:
        """Of a process that does not save."""
        return {}

    def wait(self) -> None:
        """Do nothing."""


@contextmanager
def run_files(
    directory: Path, parts: RunParts, history: Sequence[EpochReport], *, write: Writer
) -> Iterator[RunFiles | NoRunFiles]:
    """Keep the files of a run up to date in the block, and everything is on disk at its end; `history` is before it."""
    if parts.process_group.rank > 0:
        yield NoRunFiles()
        return
    with same_folder(directory) as check:
        files = RunFiles(directory, parts, history, write=write, check=check)
        with files.checkpointer:
            yield files


def data_in_background(directory: Path, data: RunData, hdf5_file: str) -> Callable[..., Mapping[str, Any]]:
    """Begin to hash the data. The result raises ValueError where the newest checkpoint recorded another hash."""
    try:
        checkpoint = newest(directory)
    except CheckpointError:
        checkpoint = None
    recorded = None if checkpoint is None else checkpoint.data
    return FingerprintInBackground(hdf5_file, data.linked, recorded=recorded, read=data.read).result
