"""The folder of an experiment and of an ensemble: its name, its creation, its config.

An ensemble holds ordinary experiments, `NAME/0`, `NAME/1`, ..., and a file `ensemble.json` that says which members have
stopped. So each member can be evaluated, compared and resumed like any other experiment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dwiml_func._checks import truncated_repr
from dwiml_func.checkpoint.checkpoint import Checkpoint
from dwiml_func.checkpoint.index import is_checkpoint_name, list_checkpoints
from dwiml_func.experiment.config import RunConfig, config_from_json
from dwiml_func.files.atomic import atomic_directory, remove_leftovers
from dwiml_func.files.json import read_checked, read_config_file, write_checked
from dwiml_func.files.paths import missing_text

__all__ = [
    "ENSEMBLE_FILE",
    "SWEEP_FILE",
    "check_new_experiment",
    "check_no_links",
    "create_ensemble",
    "create_experiment",
    "experiment_directory",
    "is_ensemble",
    "is_run",
    "is_sweep",
    "member_folders",
    "named_in_order",
    "read_config",
    "read_ended",
    "recorded_config",
    "write_ended",
]

ENSEMBLE_FILE = "ensemble.json"
"""The file that makes a folder an ensemble."""

SWEEP_FILE = "sweep.json"
"""The file that makes a folder a sweep: experiments that are trained one after the other."""


def create_experiment(
    experiments_path: str | Path, experiment_name: str, config: RunConfig, *, fill: Callable[[Path], None] | None = None
) -> Path:
    """Create an experiment's directory with its config. It appears in one step; `fill` writes more into it before."""

    def fill_all(directory: Path) -> None:
        (directory / "config.json").write_text(config.to_json())
        if fill is not None:
            fill(directory)

    return _create(experiments_path, experiment_name, fill_all)


def create_ensemble(experiments_path: str | Path, experiment_name: str, configs: Sequence[RunConfig]) -> Path:
    """Create an ensemble's directory with those of its members. It appears in one step."""

    def fill(directory: Path) -> None:
        write_ended(directory, len(configs), {})
        for number, config in enumerate(configs):
            (directory / str(number)).mkdir()
            (directory / str(number) / "config.json").write_text(config.to_json())

    return _create(experiments_path, experiment_name, fill)


def _create(experiments_path: str | Path, name: str, fill: Callable[[Path], None]) -> Path:
    directory = check_new_experiment(experiments_path, name)
    remove_leftovers(experiments_path, name)
    with atomic_directory(directory, replace=False) as temporary:  # another process may have created it by now
        fill(temporary)
    return directory


def check_new_experiment(experiments_path: str | Path, experiment_name: str) -> Path:
    """Return the directory that a new experiment would have; ValueError where it exists."""
    directory = experiment_directory(experiments_path, experiment_name)
    if directory.exists():
        raise ValueError(
            f"Experiment {experiment_name!r} exists in {str(experiments_path)!r}. "
            f"Choose another name, or resume it: dwiml-func resume {experiments_path} {experiment_name}"
        )
    if directory.is_symlink():
        raise FileNotFoundError(f"The experiment {missing_text(directory)}. Choose another name, or remove the link.")
    return directory


def experiment_directory(experiments_path: str | Path, experiment_name: str) -> Path:
    """Join path and name; FileNotFoundError where the path is no folder, ValueError for a name that leads elsewhere."""
    if not Path(experiments_path).is_dir():
        raise FileNotFoundError(
            f"Experiments path {str(experiments_path)!r} is not a folder. Create it, or choose another one."
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
    """Read an experiment's config; FileNotFoundError or ValueError for what is no experiment, or corrupt."""
    path = directory / "config.json"
    if is_ensemble(directory):
        raise ValueError(f"{str(directory)!r} is an ensemble. Name one of its members, such as {directory / '0'}.")
    if is_sweep(directory):
        raise ValueError(
            f"{str(directory)!r} is a sweep. Give its train command again to continue it, or name one of its runs."
        )
    if not path.is_file():
        raise FileNotFoundError(f"{str(directory)!r} is not an experiment: it has no config.json.")
    return config_from_json(read_config_file(path, source=str(path)), source=str(path))


def check_no_links(directory: Path) -> None:
    """Raise ValueError for a link inside an experiment's folder: what is written there would be written elsewhere."""
    for folder in (directory, *(directory / name for name in ("checkpoint", "logs", "plots", "best_model"))):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_symlink():
                raise ValueError(
                    f"Expected no links in an experiment's folder. Received: {path}, which leads to {path.readlink()}. "
                    "Put what it leads to in its place."
                )


def is_run(directory: Path) -> bool:
    """Whether a directory is that of an experiment, or of a run that a script has saved, which has no config.json."""
    return (directory / "config.json").is_file() or bool(list_checkpoints(directory))


def recorded_config(directory: Path, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """The config of an experiment, or what a script has recorded in `checkpoint`, the newest of its run; JSON data."""
    if checkpoint is None or (directory / "config.json").is_file() or is_ensemble(directory):
        return read_config(directory).to_dict()
    return dict(checkpoint.config)


def is_ensemble(directory: Path) -> bool:
    """Whether a directory is that of an ensemble."""
    return (directory / ENSEMBLE_FILE).is_file()


def is_sweep(directory: Path) -> bool:
    """Whether a directory is that of a sweep."""
    return (directory / SWEEP_FILE).is_file()


def named_in_order(directory: Path) -> list[Path]:
    """What is in a directory, by name; numbers within names are ordered by value."""
    pieces = {path: re.split(r"(\d+)", path.name, flags=re.ASCII) for path in directory.iterdir()}
    return sorted(pieces, key=lambda path: [(int(piece) if piece.isdecimal() else -1, piece) for piece in pieces[path]])


def member_folders(directory: Path) -> list[Path]:
    """The folders of an ensemble's members, in the order of their numbers."""
    folders = [path for path in directory.iterdir() if path.name.isdecimal() and (path / "config.json").is_file()]
    return sorted(folders, key=lambda path: int(path.name))


def read_ended(directory: Path) -> tuple[int, dict[int, str]]:
    """Read an ensemble's number of members and, by number, the last checkpoints of those that have stopped.

    ValueError where the file does not hold what was written, or its numbers cannot be those of the folder.
    """
    path = directory / ENSEMBLE_FILE
    content = read_checked(path) or {}
    num_members, ended = content.get("num_members"), content.get("ended")
    numbers = {str(number) for number in range(len(member_folders(directory)))}
    if (
        not isinstance(ended, dict)
        or content.keys() != {"num_members", "ended"}
        or type(num_members) is not int
        or not 1 <= num_members == len(numbers)
        or not ended.keys() <= numbers
        or not all(isinstance(name, str) and is_checkpoint_name(name) for name in ended.values())
    ):
        raise ValueError(
            f"{path} is corrupt. Expected num_members {len(numbers)}, the number of folders with a config.json, and "
            f"the last checkpoints of members that have ended. Received: {truncated_repr(content)}"
        )
    return num_members, {int(number): name for number, name in ended.items()}


def write_ended(directory: Path, num_members: int, ended: dict[int, str]) -> None:
    """Write what `read_ended` reads; the checkpoints must be on the disk before."""
    content = {"num_members": num_members, "ended": {str(number): name for number, name in ended.items()}}
    write_checked(directory / ENSEMBLE_FILE, content)
