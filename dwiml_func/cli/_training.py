"""What `train`, `resume`, `fork` and sweeps share: training one run with progress bars, and a summary at the end."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import tyro

from dwiml_func._checks import pluralize, truncated_repr
from dwiml_func.checkpoint.history import one_an_epoch
from dwiml_func.checkpoint.index import position_name
from dwiml_func.checkpoint.provenance import environment
from dwiml_func.cli._messages import is_quiet, print_progress
from dwiml_func.cli._summary import format_summary, format_tracking
from dwiml_func.compiled.step import JitStep
from dwiml_func.compiled.warmup import WarmUpStep
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.data.neighborhood import direction_units
from dwiml_func.data.spherical_harmonics import assumed_signal
from dwiml_func.distributed.process_group import rank_zero_first
from dwiml_func.distributed.sharding import ProcessGroup
from dwiml_func.ensemble.captured import CapturedEnsembleStep
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.finish import finish_run
from dwiml_func.experiment.folder import create_experiment
from dwiml_func.experiment.fork import create_initialized, initialize_from
from dwiml_func.experiment.resume import resume_experiment
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import RunParts, prepare
from dwiml_func.experiment.signals import stop_on_signals
from dwiml_func.files.lock import experiment_lock, remove_left_lock, same_folder
from dwiml_func.writers.progress import Progress

__all__ = [
    "TimeLimit",
    "created",
    "describe_run",
    "describe_start",
    "new_run",
    "print_end",
    "print_graphs",
    "resumed_run",
    "train_with_progress",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TimeLimit:
    """The option of commands that train for a limited time."""

    stop_after: Annotated[str | None, tyro.conf.arg(metavar="DURATION")] = None
    """Time after which the run is saved and stops, such as 3h55m, 90m or 1d12h: exit code 142. None: no limit."""

    def deadline(self) -> float | None:
        """The end of the time that begins now, as `time.monotonic` counts."""
        return None if self.stop_after is None else time.monotonic() + _seconds(self.stop_after)


def _seconds(duration: str) -> float:
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", duration, re.ASCII)
    if not duration or found is None:
        raise ValueError(
            f"--stop-after: expected days, hours, minutes and seconds, such as 3h55m or 90m. "
            f"Received: {truncated_repr(duration)}."
        )
    return sum(int(number or 0) * unit for number, unit in zip(found.groups(), (86400, 3600, 60, 1), strict=True))


@contextlib.contextmanager
def new_run(
    path: str | Path, name: str, config: RunConfig, process_group: ProcessGroup, *, init_from: str | None = None
) -> Iterator[tuple[RunParts, TrainState | None, tuple[EpochReport, ...]]]:
    """The parts, the state and the history of a new experiment, for `train_with_progress` within the block.

    Processes that have joined make it together. Where the same command began it, it is resumed.
    """
    directory = Path(path) / name
    is_again = process_group.rank == 0 and directory.exists()
    if any(process_group.gather(torch.tensor([int(is_again)]))):
        print_progress(f"{directory} exists, with this config: resuming it.")
        with resumed_run(directory, process_group, given=config, may_have_ended=True) as resumed:
            yield resumed
        return
    parts, state = prepare(config, process_group).as_new(), None
    if init_from is not None:
        parts, state, report = initialize_from(parts, init_from)
        print_progress(f"{init_from}: {report}")
    create = partial(create_experiment, path, name, parts.config)
    if state is not None:
        create = partial(create_initialized, path, name, parts, state)
    with created(directory, process_group, create):
        yield parts, state, ()


@contextlib.contextmanager
def created(directory: Path, process_group: ProcessGroup, create: Callable[[], object]) -> Iterator[None]:
    """Create an experiment, and hold its lock in the block; of several processes only the first does."""
    if process_group.rank > 0:
        yield
        return
    with experiment_lock(directory.parent, wait=True):
        create()
    with experiment_lock(directory):
        yield


@contextlib.contextmanager
def resumed_run(
    directory: Path, process_group: ProcessGroup, **options: Any
) -> Iterator[tuple[RunParts, TrainState, tuple[EpochReport, ...]]]:
    """What `resume_experiment` gives with these options, for `train_with_progress` within the block.

    With `may_have_ended`, a run that has is summarized.
    """
    resume = partial(resume_experiment, directory, process_group=process_group, **options)
    if process_group.rank == 0:
        remove_left_lock(directory.parent)  # of a kill when the experiment had just been made
    with experiment_lock(directory) if process_group.rank == 0 else contextlib.nullcontext():
        yield rank_zero_first(process_group, resume)


def train_with_progress(
    directory: Path,
    parts: RunParts,
    state: TrainState | None,
    history: tuple[EpochReport, ...],
    deadline: float | None = None,
) -> None:
    """Train from `state`, after `history`, until `deadline`, with bars and a line per epoch; evaluate and summarize."""
    progress = None if is_quiet() else Progress(max_epochs=parts.config.training.max_epochs)
    shown = {} if progress is None else {"on_batch": progress.on_batch, "track": progress.track}
    print_progress(describe_run(directory, parts))
    if state is not None and (state.epoch or state.batch) and state.epoch < parts.config.training.max_epochs:
        print_progress(describe_start(state.epoch, state.batch))
    _log.debug("%s", ", ".join(f"{name} {value}" for name, value in environment().items() if name != "num_threads"))
    num_before, is_first = len(history), parts.process_group.rank == 0
    with same_folder(directory) if is_first else contextlib.nullcontext() as check:
        with (
            stop_on_signals(parts.process_group, at_second=_stop_at_once, deadline=deadline) as stop,
            progress or contextlib.nullcontext(),
        ):
            try:
                for report in run_experiment(directory, parts, state=state, history=history, stop=stop, **shown):
                    history = one_an_epoch((*history, report))
                    _print_compilation(parts)
                    if progress is not None:
                        progress(report)
            except NonFiniteError as error:
                raise _with_command(error, directory) from error
        if check is not None:
            check()
            if len(history) == num_before:
                print_progress("Nothing is left to train.")
            print_end(directory, parts, history)


def describe_start(epoch: int, batch: int) -> str:
    """One line: the checkpoint that a run resumes from, and what it trains next; both numbers are those done."""
    within = f", batch {batch + 1}" if batch else ""
    return f"Resuming from checkpoint {position_name(epoch, batch)}: next is epoch {epoch + 1}{within}."


def describe_run(directory: Path, parts: RunParts) -> str:
    """One line: the experiment, its data and the size of its model."""
    training, validation = parts.data.training.index, parts.data.validation.index
    is_cubic = all(
        bool((direction_units(data.voxel_sizes) == 1).all()) for data in (parts.data.training, parts.data.validation)
    )
    num_parameters = sum(tensor.numel() for tensor in parts.model.parameters() if tensor.requires_grad)
    return (
        f"{directory}: {training.num_total} streamlines of {pluralize(len(training.subjects), 'training subject')}, "
        f"{validation.num_total} of {pluralize(len(validation.subjects), 'validation subject')}, "
        + (
            f"{parts.config.batches.nb_points} points each, {num_parameters} parameters. An autoencoder does not "
            "track: no window lag, no tracking scores"
            if parts.config.model.model == "autoencoder"
            else f"{parts.nb_features} features{assumed_signal(parts.data.training.input_attributes)}, "
            f"{num_parameters} parameters"
        )
        + ("" if is_cubic else ". Voxels are no cubes: directions, steps and noise are in mm along the voxel axes")
    )


def print_end(directory: Path, parts: RunParts, history: Sequence[EpochReport]) -> None:
    """Evaluate the best model; write the result and the figure into the experiment and print the summary."""
    if history[-1].best.epoch is None:
        print(f"No epoch had a finite {parts.config.training.monitor}, so there is no best model.")
        return
    evaluation, tracking = finish_run(directory, parts, history)
    print_graphs(inspect.unwrap(parts.step))
    print_progress("")
    how = None if tracking is None else format_tracking(tracking)
    print(format_summary(history, evaluation, subset=parts.data.evaluation.subset, tracking=how))


def _with_command(error: NonFiniteError, directory: Path) -> NonFiniteError:
    """The error with the command that leaves the batch out."""
    if error.at is None:
        return error
    run = shlex.join([str(directory.parent), directory.name])
    batch = ":".join(map(str, error.at))
    return NonFiniteError(f"{error} To leave this batch out: dwiml-func resume {run} --skip {batch}", at=error.at)


def _print_compilation(parts: RunParts) -> None:
    """Print once the time that compilation took and saves."""
    step = inspect.unwrap(parts.step)
    if isinstance(step, WarmUpStep) and step.report is not None:
        print_progress(str(step.report))
        step.report = None


def print_graphs(step: Any) -> None:
    """Print how many graphs a compiled step has made."""
    if isinstance(step, JitStep | CapturedEnsembleStep) and step.num_cuda_graphs:
        reason = "" if step.cuda_graphs_reason is None else f". Others ran without: {step.cuda_graphs_reason}"
        print_progress(f"Steps were replays of {pluralize(step.num_cuda_graphs, 'CUDA graph')}{reason}")
    elif isinstance(step, WarmUpStep) and step.graph.num_compilations:
        print_progress(f"Steps ran in {pluralize(step.graph.num_compilations, 'compiled graph')}")


def _stop_at_once(number: signal.Signals) -> NoReturn:
    """End the process. An exception would run clean-ups, which may wait for a disk."""
    with contextlib.suppress(OSError):  # standard error was closed
        os.write(2, b"dwiml-func: stopped immediately. The last checkpoint is kept.\n")
    os._exit(128 + number)
