"""Names and places of snapshots: `checkpoint/<epoch>[-<batch>]/` in an experiment.

What an experiment's snapshots have on record, read without their tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dwiml_func.checkpoint.history import history_from_json
from dwiml_func.checkpoint.manifest import DamagedError, read_manifest
from dwiml_func.core.loop import EpochReport
from dwiml_func.core.state import TrainState

__all__ = ["Record", "list_snapshots", "newest_record", "newest_sound", "read_record"]


def list_snapshots(directory: str | Path) -> list[str]:
    """Names of the snapshots of an experiment, oldest first.

    Args:
        directory: the experiment; it need not exist.

    Returns:
        Names such as "3" (after three epochs) or "3-50" (and fifty batches of the fourth).

    Example:
        >>> list_snapshots("/no/such/run")
        []
    """
    folder = Path(directory) / "checkpoint"
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    positions = {name: position for name in names if (position := _position(name)) is not None}
    return sorted(positions, key=positions.__getitem__)


def snapshot_name(state: TrainState) -> str:
    """The name of a state's snapshot: epochs done and, within an epoch, batches done."""
    return name_at(state.epoch, state.batch)


def name_at(epoch: int, batch: int) -> str:
    """The name of a snapshot of so many epochs and batches done."""
    return f"{epoch}-{batch}" if batch else str(epoch)


def snapshot_path(directory: str | Path, name: str | None) -> Path:
    """The directory of a snapshot that is there; None takes the latest. FileNotFoundError where there is none."""
    names = list_snapshots(directory)
    folder = Path(directory) / "checkpoint"
    if not names:
        raise FileNotFoundError(f"No snapshot in {folder}. Has an epoch been finished there?")
    name = names[-1] if name is None else name
    if name not in names:
        raise FileNotFoundError(f"No snapshot {name!r} in {folder}. There are: {', '.join(names)}.")
    return folder / name


def _position(name: str) -> tuple[int, int] | None:
    """Epoch and batch of a snapshot's name; None for a name that `snapshot_name` does not give."""
    match = re.fullmatch(r"(0|[1-9][0-9]*)(?:-([1-9][0-9]*))?", name)
    return (int(match[1]), int(match[2] or 0)) if match else None


T = TypeVar("T")


def read_record(directory: str | Path, name: str | None = None) -> dict[str, Any]:
    """Read what a snapshot says of itself, without its tensors.

    Args:
        directory: the experiment.
        name: which snapshot; None takes the newest whose manifest is not damaged.

    Returns:
        The manifest: `digest`, `numbers`, `history`, `config`, `environment`, `data` and more.

    Raises:
        FileNotFoundError: there is no snapshot, or none of that name.
        DamagedError: the manifest is damaged.

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
        return newest_sound(directory, lambda name: read_record(directory, name))[0]
    path = snapshot_path(directory, name)
    manifest = read_manifest(path, needs=("numbers", "history", "config"))
    saved_as = name_at(manifest["numbers"]["epoch"], manifest["numbers"]["batch"])
    if saved_as != name:
        raise DamagedError(f"{path} is damaged: what it holds was saved as {saved_as}.")
    return manifest


def newest_sound(directory: str | Path, read: Callable[[str], T]) -> tuple[T, dict[str, DamagedError]]:
    """Read the newest snapshot that is not damaged, also while a run in another process saves and removes snapshots.

    Args:
        directory: the experiment.
        read: reads the snapshot of a name.

    Returns:
        What `read` gave; and by name what is wrong with newer snapshots.

    Raises:
        FileNotFoundError: there is no snapshot.
        DamagedError: all are damaged; the message is about each.

    Example:
        >>> newest_sound("/no/such/run", read=str)
        Traceback (most recent call last):
        ...
        FileNotFoundError: No snapshot in /no/such/run/checkpoint. Has an epoch been finished there?
    """
    damaged: dict[str, DamagedError] = {}
    while True:
        names = [name for name in list_snapshots(directory) if name not in damaged]
        if damaged and not names:
            raise DamagedError(f"Every snapshot is damaged. {' '.join(map(str, damaged.values()))}")
        name = names[-1] if names else snapshot_path(directory, None).name
        try:
            return read(name), damaged
        except (DamagedError, FileNotFoundError) as error:
            if name not in list_snapshots(directory):
                continue  # it was removed while it was read
            if not isinstance(error, DamagedError):
                raise
            damaged[name] = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The record of the newest sound snapshot.

    Args:
        name: the snapshot's name.
        digest: of its state.
        history: the reports of all epochs up to it.
        config: the run's config, as JSON data.
        environment: what wrote it.
        data: fingerprint of the data, or nothing.
        damaged: what is wrong with newer snapshots, a sentence for each.

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
    damaged: tuple[str, ...] = ()


def newest_record(directory: str | Path) -> Record | None:
    """Read the record of an experiment's newest snapshot whose manifest is sound.

    Args:
        directory: the experiment.

    Returns:
        The record; None where there is no snapshot yet.

    Raises:
        DamagedError: all manifests are damaged; the message is about each.

    Example:
        >>> newest_record("/no/such/experiment") is None
        True
    """
    try:
        (name, manifest), damaged = newest_sound(directory, lambda name: (name, read_record(directory, name)))
    except FileNotFoundError:
        return None
    return Record(
        name=name,
        digest=manifest["digest"],
        history=history_from_json(manifest["history"]),
        config=manifest["config"],
        environment=manifest["environment"],
        data=manifest.get("data") or {},
        damaged=tuple(map(str, damaged.values())),
    )
