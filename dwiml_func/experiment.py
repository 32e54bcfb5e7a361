"""An experiment's directory: its name, its making, its config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dwiml_func.config import RunConfig, config_from_json
from dwiml_func.ensemble_folder import is_ensemble
from dwiml_func.files.atomic import atomic_directory
from dwiml_func.files.json import read_config_file

__all__ = ["check_new_experiment", "create_experiment", "experiment_directory", "read_config"]


def create_experiment(
    experiments_path: str | Path,
    experiment_name: str,
    config: RunConfig,
    *,
    fill: Callable[[Path], None] | None = None,
) -> Path:
    """Make an experiment's directory, with its config in it. It appears in one step.

    Args:
        experiments_path: folder of all experiments; it exists.
        experiment_name: name of the new folder in it.
        config: the run's config.
        fill: called with the directory while it is still elsewhere, to write more into it.

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
        if fill is not None:
            fill(temporary)
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


def read_config(directory: Path) -> RunConfig:
    """Read an experiment's config.

    Args:
        directory: the experiment.

    Returns:
        The config.

    Raises:
        FileNotFoundError: there is no such experiment.
        ValueError: `config.json` is damaged, or the directory is that of an ensemble.
    """
    path = directory / "config.json"
    if is_ensemble(directory):
        raise ValueError(f"{str(directory)!r} is an ensemble. Name one of its members, such as {directory / '0'}.")
    if not path.is_file():
        raise FileNotFoundError(f"{str(directory)!r} is not an experiment: it has no config.json.")
    return config_from_json(read_config_file(path, source=str(path)), source=str(path))
