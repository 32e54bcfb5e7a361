"""`dwiml-func resume`, also installed as `resume_training_from_checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.cli._several import resume_members
from dwiml_func.cli._training import TimeLimit, resumed_run, train_with_progress
from dwiml_func.distributed.process_group import join_process_group
from dwiml_func.experiment.finish import is_whole
from dwiml_func.experiment.folder import experiment_directory, is_ensemble, read_config

__all__ = ["Options", "run"]

_CHANGES = (
    *("new_max_epochs", "new_patience", "hdf5_file", "processes", "num_threads"),
    *("checkpoint_every", "keep", "accept", "skip"),
)


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions, TimeLimit):
    """Resume an experiment, or an ensemble, from its latest checkpoint. The result is bitwise identical to that of an
    uninterrupted run.

    Example: dwiml-func resume experiments first_run --new-max-epochs 200
    """

    experiments_path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENTS_PATH")]
    """Folder of all experiments; without a name, that of the experiment itself."""
    experiment_name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[EXPERIMENT_NAME]")] = None
    """Name of the experiment."""
    new_max_epochs: int | None = None
    """New number of epochs, counted from the start of the experiment. None: unchanged."""
    new_patience: int | None = None
    """New patience, in epochs. None: unchanged."""
    hdf5_file: str | None = None
    """New path of the dataset, if it was moved; its content must be the same. None: unchanged."""
    processes: int | None = None
    """New number of processes that load batches. It does not change the results. None: unchanged."""
    num_threads: int | None = None
    """New number of CPU threads, of a run with shards, whose results it does not change. None: unchanged."""
    checkpoint_every: str | None = None
    """New interval between checkpoints. It does not change the results. None: unchanged."""
    keep: int | str | None = None
    """New number of latest checkpoints at an epoch's end to keep, every:K, or all. None: unchanged."""
    skip: Annotated[tuple[str, ...], tyro.conf.arg(metavar="EPOCH:BATCH")] = ()
    """Batches to leave out, such as 12:40, the 40th batch of epoch 12, whose loss was not finite. They are added to the
    option --skip-batches of the run."""
    accept: tuple[str, ...] = ()
    """Names of options, such as dropout, whose values were changed in config.json since the latest checkpoint, and with
    which to continue."""


def run(options: Options) -> int:
    """Train on from the latest checkpoint."""
    deadline = options.deadline()
    path, name = options.experiments_path, options.experiment_name
    directory = Path(path) if name is None else experiment_directory(path, name)
    changes = {name: getattr(options, name) for name in _CHANGES}
    if is_ensemble(directory):
        resume_members(directory, deadline=deadline, **changes)
        return 0
    use_gpu = read_config(directory).training.use_gpu  # before the lock makes a file there
    with join_process_group("cuda" if use_gpu else "cpu") as process_group:
        may_have_ended = not is_whole(directory)  # a kill may have come before the evaluation or the figure
        with resumed_run(directory, process_group, may_have_ended=may_have_ended, **changes) as start:
            train_with_progress(directory, *start, deadline)
    return 0
