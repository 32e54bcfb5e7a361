"""`dwiml-func train`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from dwiml_func.atomic import remove_leftovers
from dwiml_func.cli.parsing import parse
from dwiml_func.cli.summary import print_summary
from dwiml_func.config import BatchConfig, DataConfig, ModelConfig, RunConfig, SnapshotConfig, TrainingConfig
from dwiml_func.experiment import check_new_experiment, create_experiment
from dwiml_func.interruption import stop_on_signals
from dwiml_func.lock import experiment_lock
from dwiml_func.loop import EpochReport
from dwiml_func.state import TrainState
from dwiml_func.training_run import run_experiment
from dwiml_func.wiring import Setup, prepare
from dwiml_func.writers.progress import Progress

__all__ = ["TrainOptions", "run", "train_with_progress"]

EXAMPLE_FILE = "example_data.hdf5"
EXAMPLE_OPTIONS = (
    *("--nb-previous-dirs", "1"),
    *("--weight-decay", "0"),
    *("--batch-size-training", "50"),
    *("--learning-rate", "0.002*20 0.0005"),
    *("--max-epochs", "30"),
)
"""Options of a run on the example data, where others are not given: the defaults are made for far larger data sets."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a Learn2Track model. Every epoch ends with a snapshot in EXPERIMENTS_PATH/EXPERIMENT_NAME/checkpoint, from
    which `dwiml-func resume` goes on; the best epoch's model is kept in best_model, the logs in logs.

    Example: dwiml-func train experiments first_run data.hdf5 --learning-rate "0.001*3 0.0001" --patience 10
    """

    experiments_path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENTS_PATH")]
    """Folder of all experiments; it must exist."""
    experiment_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_NAME")]
    """Name of the new experiment."""
    hdf5_file: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[HDF5_FILE]")] = None
    """The dataset. None: the built-in example data, made once and kept in EXPERIMENTS_PATH, with options to suit."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batches: BatchConfig = field(default_factory=BatchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)


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
    options = parse(TrainOptions, arguments, program)
    check_new_experiment(options.experiments_path, options.experiment_name)
    hdf5_file = options.hdf5_file
    if hdf5_file is None:
        options = parse(
            TrainOptions, [*EXAMPLE_OPTIONS, *arguments], program
        )  # of an option given twice the last counts
        print(f"Example data, with {shlex.join(EXAMPLE_OPTIONS)} unless given otherwise", flush=True)
        with experiment_lock(options.experiments_path, wait=True):
            hdf5_file = _example_data(Path(options.experiments_path))
    config = RunConfig(
        hdf5_file=str(Path(hdf5_file).absolute()),
        data=options.data,
        batches=options.batches,
        model=options.model,
        training=options.training,
        snapshots=options.snapshots,
    )
    setup = prepare(config)
    with experiment_lock(options.experiments_path, wait=True):
        remove_leftovers(options.experiments_path)
        directory = create_experiment(options.experiments_path, options.experiment_name, config)
    with experiment_lock(directory):
        train_with_progress(directory, setup, setup.state, ())
    return 0


def train_with_progress(directory: Path, setup: Setup, state: TrainState, history: tuple[EpochReport, ...]) -> None:
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
    progress = Progress(max_epochs=setup.config.training.max_epochs)
    tracked = replace(
        setup,
        train=progress.track(setup.train, "training"),
        valid=progress.track(setup.valid, "validation") if setup.valid else None,
    )
    _print_start(directory, setup, state)
    with stop_on_signals() as stop:
        reports = run_experiment(
            directory, tracked, state=state, history=history, on_batch=progress.on_batch, stop=stop
        )
        for report in reports:
            progress.report(report)
            history = (*history, report)
    print_summary(directory, setup, history)


def _print_start(directory: Path, setup: Setup, state: TrainState) -> None:
    training, validation = setup.training_set.index, setup.validation_set.index
    num_parameters = sum(tensor.numel() for tensor in state.params.values())
    print(
        f"{directory}: {training.num_total} streamlines of {len(training.subjects)} training subjects, "
        f"{validation.num_total} of {len(validation.subjects)} validation subjects, "
        f"{setup.training_set.num_features} features, {num_parameters} parameters",
        flush=True,
    )


def _example_data(experiments_path: Path) -> Path:
    path = experiments_path / EXAMPLE_FILE
    if not path.exists():
        from dwiml_func.data.example import make_example_data

        print(f"Making the example data, once: {path}", file=sys.stderr)
        make_example_data(path)
    return path
