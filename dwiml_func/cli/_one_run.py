"""Training one run of `train` or of a sweep, new or resumed."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

import torch

from dwiml_func.cli._messages import print_progress
from dwiml_func.cli._training import train_with_progress
from dwiml_func.distributed.process_group import rank_zero_first
from dwiml_func.distributed.sharding import ProcessGroup
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import create_experiment
from dwiml_func.experiment.init_from import create_initialized, initialize_from
from dwiml_func.experiment.resume import resume_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.files.lock import experiment_lock

__all__ = ["train_one"]


def train_one(
    path: str | Path,
    name: str,
    config: RunConfig,
    process_group: ProcessGroup,
    *,
    deadline: float | None = None,
    init_from: str | None = None,
) -> None:
    """Train the experiment of a name, in processes that have joined; resume it where the same command began it."""
    directory = Path(path) / name
    is_again = process_group.rank == 0 and directory.exists()
    if any(process_group.gather(torch.tensor([int(is_again)]))):
        _resume(directory, config, process_group, deadline)
        return
    parts, state = prepare(config, process_group), None
    if init_from is not None:
        parts, state, report = initialize_from(parts, init_from)
        print_progress(f"{init_from}: {report}")
    if process_group.rank > 0:  # the first process writes
        train_with_progress(directory, parts, state, (), deadline=deadline)
        return
    with experiment_lock(path, wait=True):
        if state is None:
            create_experiment(path, name, config)
        else:
            create_initialized(path, name, parts, state)
    with experiment_lock(directory):
        train_with_progress(directory, parts, state, (), deadline=deadline)


def _resume(directory: Path, config: RunConfig, process_group: ProcessGroup, deadline: float | None) -> None:
    """Resume the run that the same command has begun; one that has ended is evaluated and summarized."""
    print_progress(f"{directory} exists, with this config: resuming it.")
    resume = partial(resume_experiment, directory, given=config, process_group=process_group, may_have_ended=True)
    with experiment_lock(directory) if process_group.rank == 0 else contextlib.nullcontext():
        train_with_progress(directory, *rank_zero_first(process_group, resume), deadline=deadline)
