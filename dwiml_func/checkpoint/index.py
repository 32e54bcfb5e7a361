"""Names and places of checkpoints: `checkpoint/<epoch>[-<batch>]/` in an experiment.

What an experiment's checkpoints have on record, read without their tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dwiml_func.checkpoint.history import history_from_json
from dwiml_func.checkpoint.manifest import CorruptError, read_manifest
from dwiml_func.core.loop import EpochReport
from dwiml_func.core.state import TrainState

__all__ = ["Record", "list_checkpoints", "newest_record", "newest_valid", "read_record"]


def list_checkpoints(directory: str | Path) -> list[str]:
    """Names of the checkpoints of an experiment, oldest first.

    Args:
        directory: the experiment; it need not exist.

    Returns:
        Names such as "3" (after three epochs) or "3-50" (and fifty batches of the fourth).

    Example:
        >>> list_checkpoints("/no/such/run")
        []
    """
    folder = Path(directory) / "checkpoint"
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    positions = {name: position for name in names if (position := _position(name)) is not None}
    return sorted(positions, key=positions.__getitem__)


def checkpoint_name(state: TrainState) -> str:
    """The name of a state's checkpoint: epochs done and, within an epoch, batches done."""
    return name_at(state.epoch, state.batch)


def name_at(epoch: int, batch: int) -> str:
    """The name of a checkpoint of so many epochs and batches done."""
    return f"{epoch}-{batch}" if batch else str(epoch)


def checkpoint_path(directory: str | Path, name: str | None) -> Path:
    """The directory of a checkpoint that is there; None takes the latest. FileNotFoundError where there is none."""
    names = list_checkpoints(directory)
    folder = Path(directory) / "checkpoint"
    if not names:
        raise FileNotFoundError(f"No checkpoint in {folder}. Has an epoch been finished there?")
    name = names[-1] if name is None else name
    if name not in names:
        raise FileNotFoundError(f"No checkpoint {name!r} in {folder}. There are: {', '.join(names)}.")
    return folder / name


def _position(name: str) -> tuple[int, int] | None:
    """Epoch and batch of a checkpoint's name; None for a name that `checkpoint_name` does not give."""
    match = re.fullmatch(r"(0|[1-9][0-9]*)(?:-([1-9][0-9]*))?", name)
    return (int(match[1]), int(match[2] or 0)) if match else None


T = TypeVar("T")


def read_record(directory: str | Path, name: str | None = None) -> dict[str, Any]:
    """Read what a checkpoint says of itself, without its tensors.

    Args:
        directory: the experiment.
        name: which checkpoint; None takes the newest whose manifest is not corrupt.

    Returns:
        The manifest: `digest`, `numbers`, `history`, `config`, `environment`, `data` and more.

    Raises:
        FileNotFoundError: there is no checkpoint, or none of that name.
        CorruptError: the manifest is corrupt.

    Example:
        >>> import tempfile, torch
        >>> from dwiml_func import init_state, sgd
        >>> from dwiml_func.checkpoint.checkpoint import save
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save(directory, init_state(torch.nn.Linear(1, 1), sgd(), seed=0), config={"a": 1})
        ...     read_record(directory)["config"]
        {'a': 1}
    """
    if name is None:
        return newest_valid(directory, lambda name: read_record(directory, name))[0]
    path = checkpoint_path(directory, name)
    manifest = read_manifest(path, needs=("numbers", "history", "config"))
    saved_as = name_at(manifest["numbers"]["epoch"], manifest["numbers"]["batch"])
    if saved_as != name:
        raise CorruptError(f"{path} is corrupt: what it holds was saved as {saved_as}.")
    return manifest


def newest_valid(directory: str | Path, read: Callable[[str], T]) -> tuple[T, dict[str, CorruptError]]:
    """Read the newest checkpoint that is not corrupt, also while a run in another process saves and removes checkpoints.

    Args:
        directory: the experiment.
        read: reads the checkpoint of a name.

    Returns:
        What `read` gave; and by name what is wrong with newer checkpoints.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CorruptError: all are corrupt; the message is about each.

    Example:
        >>> newest_valid("/no/such/run", read=str)
        Traceback (most recent call last):
        ...
        FileNotFoundError: No checkpoint in /no/such/run/checkpoint. Has an epoch been finished there?
    """
    corrupt: dict[str, CorruptError] = {}
    while True:
        names = [name for name in list_checkpoints(directory) if name not in corrupt]
        if corrupt and not names:
            raise CorruptError(f"Every checkpoint is corrupt. {' '.join(map(str, corrupt.values()))}")
        name = names[-1] if names else checkpoint_path(directory, None).name
        try:
            return read(name), corrupt
        except (CorruptError, FileNotFoundError) as error:
            if name not in list_checkpoints(directory):
                continue  # it was removed while it was read
            if not isinstance(error, CorruptError):
                raise
            corrupt[name] = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The record of the newest sound checkpoint.

    Args:
        name: the checkpoint's name.
        digest: of its state.
        history: the reports of all epochs up to it.
        config: the run's config, as JSON data.
        environment: what wrote it.
        data: fingerprint of the data, or nothing.
        corrupt: what is wrong with newer checkpoints, a sentence for each.

    Example:
        >>> Record.__slots__[:2]
        ('name', 'digest')
    """

    name: str
    digest: str
    history: tuple[EpochReport, ...]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    corrupt: tuple[str, ...] = ()


def newest_record(directory: str | Path) -> Record | None:
    """Read the record of an experiment's newest checkpoint whose manifest is sound.

    Args:
        directory: the experiment.

    Returns:
        The record; None where there is no checkpoint yet.

    Raises:
        CorruptError: all manifests are corrupt; the message is about each.

    Example:
        >>> newest_record("/no/such/experiment") is None
        True
    """
    try:
        (name, manifest), corrupt = newest_valid(directory, lambda name: (name, read_record(directory, name)))
    except FileNotFoundError:
        return None
    return Record(
        name=name,
        digest=manifest["digest"],
        history=history_from_json(manifest["history"]),
        config=manifest["config"],
        environment=manifest["environment"],
        data=manifest.get("data") or {},
        corrupt=tuple(map(str, corrupt.values())),
    )
