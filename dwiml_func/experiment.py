"""An experiment directory: from a config to data, model, steps, loop, snapshots and logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from dwiml_func.atomic import atomic_directory, atomic_write, remove_leftovers
from dwiml_func.config import RunConfig, TrainingConfig, config_from_json
from dwiml_func.leaf_store import read_manifest
from dwiml_func.loop import EpochReport, train_and_validate
from dwiml_func.metrics import Metrics
from dwiml_func.models.model_directory import MANIFEST, save_model
from dwiml_func.schedule import per_epoch
from dwiml_func.snapshot import list_snapshots, restore, save
from dwiml_func.state import TrainState
from dwiml_func.wiring import Setup, prepare
from dwiml_func.writers.npy import write_npy
from dwiml_func.writers.parameters import write_parameters

__all__ = [
    "check_new_experiment",
    "create_experiment",
    "experiment_directory",
    "read_config",
    "refuse_to_continue",
    "resume_experiment",
    "run_experiment",
]


def create_experiment(experiments_path: str | Path, experiment_name: str, config: RunConfig) -> Path:
    """Make an experiment's directory, with its config in it.

    Args:
        experiments_path: folder of all experiments; it exists.
        experiment_name: name of the new folder in it.
        config: the run's config.

    Returns:
        The experiment's directory.

    Raises:
        FileNotFoundError: the experiments path is no folder.
        ValueError: the name is not one, or the experiment exists.

    Example:
        >>> create_experiment("/no/such/folder", "a", RunConfig(hdf5_file="data.hdf5"))
        Traceback (most recent call last):
        ...
        FileNotFoundError: Experiments path '/no/such/folder' is not a folder. Create it, or give another one.
    """
    directory = check_new_experiment(experiments_path, experiment_name)
    with atomic_directory(directory, replace=False) as temporary:  # another process may have made it by now
        (temporary / "config.json").write_text(config.to_json())
    return directory


def check_new_experiment(experiments_path: str | Path, experiment_name: str) -> Path:
    """The directory that a new experiment would have.

    Args:
        experiments_path: folder of all experiments; it exists.
        experiment_name: name of the new folder in it.

    Returns:
        The directory, which does not exist yet.

    Raises:
        FileNotFoundError, ValueError: as `create_experiment`.
    """
    directory = experiment_directory(experiments_path, experiment_name)
    if directory.exists():
        raise ValueError(
            f"Experiment {experiment_name!r} exists in {str(experiments_path)!r}. "
            f"Choose another name, or go on with it: dwiml-func resume {experiments_path} {experiment_name}"
        )
    return directory


def experiment_directory(experiments_path: str | Path, experiment_name: str) -> Path:
    """Join path and name, refusing names that lead elsewhere.

    Args:
        experiments_path: folder of all experiments; it exists.
        experiment_name: a plain folder name.

    Returns:
        The directory, which may or may not exist.

    Raises:
        FileNotFoundError: the experiments path is no folder.
        ValueError: the name is empty, has a slash or a control character, or begins with a dot or a dash.
    """
    if not Path(experiments_path).is_dir():
        raise FileNotFoundError(
            f"Experiments path {str(experiments_path)!r} is not a folder. Create it, or give another one."
        )
    if (
        not experiment_name.isprintable()
        or experiment_name.startswith((".", "-"))
        or any(slash in experiment_name for slash in "/\\")
        or not experiment_name
    ):
        raise ValueError(
            f"Experiment name {experiment_name!r} cannot be a folder's name here. "
            f"Expected one that does not begin with '.' or '-', and has no slash and no control character."
        )
    return Path(experiments_path) / experiment_name


def run_experiment(
    directory: Path,
    setup: Setup,
    *,
    state: TrainState | None = None,
    history: tuple[EpochReport, ...] = (),
    on_batch: Callable[[TrainState, Metrics], None] | None = None,
) -> Iterator[EpochReport]:
    """Train, and after each epoch save a snapshot, the best model and the logs. Sets torch's number of threads.

    Args:
        directory: the experiment.
        setup: its parts.
        state: where to go on from; None starts at the beginning.
        history: the reports of the epochs before `state`.
        on_batch: called after each training batch, e.g. by a progress bar.

    Yields:
        Each epoch's report, once everything about the epoch is on disk.

    Raises:
        NonFiniteError: a loss or gradient was not finite; the last snapshot stands.

    Example:
        >>> for report in run_experiment(directory, prepare(config)):  # doctest: +SKIP
        ...     print(report.epoch, report.monitored_loss)
    """
    training = setup.config.training
    torch.set_num_threads(training.num_threads)
    write_parameters(directory, setup.config, nb_features=setup.nb_features, now=datetime.now())
    epochs = train_and_validate(
        setup.state if state is None else state,
        train=setup.train,
        step=setup.step,
        valid=setup.valid,
        eval_step=setup.eval_step if setup.valid else None,
        learning_rate=per_epoch(training.learning_rates),
        max_epochs=training.max_epochs,
        patience=training.patience,
        patience_delta=training.patience_delta,
        on_batch=on_batch,
    )
    for state, report in epochs:
        history = (*history, report)
        save(directory, state, history, config=setup.config.to_dict())
        if report.is_best:
            _save_best_model(directory, setup, state)
        write_npy(directory, history)
        yield report


def resume_experiment(
    directory: Path,
    *,
    new_max_epochs: int | None = None,
    new_patience: int | None = None,
    hdf5_file: str | None = None,
) -> tuple[Setup, TrainState, tuple[EpochReport, ...]]:
    """Make ready to go on with an experiment, from its latest snapshot or, if it has none yet, from the beginning.

    Args:
        directory: the experiment.
        new_max_epochs: replaces the number of epochs.
        new_patience: replaces the patience.
        hdf5_file: replaces the dataset's path, for data that has moved.

    Returns:
        The parts, the state and the history for `run_experiment`.

    Raises:
        FileNotFoundError: there is no such experiment, or no dataset.
        ValueError: the run had ended, and would end again at once; or something on disk does not fit.

    Example:
        >>> setup, state, history = resume_experiment(directory, new_max_epochs=20)  # doctest: +SKIP
    """
    config = read_config(directory)
    changes: dict[str, Any] = {"max_epochs": new_max_epochs, "patience": new_patience}
    changes = {name: value for name, value in changes.items() if value is not None}
    hdf5_file = str(Path(hdf5_file).absolute()) if hdf5_file else config.hdf5_file
    changed = replace(config, training=replace(config.training, **changes), hdf5_file=hdf5_file)
    setup = prepare(changed)
    state, history = setup.state, ()
    if list_snapshots(directory):
        snapshot = restore(directory, setup.state)
        state, history = snapshot.state, snapshot.history
        refuse_to_continue(state, config.training, new_max_epochs=new_max_epochs, new_patience=new_patience)
    for folder in (directory, directory / "checkpoint", directory / "logs"):
        remove_leftovers(folder)
    if changed != config:
        atomic_write(directory / "config.json", changed.to_json())
    if history:
        _mend_best_model(directory, setup, state)
        write_npy(directory, history)
    return setup, state, history


def read_config(directory: Path) -> RunConfig:
    """Read an experiment's config.

    Args:
        directory: the experiment.

    Returns:
        The config.

    Raises:
        FileNotFoundError: there is no such experiment.
        ValueError: `config.json` is damaged.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{str(directory)!r} is not an experiment: it has no config.json.")
    return config_from_json(path.read_bytes(), source=str(path))


def refuse_to_continue(
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


def _save_best_model(directory: Path, setup: Setup, state: TrainState) -> None:
    facts = {"loss": state.best.value}
    save_model(directory / "best_model", state, setup.config, nb_features=setup.nb_features, facts=facts)


def _mend_best_model(directory: Path, setup: Setup, state: TrainState) -> None:
    """Write the best model again from its snapshot where a crash came between the two."""
    best = state.best.epoch
    if best is None:
        return
    try:
        written = read_manifest(directory / "best_model", MANIFEST).get("epoch")
    except (FileNotFoundError, ValueError):
        written = None
    if written != best:
        _save_best_model(directory, setup, restore(directory, setup.state, name=str(best)).state)
