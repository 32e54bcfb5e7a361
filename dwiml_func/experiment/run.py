"""Training an experiment: `run_experiment` trains one run in its directory, with checkpoints, best model and logs.

`train_and_save` is the loop for runs and ensembles: it saves when that is due, and before an error or a signal ends it.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.checkpoint.index import checkpoint_name
from dwiml_func.core.interval import Interval
from dwiml_func.core.loop import train_and_validate
from dwiml_func.core.loop_options import Track
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.report import EpochReport
from dwiml_func.core.run_epoch import Interrupted
from dwiml_func.core.state import TrainState
from dwiml_func.distributed.process_group import ProcessLostError
from dwiml_func.experiment.logs import experiment_writer, write_parameters
from dwiml_func.experiment.run_files import run_files
from dwiml_func.experiment.setup import RunParts
from dwiml_func.experiment.signals import StopRequest, TrainingStopped
from dwiml_func.types import Metrics
from dwiml_func.writers.steps import log_steps
from dwiml_func.writers.writer import StepWriter, Writer, fan_out

__all__ = ["run_experiment", "set_num_threads", "train_and_save"]

Report = TypeVar("Report")


def run_experiment(
    directory: Path,
    parts: RunParts,
    *,
    state: TrainState | None = None,
    history: Sequence[EpochReport] = (),
    on_batch: Callable[[TrainState, Metrics], object] | None = None,
    track: Track | None = None,
    write: Writer | None = None,
    stop: StopRequest | None = None,
) -> Iterator[EpochReport]:
    """Train from `state`, by default the first state, and yield the reports of `train_and_validate`.

    Checkpoints are saved as the config says. The best model and the logs are written with each checkpoint at an epoch's
    end. All are written in the background in this order, so after a crash the checkpoint is never behind the others and
    a resume writes what is missing. After the last report, everything is on disk. Hold the experiment's lock.

    `history` has the reports of the epochs before `state`. `on_batch` and `track` are those of `train_and_validate`.
    `write` replaces the experiment's own logs; `fan_out()` writes none. A request in `stop` ends the run with
    `TrainingStopped`, after the state has been saved. Sets torch's number of threads.
    """
    training = parts.config.training
    state = parts.first_state() if state is None else state
    stop = StopRequest(process_group=parts.process_group) if stop is None else stop
    set_num_threads(training.num_operation_threads)
    _check_same_start(parts, state)
    write = experiment_writer(directory, parts.config) if write is None else fan_out(write)
    log = _begin_logs(directory, parts, state, history, write) if parts.process_group.rank == 0 else None
    loop = partial(
        train_and_validate,
        **parts.loop_options,
        max_epochs=training.max_epochs,
        patience=training.patience,
        keep_unvalidated=False,  # the state after the last batch is saved, and its validation repeated
        track=track,
    )
    with run_files(directory, parts, history, write=write) as files:
        try:
            yield from train_and_save(
                loop,
                state,
                save=files.save,
                must_save=lambda report: report.is_best or report.stop is not None or report.batch > 0,
                interval=parts.config.checkpoints.save_interval,
                on_batch=[each for each in (log, on_batch) if each is not None],
                on_report=log,
                stop=stop,
                directory=directory,
            )
            files.data()  # also where nothing was left to train
        except TrainingStopped:
            files.wait()  # the message says that the state is saved
            raise


def _begin_logs(
    directory: Path, parts: RunParts, state: TrainState, history: Sequence[EpochReport], write: StepWriter
) -> Callable[[TrainState, Any], None] | None:
    """Log all up to `state`; returns what logs the steps, None where they are not logged."""
    write_parameters(directory, parts.config, nb_features=parts.nb_features, now=datetime.now())
    log, every = None, parts.config.logging.log_every
    if every is not None:  # before the history, which may send what is in the logs of steps
        write.write_scalars(state.step, {})
        log = log_steps(write, every=every, learning_rate=parts.config.training.schedule)
    if history:
        write(*history)
    return log


def set_num_threads(wanted: int) -> None:
    """Set torch's number of threads, and warn where torch does not take it."""
    torch.set_num_threads(wanted)
    if torch.get_num_threads() != wanted:
        logging.getLogger(__name__).warning(
            "Expected %d threads, got %d; results will not be bitwise identical.", wanted, torch.get_num_threads()
        )


