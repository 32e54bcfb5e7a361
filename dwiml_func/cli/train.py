"""`dwiml-func train`."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from dwiml_func.checkpoint.provenance import environment
from dwiml_func.cli._ensemble import train_members
from dwiml_func.cli._example_options import example_options, kept_example_options
from dwiml_func.cli._messages import is_quiet, pluralize, print_progress
from dwiml_func.cli._parsing import parse, value_of
from dwiml_func.cli._run_options import RUN_SUBJECTS, RunOptions, read_config_part
from dwiml_func.cli._summary import format_summary
from dwiml_func.compiled.warmup import WarmUpStep
from dwiml_func.core.loop import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.distributed.process_group import join_process_group, rank_in
from dwiml_func.experiment.ensemble_members import member_configs
from dwiml_func.experiment.evaluation import evaluate_best_model, write_evaluation
from dwiml_func.experiment.folder import check_new_experiment, create_experiment, experiment_directory
from dwiml_func.experiment.plots import save_run_figure
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import RunParts, prepare
from dwiml_func.experiment.signals import stop_on_signals
from dwiml_func.files.lock import experiment_lock
from dwiml_func.writers.progress import Progress

__all__ = ["TrainOptions", "run", "train_with_progress"]

EXAMPLE_FILE = "example_data.hdf5"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """Train a Learn2Track model. Every epoch ends with a checkpoint in EXPERIMENTS_PATH/EXPERIMENT_NAME/checkpoint, from
    which `dwiml-func resume` goes on; the best epoch's model is kept in best_model, the logs in logs, a
    picture in plots.

    Example: dwiml-func train experiments second_run data.hdf5 --patience 10 --dropout 0.2
    """

    experiments_path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENTS_PATH")]
    """Folder of all experiments; it must exist."""
    experiment_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_NAME")]
    """Name of the new experiment."""
    hdf5_file: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[HDF5_FILE]")] = None
    """The dataset. None: that of --config or else the built-in example data, made once and kept in EXPERIMENTS_PATH,
    with options to suit."""
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Take the options from a run's config.json, or from a file with a part of it; those of the command line come on
    top. None: no file."""
    num_models: int = 1
    """Train that many models at once, with seeds from --rng on: an ensemble, with a folder for each in
    EXPERIMENT_NAME."""
    sweep: tuple[str, ...] = ()
    """Train a model for each value at once: NAME=VALUE,VALUE,... of learning-rate, weight-decay or rng; several: all
    combinations. None: no sweep."""
    dry_run: bool = False
    """Print the complete config as JSON, and on standard error what the data are; train and write nothing."""


def run(arguments: Sequence[str], program: str) -> int:
    """Run the command.

    Args:
        arguments: the command line.
        program: the program's name in messages.

    Returns:
        The exit code, 0.

    Raises:
        ValueError, OSError: the command cannot start; nothing was written.

    Example:
        >>> run(["experiments", "first_run"], "dwiml-func train")  # doctest: +SKIP
    """
    options = _read_options(arguments, program)
    directory = experiment_directory(options.experiments_path, options.experiment_name)
    if rank_in() == 0:
        check_new_experiment(options.experiments_path, options.experiment_name)
    example = Path(options.experiments_path, EXAMPLE_FILE)
    config = options.to_config(options.hdf5_file or example)
    members = member_configs(config, num_models=options.num_models, sweep=options.sweep)
    if options.dry_run:
        is_there = options.hdf5_file is not None or example.exists()
        data = _describe(directory, prepare(config)) if is_there else f"{example} would be made."
        print(config.to_json(), end="")
        print(data, file=sys.stderr)
        return 0
    if options.hdf5_file is None:
        kept = shlex.join(kept_example_options(options))
        print_progress(f"Example data, with {kept}" if kept else "Example data")
        _make_example_data(example)
    if len(members) > 1:
        train_members(options.experiments_path, options.experiment_name, members)
        return 0
    with join_process_group("cuda" if config.training.use_gpu else "cpu") as process_group:
        setup = prepare(config, process_group)
        if process_group.rank > 0:  # the first process writes
            train_with_progress(directory, setup, setup.state, ())
            return 0
        with experiment_lock(options.experiments_path, wait=True):
            create_experiment(options.experiments_path, options.experiment_name, config)
        with experiment_lock(directory):
            train_with_progress(directory, setup, setup.state, ())
    return 0


