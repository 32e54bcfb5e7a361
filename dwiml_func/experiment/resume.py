"""Going on with an experiment from its newest sound checkpoint."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dwiml_func.checkpoint.checkpoint import Checkpoint, newest
from dwiml_func.checkpoint.digest import state_leaves
from dwiml_func.checkpoint.provenance import environment, environment_differences
from dwiml_func.core.loop import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.distributed.sharding import SINGLE_PROCESS, ProcessGroup
from dwiml_func.experiment.best_model import repair_best_model
from dwiml_func.experiment.config import RunConfig, TrainingConfig
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.setup import RunParts, prepare
from dwiml_func.files.atomic import atomic_write, remove_leftovers
from dwiml_func.files.fingerprint import same_file
from dwiml_func.writers.jsonl import jsonl
from dwiml_func.writers.npy import npy
from dwiml_func.writers.writer import fan_out

__all__ = ["check_can_resume", "repair_experiment", "resume_experiment", "with_new_options"]

_DECIDE_BITS = {"dwiml_func", "torch", "numpy", "machine", "cpu", "cpu_capability", "devices"}

_log = logging.getLogger(__name__)


def resume_experiment(
    directory: Path,
    *,
    new_max_epochs: int | None = None,
    new_patience: int | None = None,
    hdf5_file: str | None = None,
    processes: int | None = None,
    checkpoint_every: str | None = None,
    keep: int | str | None = None,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[RunParts, TrainState, tuple[EpochReport, ...]]:
    """Make ready to go on with an experiment, from its newest sound checkpoint or, where there is none, from the start.

    Removes what a crash left behind, writes the best model again where it came before that, and sets corrupt checkpoints
    aside, as `checkpoint/<name>.corrupt`. Warns where another machine or another version goes on. Hold the experiment's
    lock, see `dwiml_func.files.lock`.

    Args:
        directory: the experiment.
        new_max_epochs: replaces the number of epochs.
        new_patience: replaces the patience.
        hdf5_file: replaces the dataset's path, for data that has moved.
        processes: replaces the number of processes that load batches.
        checkpoint_every: replaces how often checkpoints are saved.
        keep: replaces how many checkpoints are kept.
        process_group: the processes that train together. Only the first writes; the others call this after it.

    Returns:
        The parts, the state and the history for `run_experiment`.

    Raises:
        FileNotFoundError: there is no such experiment, or no dataset.
        ValueError: the run had ended, and would end again at once; or something on disk does not fit; or the dataset is
            not the one that the run was trained on.

    Example:
        >>> setup, state, history = resume_experiment(directory, new_max_epochs=20)  # doctest: +SKIP
    """
    config = read_config(directory)
    changed = with_new_options(
        config,
        new_max_epochs=new_max_epochs,
        new_patience=new_patience,
        hdf5_file=hdf5_file,
        processes=processes,
        checkpoint_every=checkpoint_every,
        keep=keep,
    )
    setup = prepare(changed, process_group)
    state, history, corrupt = setup.state, (), {}
    checkpoint = newest(directory, like=setup.state)
    if checkpoint is not None:
        _check_other_data(checkpoint, changed)
        state, history, corrupt = checkpoint.state, checkpoint.history, checkpoint.corrupt
        if process_group.rank == 0:
            _warn_of_other_machine(checkpoint, setup.state)
        for name in corrupt:
            _log.warning(
                "Checkpoint %s is corrupt; going on from %s.", directory / "checkpoint" / name, checkpoint.name
            )
    if process_group.rank == 0:
        repair_experiment(
            directory, setup, state, history
        )  # also a run that has ended: a crash may have come right then
    if history:
        check_can_resume(state, config.training, new_max_epochs=new_max_epochs, new_patience=new_patience)
    if process_group.rank > 0:
        return setup, state, history
    for name in corrupt:
        _set_aside(directory / "checkpoint" / name)
    if changed != config:
        atomic_write(directory / "config.json", changed.to_json())
    return setup, state, history


def with_new_options(
    config: RunConfig,
    *,
    new_max_epochs: int | None = None,
    new_patience: int | None = None,
    hdf5_file: str | None = None,
    processes: int | None = None,
    checkpoint_every: str | None = None,
    keep: int | str | None = None,
) -> RunConfig:
    """A run's config with what a resume may change of it.

    Args:
        config: the run's config.
        new_max_epochs, new_patience, hdf5_file, processes, checkpoint_every, keep: as for `resume_experiment`; None
            leaves a value as it was.

    Returns:
        The config to go on with.

    Raises:
        ValueError: a value out of range, or of another form.

    Example:
        >>> with_new_options(RunConfig(hdf5_file="data.hdf5"), new_max_epochs=200).training.max_epochs
        200
    """
    return replace(
        config,
        hdf5_file=str(Path(hdf5_file).absolute()) if hdf5_file else config.hdf5_file,
        training=_changed(config.training, max_epochs=new_max_epochs, patience=new_patience),
        batches=_changed(config.batches, processes=processes),
        checkpoints=_changed(config.checkpoints, checkpoint_every=checkpoint_every, keep=keep),
    )


def repair_experiment(directory: Path, setup: RunParts, state: TrainState, history: Sequence[EpochReport]) -> None:
    """Remove what a crash left behind, and bring best model and logs up to date with the checkpoint.

    Args:
        directory: the experiment.
        setup: its parts.
        state: the run, as restored.
        history: the reports so far.

    Example:
        >>> repair_experiment(directory, setup, state, history)  # doctest: +SKIP
    """
    for folder in ("", "checkpoint", "logs", "logs/comet", "logs/tensorboard", "plots"):
        remove_leftovers(directory / folder)
    if history:
        repair_best_model(directory, setup, state)
        fan_out(npy(directory), jsonl(directory))(*history)  # they did not wait for the disk


def check_can_resume(
    state: TrainState, training: TrainingConfig, *, new_max_epochs: int | None, new_patience: int | None
) -> None:
    """Refuse to go on with a run that had ended and would end again at once.

    Args:
        state: the run.
        training: its config before the new values.
        new_max_epochs: a new number of epochs, or None.
        new_patience: a new patience, or None.

    Raises:
        ValueError: early stopping or the number of epochs ended the run, and still would.
    """
    bad, done = state.best.num_bad_epochs, state.epoch
    if new_patience is None and training.patience is not None and bad >= training.patience:
        raise ValueError(
            f"This run was stopped early: patience {training.patience} was reached after epoch {done}, with {bad} "
            f"epochs in a row without improvement. To go on, give --new-patience of at least {bad + 1}."
        )
    if new_patience is not None and bad >= new_patience:
        raise ValueError(
            f"This run has had {bad} epochs in a row without improvement after epoch {done}, so a new patience of "
            f"{new_patience} would stop it at once. Give --new-patience of at least {bad + 1}."
        )
    if new_max_epochs is None and done >= training.max_epochs:
        raise ValueError(
            f"This run has done all of its {training.max_epochs} epochs. "
            f"To go on, give --new-max-epochs of at least {done + 1}."
        )
    if new_max_epochs is not None and done >= new_max_epochs:
        raise ValueError(
            f"This run has done {done} epochs already, so a new maximum of {new_max_epochs} would stop it at once. "
            f"Give --new-max-epochs of at least {done + 1}."
        )


def _changed(part: Any, **values: Any) -> Any:
    return replace(part, **{name: value for name, value in values.items() if value is not None})


def _check_other_data(checkpoint: Checkpoint, config: RunConfig) -> None:
    if checkpoint.data and not same_file(checkpoint.data, config.hdf5_file):
        raise ValueError(
            f"{config.hdf5_file} is not the dataset that this run was trained on: its bytes differ. Expected the same "
            f"data, so that the run goes on to the same bits. To train on other data, use dwiml-func fork."
        )


def _warn_of_other_machine(checkpoint: Checkpoint, like: TrainState) -> None:
    now = environment({str(leaf.device) for leaf in state_leaves(like).values()})
    recorded = {name: value for name, value in checkpoint.environment.items() if name in _DECIDE_BITS}
    changes = environment_differences(recorded, {name: now[name] for name in recorded})
    if changes:
        message = (
            "Checkpoint %s comes from other versions or another machine (%s), so from here on last bits may differ."
        )
        _log.warning(message, checkpoint.name, "; ".join(changes))


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.corrupt")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
