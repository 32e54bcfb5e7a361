"""What an experiment's snapshots have on record, read without their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwiml_func.history import history_from_json
from dwiml_func.loop import EpochReport
from dwiml_func.manifest import DamagedError, read_manifest
from dwiml_func.snapshot_names import list_snapshots, snapshot_path

__all__ = ["Record", "newest_record", "read_record"]


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
        >>> from dwiml_func.snapshot import save
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save(directory, init_state(torch.nn.Linear(1, 1), sgd(), seed=0), config={"a": 1})
        ...     read_record(directory)["config"]
        {'a': 1}
    """
    if name is not None:
        return read_manifest(snapshot_path(directory, name))
    newest = snapshot_path(directory, None)
    for name in reversed(list_snapshots(directory)):
        try:
            return read_manifest(newest.parent / name)
        except DamagedError:
            continue
    return read_manifest(newest)


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
    damaged: list[str] = []
    for name in reversed(list_snapshots(directory)):
        try:
            manifest = read_record(directory, name)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        return Record(
            name=name,
            digest=manifest["digest"],
            history=history_from_json(manifest["history"]),
            config=manifest["config"],
            environment=manifest["environment"],
            data=manifest.get("data") or {},
            damaged=tuple(damaged),
        )
    if damaged:
        raise DamagedError(f"Every snapshot is damaged. {' '.join(damaged)}")
    return None