def train_with_progress(directory: Path, setup: RunParts, state: TrainState, history: tuple[EpochReport, ...]) -> None:
    """Train with bars and a line an epoch, and print the summary.

    Args:
        directory: the experiment.
        setup: its parts.
        state: where to go on from.
        history: the reports so far.

    Raises:
        TrainingStopped: a signal asked for it; the run is saved up to the last batch.

    Example:
        >>> train_with_progress(directory, setup, setup.state, ())  # doctest: +SKIP
    """
    progress = None if is_quiet() else Progress(max_epochs=setup.config.training.max_epochs)
    if progress is not None:
        valid = None if setup.valid is None else progress.track(setup.valid, "validation")
        setup = replace(setup, train=progress.track(setup.train, "training"), valid=valid)
    print_progress(_describe(directory, setup))
    _log.debug("%s", ", ".join(f"{name} {value}" for name, value in environment().items() if name != "num_threads"))
    with stop_on_signals(setup.process_group, at_second=_stop_at_once) as stop, progress or contextlib.nullcontext():
        on_batch = None if progress is None else progress.on_batch
        for report in run_experiment(directory, setup, state=state, history=history, on_batch=on_batch, stop=stop):
            history = (*history, report)
            _tell_compilation(setup)
            if progress is not None:
                progress(report)
    if setup.process_group.rank == 0:
        _finish(directory, setup, history)


def _finish(directory: Path, setup: RunParts, history: tuple[EpochReport, ...]) -> None:
    """Judge the best model, and leave what was found in the experiment: as numbers, as a picture and in words."""
    best = history[-1].best.epoch
    if best is None:
        print("No epoch had a finite loss: there is no best model.")
        return
    evaluation, subset = evaluate_best_model(directory, setup), setup.evaluation_set.subset
    try:
        write_evaluation(directory, evaluation, epoch=best, subset=subset)
    except OSError as error:
        _log.warning("The evaluation was not written: %s", error)
    save_run_figure(directory)
    print_progress("")
    print(format_summary(history, evaluation, subset=subset))


def _tell_compilation(setup: RunParts) -> None:
    """Print once what compilation cost and brings."""
    if isinstance(setup.step, WarmUpStep) and setup.step.report is not None:
        print_progress(str(setup.step.report))
        setup.step.report = None


def _read_options(arguments: Sequence[str], program: str) -> TrainOptions:
    """The options of the command line, on top of those of --config, on top of those that suit the data."""
    path = value_of("--config", arguments)

    def read(base: RunOptions) -> TrainOptions:
        base, hdf5_file = (base, None) if path is None else read_config_part(path, base)
        parts = {part.name: getattr(base, part.name) for part in fields(RunOptions)}
        default = TrainOptions(
            experiments_path=tyro.MISSING, experiment_name=tyro.MISSING, hdf5_file=hdf5_file, **parts
        )
        return parse(TrainOptions, arguments, program, default=default, subjects=RUN_SUBJECTS)

    with contextlib.suppress(ValueError, OSError):  # what is wrong shows again below
        options = read(parse(RunOptions, example_options(), program))
        if options.hdf5_file is None:
            return read(parse(RunOptions, example_options(options.model.dg_key), program))
    return read(RunOptions())


def _stop_at_once(number: signal.Signals) -> NoReturn:
    """End the process here and now. An exception would run what is being cleaned up, which may wait for a disk."""
    os.write(2, b"dwiml-func: stopped at once. The last checkpoint stands.\n")
    os._exit(128 + number)


def _describe(directory: Path, setup: RunParts) -> str:
    training, validation = setup.training_set.index, setup.validation_set.index
    num_parameters = sum(tensor.numel() for tensor in setup.state.params.values())
    return (
        f"{directory}: {training.num_total} streamlines of {pluralize(len(training.subjects), 'training subject')}, "
        f"{validation.num_total} of {pluralize(len(validation.subjects), 'validation subject')}, "
        f"{setup.training_set.num_features} features, {num_parameters} parameters"
    )


def _make_example_data(path: Path) -> None:
    with experiment_lock(path.parent, wait=True):
        if not path.exists():
            from dwiml_func.data.example.dataset import make_example_data

            print_progress(f"Making the example data, once: {path}")
            make_example_data(path)
