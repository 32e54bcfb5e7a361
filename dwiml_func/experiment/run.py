"""Training an experiment: `run_experiment` trains one run in its directory, with checkpoints, best model and logs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dwiml_func.checkpoint.background import AsyncCheckpointer, NoCheckpointer
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.checkpoint.history import one_an_epoch
from dwiml_func.core.loop import train_and_validate
from dwiml_func.core.loop_options import Track
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.experiment.best_model import save_best_model
from dwiml_func.experiment.data_hash import HASH_PATIENCE, data_in_background
from dwiml_func.experiment.logs import experiment_writer, write_parameters
from dwiml_func.experiment.setup import RunParts
from dwiml_func.experiment.signals import StopRequest, TrainingStopped
from dwiml_func.experiment.train_and_save import train_and_save
from dwiml_func.files.lock import same_folder
from dwiml_func.types import Metrics
from dwiml_func.writers.steps import log_steps
from dwiml_func.writers.writer import Writer, fan_out

__all__ = ["run_experiment", "set_num_threads"]


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
    config, training = parts.config, parts.config.training
    state = parts.first_state() if state is None else state
    stop = StopRequest(process_group=parts.process_group) if stop is None else stop
    history = tuple(history)
    set_num_threads(training.num_operation_threads)
    _check_same_start(parts, state)
    write = experiment_writer(directory, config) if write is None else fan_out(write)
    on_report = None
    if parts.process_group.rank == 0:
        write_parameters(directory, config, nb_features=parts.nb_features, now=datetime.now())
        if config.logging.log_every is not None:
            write.write_scalars(state.step, {})
            log = log_steps(write, every=config.logging.log_every, learning_rate=training.schedule)
            on_batch, on_report = partial(_both, log, on_batch), log
        if history:
            write(*history)

    loop = partial(
        train_and_validate,
        train=parts.train,
        step=parts.step,
        valid=parts.valid,
        eval_step=parts.eval_step if parts.valid else None,
        learning_rate=training.schedule,
        max_epochs=training.max_epochs,
        patience=training.patience,
        **training.judging,
        keep_unvalidated=False,  # the state after the last batch is saved, and its validation repeated
        track=track,
    )
    is_first = parts.process_group.rank == 0  # of several processes, which writes
    data = data_in_background(directory, parts.data, config.hdf5_file) if is_first else _no_data
    is_last = False
    with ExitStack() as stack:
        check = stack.enter_context(same_folder(directory)) if is_first else dict

        def checked_data() -> Mapping[str, Any]:
            check()  # before anything is written
            return data(patience=None if is_last else HASH_PATIENCE)

        checkpointer = stack.enter_context(_make_checkpointer(directory, parts, checked_data))

        def save(state: TrainState, reports: tuple[EpochReport, ...]) -> None:
            nonlocal history, is_last
            is_last = bool(reports) and reports[-1].stop is not None
            history = one_an_epoch((*history, *reports))

            def write_model_and_logs(state: TrainState) -> None:
                check()
                if reports and reports[-1].is_best:  # a best epoch is saved at once, so this is its state
                    save_best_model(directory, state, parts)
                if reports:
                    write(*reports)  # of a validation within an epoch too: what ends a run is logged

            checkpointer.save(state, history, then=write_model_and_logs)

        try:
            yield from train_and_save(
                loop,
                state,
                save=save,
                must_save=lambda report: report.is_best or report.stop is not None or report.batch > 0,
                interval=config.checkpoints.save_interval,
                on_batch=on_batch,
                on_report=on_report,
                stop=stop,
                directory=directory,
            )
            checked_data()  # also where nothing was left to train
        except TrainingStopped:
            checkpointer.wait()  # the message says that the state is saved
            raise


def _both(
    first: Callable[[Any, Metrics], object],
    second: Callable[[Any, Metrics], object] | None,
    state: Any,
    metrics: Metrics,
) -> None:
    first(state, metrics)
    if second is not None:
        second(state, metrics)


def _no_data(*, patience: float | None) -> Mapping[str, Any]:
    """Of a process that does not save."""
    return {}


def set_num_threads(wanted: int) -> None:
    """Set torch's number of threads, and warn where torch does not take it."""
    torch.set_num_threads(wanted)
    if torch.get_num_threads() != wanted:
        logging.getLogger(__name__).warning(
            "Expected %d threads, got %d; results will not be bitwise identical.", wanted, torch.get_num_threads()
        )


def _make_checkpointer(
    directory: Path, parts: RunParts, data: Callable[[], Mapping[str, Any]]
) -> AsyncCheckpointer | NoCheckpointer:
    """Of several processes that train together, only the first saves."""
    if parts.process_group.rank > 0:
        return NoCheckpointer()
    config = parts.config
    return AsyncCheckpointer(
        directory,
        config=config.to_dict(),
        data=data,
        keep=None if config.checkpoints.keep == "all" else config.checkpoints.keep,
        keep_always=() if config.origin is None else (config.origin.checkpoint,),  # a fork cannot make it again
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
