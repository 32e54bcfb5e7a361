"""The folder of an ensemble.

It holds ordinary experiments, `NAME/0`, `NAME/1`, ..., and a file `ensemble.json` that says which members have stopped.
So each member can be evaluated, compared and resumed like any other experiment.
"""

from __future__ import annotations

import json
from pathlib import Path

from dwiml_func.files.atomic import atomic_write

__all__ = ["ENSEMBLE_FILE", "is_ensemble", "member_folders", "read_ended", "write_ended"]

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
        The number of members; and of those that have stopped the snapshots, by number.

    Raises:
        ValueError: the file is damaged.

    Example:
        >>> read_ended(directory)  # doctest: +SKIP
        (3, {1: '4'})
    """
    try:
        content = json.loads((directory / ENSEMBLE_FILE).read_bytes())
        return int(content["num_members"]), {int(number): str(name) for number, name in content["ended"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{directory / ENSEMBLE_FILE} is damaged: {error}.") from None


def write_ended(directory: Path, num_members: int, ended: dict[int, str]) -> None:
    """Record which members have stopped for good, once their snapshots are on the disk.

    Args:
        directory: the ensemble.
        num_members: K.
        ended: snapshots of those that have stopped, by number.

    Example:
        >>> write_ended(directory, 3, {1: "4"})  # doctest: +SKIP
    """
    atomic_write(directory / ENSEMBLE_FILE, _text(num_members, ended))


def _text(num_members: int, ended: dict[int, str]) -> str:
    return json.dumps({"num_members": num_members, "ended": {str(k): name for k, name in ended.items()}}) + "\n"
