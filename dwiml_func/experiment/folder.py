"""An experiment's directory: its name, its making, its config.

The folder of an ensemble.

It holds ordinary experiments, `NAME/0`, `NAME/1`, ..., and a file `ensemble.json` that says which members have stopped.
So each member can be evaluated, compared and resumed like any other experiment.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from dwiml_func.experiment.config import RunConfig, config_from_json
from dwiml_func.files.atomic import atomic_directory, atomic_write, remove_leftovers
from dwiml_func.files.json import read_config_file

__all__ = [
    "ENSEMBLE_FILE",
    "check_new_experiment",
    "create_experiment",
    "experiment_directory",
    "is_ensemble",
    "member_folders",
    "read_config",
    "read_ended",
    "write_ended",
]


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
    remove_leftovers(experiments_path, experiment_name)
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
        ValueError: `config.json` is corrupt, or the directory is that of an ensemble.
    """
    path = directory / "config.json"
    if is_ensemble(directory):
        raise ValueError(f"{str(directory)!r} is an ensemble. Name one of its members, such as {directory / '0'}.")
    if not path.is_file():
        raise FileNotFoundError(f"{str(directory)!r} is not an experiment: it has no config.json.")
    return config_from_json(read_config_file(path, source=str(path)), source=str(path))


ENSEMBLE_FILE = "ensemble.json"
"""The file that makes a folder an ensemble."""


def is_ensemble(directory: Path) -> bool:
    """Whether a directory is that of an ensemble.

    Args:
        directory: any path.

    Returns:
        True if it is.

    Example:
        >>> is_ensemble(Path("/no/such/ensemble"))
        False
    """
    return (directory / ENSEMBLE_FILE).is_file()


def member_folders(directory: Path) -> list[Path]:
    """The folders of an ensemble's members, in the order of their numbers.

    Args:
        directory: the ensemble.

    Returns:
        Those that there are.

    Example:
        >>> member_folders(directory)  # doctest: +SKIP
        [PosixPath('sweep/0'), PosixPath('sweep/1')]
    """
    folders = [path for path in directory.iterdir() if path.name.isdecimal() and (path / "config.json").is_file()]
    return sorted(folders, key=lambda path: int(path.name))


def read_ended(directory: Path) -> tuple[int, dict[int, str]]:
    """Read which members have stopped for good.

    Args:
        directory: the ensemble.

    Returns:
        The number of members; and of those that have stopped the checkpoints, by number.

    Raises:
        ValueError: the file is corrupt.

    Example:
        >>> read_ended(directory)  # doctest: +SKIP
        (3, {1: '4'})
    """
    try:
        content = json.loads((directory / ENSEMBLE_FILE).read_bytes())
        return int(content["num_members"]), {int(number): str(name) for number, name in content["ended"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{directory / ENSEMBLE_FILE} is corrupt: {error}.") from None


def write_ended(directory: Path, num_members: int, ended: dict[int, str]) -> None:
    """Record which members have stopped for good, once their checkpoints are on the disk.

    Args:
        directory: the ensemble.
        num_members: K.
        ended: checkpoints of those that have stopped, by number.

    Example:
        >>> write_ended(directory, 3, {1: "4"})  # doctest: +SKIP
    """
    atomic_write(directory / ENSEMBLE_FILE, _text(num_members, ended))


def _text(num_members: int, ended: dict[int, str]) -> str:
    return json.dumps({"num_members": num_members, "ended": {str(k): name for k, name in ended.items()}}) + "\n"
