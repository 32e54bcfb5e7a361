"""`dwiml-func resume`, also installed as `resume_training_from_checkpoint`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Literal

import tyro

from dwiml_func.cli._ensemble import resume_members
from dwiml_func.cli._parsing import parse
from dwiml_func.cli.train import train_with_progress
from dwiml_func.distributed.process_group import join_process_group, rank_zero_first
from dwiml_func.experiment.folder import experiment_directory, is_ensemble, read_config
from dwiml_func.experiment.resume import resume_experiment
from dwiml_func.files.lock import experiment_lock

__all__ = ["ResumeOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """Go on with an experiment, or with an ensemble, from its latest checkpoint, to the same bits as if it had never
    stopped.

    Example: dwiml-func resume experiments first_run --new-max-epochs 200
    """

    experiments_path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENTS_PATH")]
    """Folder of all experiments."""
    experiment_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_NAME")]
    """Name of the experiment."""
    new_max_epochs: int | None = None
    """New number of epochs, counted from the very start. None: as before."""
    new_patience: int | None = None
    """New patience, in epochs. None: as before."""
    hdf5_file: str | None = None
    """New path of the dataset, if it has moved; its bytes must be the same. None: as before."""
    processes: int | None = None
    """New number of processes that load batches. The results are the same. None: as before."""
    checkpoint_every: str | None = None
    """How often to save a checkpoint from now on. The results are the same. None: as before."""
    keep: int | Literal["all"] | None = None
    """How many checkpoints at an epoch's end to keep from now on, or all. None: as before."""


def run(arguments: Sequence[str], program: str) -> int:
    """Run the command.

    Args:
        arguments: the command line.
        program: the program's name in messages.

    Returns:
        The exit code, 0.

    Raises:
        ValueError, OSError: there is nothing to resume, or the run would end at once.

    Example:
        >>> run(["experiments", "first_run"], "dwiml-func resume")  # doctest: +SKIP
    """
    options = parse(ResumeOptions, arguments, program)
    directory = experiment_directory(options.experiments_path, options.experiment_name)
    changes = {
        part.name: getattr(options, part.name) for part in fields(options) if not part.name.startswith("experiment")
    }
    if is_ensemble(directory):
        resume_members(directory, **changes)
        return 0
    use_gpu = read_config(directory).training.use_gpu  # before the lock makes a file there
    with join_process_group("cuda" if use_gpu else "cpu") as process_group:
        resume = partial(resume_experiment, directory, **changes, process_group=process_group)
        with experiment_lock(directory) if process_group.rank == 0 else nullcontext():
            train_with_progress(directory, *rank_zero_first(process_group, resume))
    return 0
