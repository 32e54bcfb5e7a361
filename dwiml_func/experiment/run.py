"""A run in its experiment's directory: the loop, with checkpoints, the best model and logs."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from dwiml_func.checkpoint.background import AsyncCheckpointer, NoCheckpointer
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.checkpoint.index import checkpoint_name, list_checkpoints
from dwiml_func.core.loop import EpochReport, train_and_validate
from dwiml_func.core.rng import Key
from dwiml_func.core.state import TrainState
from dwiml_func.distributed.process_group import ProcessLostError
from dwiml_func.experiment.best_model import save_best_model
from dwiml_func.experiment.logs import experiment_writer, write_parameters
from dwiml_func.experiment.setup import RunParts
from dwiml_func.experiment.signals import StopRequest, TrainingStopped
from dwiml_func.files.fingerprint import FingerprintInBackground
from dwiml_func.optim.schedules import per_epoch
from dwiml_func.types import Metrics
from dwiml_func.writers.writer import Writer, fan_out

__all__ = ["run_experiment"]


def run_experiment(
    directory: Path,
    setup: RunParts,
    *,
    state: TrainState | None = None,
    history: Sequence[EpochReport] = (),
    on_batch: Callable[[TrainState, Metrics], None] | None = None,
    write: Writer | None = None,
    stop: StopRequest | None = None,
) -> Iterator[EpochReport]:
    """Train; save checkpoints as the config says and, with each that ends an epoch, the best model and the logs.

    Checkpoints, best model and logs are written in the background, in this order, so that a crash leaves none of them
    ahead of the checkpoint, and a resume writes what it left out. Sets torch's number of threads. Hold the experiment's
    lock, see `dwiml_func.files.lock`.

    Args:
        directory: the experiment.
        setup: its parts.
        state: where to go on from; None starts at the beginning.
        history: the reports of the epochs before `state`.
        on_batch: called after each training batch, e.g. by a progress bar.
        write: writes the logs. It is given the history first, then each epoch whose checkpoint is saved; an error of it
            is warned of once, and cannot stop the training. None writes those of an experiment, `fan_out()` none.
        stop: looked at after each batch; see `dwiml_func.experiment.signals.stop_on_signals`.

    Yields:
        Each epoch's report. After the last, everything is on disk.

    Raises:
        TrainingStopped: `stop` asked for it; the run is saved up to the last batch.
        NonFiniteError: a loss or gradient was not finite; the last checkpoint stands.
        OSError: a checkpoint could not be saved; the one before stands.

    Example:
        >>> for report in run_experiment(directory, prepare(config)):  # doctest: +SKIP
        ...     print(report.epoch, report.monitored_loss)
    """
    config = setup.config
    state = setup.state if state is None else state
    _set_num_threads(config.training.num_threads)
    stop = StopRequest(process_group=setup.process_group) if stop is None else stop
    if setup.process_group.size > 1:
        _check_same_start(setup, state)
    write = experiment_writer(directory, config) if write is None else fan_out(write)
    if setup.process_group.rank == 0:
        write_parameters(directory, config, nb_features=setup.nb_features, now=datetime.now())
        if history:
            write(*history)
    with _checkpointer(directory, setup) as checkpointer:
        run = _Run(directory, setup, checkpointer, tuple(history), stop, on_batch, write)
        try:
            yield from run.epochs(state)
        except ProcessLostError:
            raise  # `stop` may be set: torchrun sends SIGTERM when one of its processes has ended
        except Exception as error:
            if stop.signal is None:
                raise
            # Not only `_Stop`: what was trained before another error is saved too, and the error told.
            besides = None if isinstance(error, _Stop) else error
            name = run.save_position()
            checkpointer.wait()
            names = list_checkpoints(directory)
            newest = name or (names[-1] if names else None)
            raise TrainingStopped(stop.signal, directory, newest, error=besides) from besides


def _checkpointer(directory: Path, setup: RunParts) -> AsyncCheckpointer | NoCheckpointer:
    """Of several processes that train together, the first saves."""
    if setup.process_group.rank > 0:
        return NoCheckpointer()
    config = setup.config
    keep = None if config.checkpoints.keep == "all" else config.checkpoints.keep
    data = FingerprintInBackground(config.hdf5_file).result
    began = () if config.origin is None else (config.origin.checkpoint,)  # a fork cannot make its first state again
    return AsyncCheckpointer(directory, config=config.to_dict(), data=data, keep=keep, keep_always=began)


def _check_same_start(setup: RunParts, state: TrainState) -> None:
    """Refuse to train together with a process that has another config or state."""
    text = setup.config.to_json() + state_digest(state)
    digests = setup.process_group.gather(torch.tensor(list(hashlib.sha256(text.encode()).digest())))
    different = [rank for rank, digest in enumerate(digests) if not torch.equal(digest, digests[0])]
    if different:
        raise ValueError(
            f"Processes {', '.join(map(str, different))} do not start from the config and state of process 0. "
            "Expected the same command line, versions and checkpoints in all of them."
        )


class _Stop(Exception):
    """Leaves the loop; it is no error."""


class _Run:
    """The position of a run between its loop and its checkpointer."""

    def __init__(
        self,
        directory: Path,
        setup: RunParts,
        checkpointer: AsyncCheckpointer | NoCheckpointer,
        history: tuple[EpochReport, ...],
        stop: StopRequest,
        on_batch: Callable[[TrainState, Metrics], None] | None,
        write: Writer,
    ) -> None:
        self._directory = directory
        self._setup = setup
        self._checkpointer = checkpointer
        self._history = history
        self._stop = stop
        self._on_batch = on_batch
        self._write = write
        self._cadence = setup.config.checkpoints.save_interval
        self._unsaved: TrainState | None = None  # the state after the last batch, where no checkpoint has it
        self._unwritten: tuple[EpochReport, ...] = ()  # those of epochs that no checkpoint has
        self._saved_at = time.monotonic()

    def epochs(self, state: TrainState) -> Iterator[EpochReport]:
        setup, training = self._setup, self._setup.config.training
        epochs = train_and_validate(
            state,
            train=setup.train,
            step=setup.step,
            valid=None if setup.valid is None else self._stoppable(setup.valid),
            eval_step=setup.eval_step if setup.valid else None,
            learning_rate=per_epoch(training.learning_rates),
            max_epochs=training.max_epochs,
            patience=training.patience,
            patience_delta=training.patience_delta,
            on_batch=self._after_batch,
        )
        for state, report in epochs:
            self._history = (*self._history, report)
            self._unwritten = (*self._unwritten, report)
            stopping = self._stop.agreed() and report.stop is None
            if self._cadence.due_after_epoch(report.epoch) or report.is_best or report.stop or stopping:
                self._save(state, is_best=report.is_best)
            else:
                self._unsaved = state
            yield report
            if stopping:
                raise _Stop

    def save_position(self) -> str | None:
        """Save the state after the last batch, unless it is saved already; returns the checkpoint's name."""
        state = self._unsaved
        if state is None:
            return None
        self._save(state)
        return checkpoint_name(state)

    def _after_batch(self, state: TrainState, metrics: Metrics) -> None:
        self._unsaved = state
        if self._on_batch is not None:
            self._on_batch(state, metrics)
        if self._stop.agreed():
            raise _Stop
        if self._cadence.due_within_epoch(batch=state.batch, seconds=time.monotonic() - self._saved_at):
            self._save(state)

    def _save(self, state: TrainState, *, is_best: bool = False) -> None:
        reports, self._unwritten = self._unwritten, ()

        def then(state: TrainState) -> None:
            if is_best:
                save_best_model(self._directory, self._setup, state)
            if reports:
                self._write(*reports)

        self._checkpointer.save(state, self._history, then=then)
        self._unsaved = None
        self._saved_at = time.monotonic()

    def _stoppable(self, batches: Callable[[Key, int, int], Iterable[Any]]) -> Callable[[Key, int, int], Iterator[Any]]:
        def stoppable(key: Key, epoch: int, start_batch: int) -> Iterator[Any]:
            for batch in batches(key, epoch, start_batch):
                if self._stop.agreed():
                    raise _Stop
                yield batch

        return stoppable


def _set_num_threads(wanted: int) -> None:
    torch.set_num_threads(wanted)
    if torch.get_num_threads() != wanted:
        logging.getLogger(__name__).warning(
            "This run was made for %d threads, torch gives %d: results will be close, not equal to the bit.",
            wanted,
            torch.get_num_threads(),
        )