def _check_same_start(parts: RunParts, state: TrainState) -> None:
    """Raise ValueError when the processes that train together differ in config or state."""
    if parts.process_group.size == 1:
        return
    text = parts.config.to_json() + state_digest(state)
    digests = parts.process_group.gather(torch.tensor(list(hashlib.sha256(text.encode()).digest())))
    different = [rank for rank, digest in enumerate(digests) if not torch.equal(digest, digests[0])]
    if different:
        raise ValueError(
            f"Processes {', '.join(map(str, different))} do not start from the config and state of process 0. "
            "Expected the same command line, versions and checkpoints in all of them."
        )


def train_and_save(
    loop: Callable[..., Iterator[tuple[Any, Report]]],
    state: Any,
    *,
    save: Callable[[Any, tuple[Report, ...]], None],
    must_save: Callable[[Report], bool],
    interval: Interval,
    on_batch: Sequence[Callable[[Any, Metrics], object]] = (),
    on_report: Callable[[Any, Report], object] | None = None,
    stop: StopRequest,
    directory: Path,
) -> Iterator[Report]:
    """Run a training loop from `state` and yield its reports; save when the interval, a report or a stop request asks.

    `loop(state, on_batch=..., interrupt=...)` is `train_and_validate` or `train_and_validate_ensemble`. `save(state,
    reports)` gets the reports since the last save. After a stop request the last state is saved, also when another
    error ends the loop, and `TrainingStopped` is raised. Any other error but that of a step that was not finite, such
    as one in the validation, costs no batch that was trained either.
    """
    saves = _Saves(save, newest=checkpoint_name(state) if state.epoch or state.batch else None)

    def after_batch(state: Any, metrics: Metrics) -> None:
        saves.unsaved = state
        for call in on_batch:
            call(state, metrics)
        if interval.due_within_epoch(batch=state.batch, seconds=time.monotonic() - saves.saved_at):
            saves.save(state)

    try:
        for done, report in loop(state, on_batch=after_batch, interrupt=stop.agreed):
            saves.unsaved, saves.reports = done, (*saves.reports, report)
            if on_report is not None:  # before a save: a resume does not repeat it
                on_report(done, report)
            if interval.due_after_epoch(done.epoch) or must_save(report):
                saves.save(done)
            yield report
    except ProcessLostError:
        raise  # the signal may be torchrun's, which stops the others when one process has ended
    except Exception as error:
        if stop.signal is None:
            if not isinstance(error, NonFiniteError):
                saves.save_despite(error)
            raise
        failure = None if isinstance(error, Interrupted) else error
        try:
            saves.save_rest()
        except NonFiniteError as not_finite:  # the checkpoint before is the last one to resume from
            failure = not_finite
        raise TrainingStopped(stop.signal, directory, saves.newest, error=failure) from failure


@dataclass(slots=True)
class _Saves:
    """What is saved and what is not: the newest checkpoint's name, the last state, the reports since the last save."""

    function: Callable[[Any, tuple[Any, ...]], None]
    newest: str | None
    unsaved: Any = None
    reports: tuple[Any, ...] = ()
    saved_at: float = field(default_factory=time.monotonic)
    has_failed: bool = False

    def save(self, state: Any) -> None:
        """Save a state, which is the last one."""
        self.has_failed = True  # until it is saved
        self.function(state, self.reports)
        self.has_failed = False
        self.newest, self.unsaved, self.reports, self.saved_at = checkpoint_name(state), None, (), time.monotonic()

    def save_rest(self) -> None:
        """Save the last state, if it is not saved."""
        if self.unsaved is not None:
            self.save(self.unsaved)

    def save_despite(self, error: Exception) -> None:
        """Save the last state after an error; where that fails, the error says so."""
        is_of_a_save = self.has_failed
        try:
            self.save_rest()
        except Exception as failure:  # a step that failed may have reused the state's memory
            if not is_of_a_save:  # else the disk has failed again
                error.add_note(f"The state before the error could not be saved: {failure}")
