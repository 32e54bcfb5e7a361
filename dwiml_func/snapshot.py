"""Snapshots of a run on disk: `checkpoint/<epoch>[-<batch>]/`, each whole or absent.

A snapshot holds the state, the reports of all epochs so far, the run's config and the versions of what wrote it. Its
`manifest.json` is readable without the tensors.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dwiml_func.best import Best
from dwiml_func.digest import combine_digests, leaf_digest, numbers_to_fields, state_leaves, state_numbers
from dwiml_func.leaf_store import SnapshotError, load_leaves, read_manifest, save_leaves
from dwiml_func.loop import EpochReport
from dwiml_func.state import TrainState

__all__ = [
    "Snapshot",
    "latest_digest",
    "list_snapshots",
    "restore",
    "restore_or",
    "save",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A restored snapshot.

    Args:
        state: the run.
        history: the reports of all epochs up to it.
        config: what was recorded as the run's config.

    Example:
        >>> Snapshot.__slots__
        ('state', 'history', 'config')
    """

    state: TrainState
    history: tuple[EpochReport, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def save(
    directory: str | Path,
    state: TrainState,
    history: Sequence[EpochReport] = (),
    *,
    config: Mapping[str, Any] | None = None,
    keep: int | None = 2,
) -> Path:
    """Write a snapshot of a run, and remove older ones.

    Args:
        directory: the experiment; snapshots go to its sub-folder `checkpoint`, made where needed.
        state: the run.
        history: the reports of all epochs so far.
        config: JSON data to record, e.g. the run's config.
        keep: how many of the latest snapshots stay, besides that of the best epoch; None keeps all.

    Returns:
        The snapshot's directory. It appears by one rename, after its bytes are on the disk.

    Example:
        >>> import tempfile, torch
        >>> from dwiml_func import init_state, sgd
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = save(directory, state)
        ...     path.name, list_snapshots(directory)
        ('0', ['0'])
    """
    folder = Path(directory) / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    numbers = state_numbers(state)
    facts = {
        "numbers": numbers,
        "history": [asdict(report) | {"best": report.best._asdict()} for report in history],
        "config": dict(config or {}),
    }
    path = folder / _name(state)
    save_leaves(path, state_leaves(state), facts, numbers=numbers)
    _remove_old(folder, keep, state)
    return path


def restore(directory: str | Path, like: TrainState, *, name: str | None = None) -> Snapshot:
    """Read a snapshot into a state of the same structure.

    Args:
        directory: the experiment.
        like: a state with the names, shapes, dtypes, devices and key to expect, e.g. `init_state(...)` of the same
            model, optimizer and seed.
        name: which snapshot, e.g. "3" or "3-50"; None takes the latest.

    Returns:
        The snapshot; its tensors are on the devices of those of `like`.

    Raises:
        FileNotFoundError: there is no snapshot, or none of that name.
        SnapshotError: it is damaged, or differs from `like`; the message lists every difference, with both values.

    Example:
        >>> import tempfile, torch
        >>> from dwiml_func import init_state, sgd
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save(directory, state.replace(epoch=3))
        ...     restore(directory, state).state.epoch
        3
    """
    path = _snapshot_path(directory, name)
    manifest = read_manifest(path)
    differences = _differences(manifest["leaves"], state_leaves(like))
    fields = numbers_to_fields(manifest["numbers"])
    if fields["key"] != like.key:
        differences.append(f"key: {fields['key']} in the snapshot, {like.key} expected")
    if differences:
        raise SnapshotError(f"Snapshot {path} does not fit the state to restore into: {'; '.join(differences)}.")
    leaves = load_leaves(path, manifest)
    state = TrainState(
        params={name: leaves[f"params/{name}"].to(like.params[name].device) for name in like.params},
        buffers={name: leaves[f"buffers/{name}"].to(like.buffers[name].device) for name in like.buffers},
        opt_state={
            kind: {name: leaves[f"opt_state/{kind}/{name}"].to(moments[name].device) for name in moments}
            for kind, moments in like.opt_state.items()
        },
        **fields,
    )
    history = tuple(_report(report) for report in manifest["history"])
    return Snapshot(state=state, history=history, config=manifest["config"])


def restore_or(directory: str | Path, state: TrainState) -> tuple[TrainState, tuple[EpochReport, ...]]:
    """The latest snapshot of a run, or, where there is none yet, the state that is given.

    Args:
        directory: the experiment; it need not exist.
        state: the first state of the run.

    Returns:
        The state to go on from and the reports of the epochs so far.

    Raises:
        SnapshotError: as `restore`.

    Example:
        >>> import torch
        >>> from dwiml_func import init_state, sgd
        >>> state, history = restore_or("/no/such/run", init_state(torch.nn.Linear(1, 1), sgd(), seed=0))
        >>> state.epoch, history
        (0, ())
    """
    if not list_snapshots(directory):
        return state, ()
    snapshot = restore(directory, state)
    return snapshot.state, snapshot.history


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


def latest_digest(directory: str | Path) -> str:
    """The digest of an experiment's latest state, computed from the bytes on disk.

    Args:
        directory: the experiment.

    Returns:
        What `dwiml_func.digest.state_digest` gives for that state: 64 hexadecimal digits.

    Raises:
        FileNotFoundError: there is no snapshot.
        SnapshotError: it is damaged.

    Example:
        >>> import tempfile, torch
        >>> from dwiml_func import digest, init_state, sgd
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save(directory, state)
        ...     latest_digest(directory) == digest.state_digest(state)
        True
    """
    path = _snapshot_path(directory, None)
    manifest = read_manifest(path)
    leaves = {name: leaf_digest(leaf) for name, leaf in load_leaves(path, manifest).items()}
    return combine_digests(leaves, manifest["numbers"])


def _snapshot_path(directory: str | Path, name: str | None) -> Path:
    names = list_snapshots(directory)
    folder = Path(directory) / "checkpoint"
    if not names:
        raise FileNotFoundError(f"No snapshot in {folder}. Has an epoch been finished there?")
    name = names[-1] if name is None else name
    if name not in names:
        raise FileNotFoundError(f"No snapshot {name!r} in {folder}. There are: {', '.join(names)}.")
    return folder / name


def _name(state: TrainState) -> str:
    return f"{state.epoch}-{state.batch}" if state.batch else str(state.epoch)


def _position(name: str) -> tuple[int, int] | None:
    """Epoch and batch of a snapshot's name; None for a name that `_name` does not give."""
    match = re.fullmatch(r"(0|[1-9][0-9]*)(?:-([1-9][0-9]*))?", name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def _remove_old(folder: Path, keep: int | None, state: TrainState) -> None:
    names = list_snapshots(folder.parent)
    if keep is not None:
        for name in names[: -max(keep, 1)]:
            if name != str(state.best.epoch):
                shutil.rmtree(folder / name)


def _differences(table: Sequence[Mapping[str, Any]], like: Mapping[str, Tensor]) -> list[str]:
    saved = {row["name"]: (tuple(row["shape"]), row["dtype"]) for row in table}
    expected = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in like.items()}
    lines = []
    for name in sorted(saved.keys() | expected.keys()):
        if name not in expected:
            lines.append(f"{name}: {_describe(saved[name])} in the snapshot, not expected")
        elif name not in saved:
            lines.append(f"{name}: not in the snapshot, {_describe(expected[name])} expected")
        elif saved[name] != expected[name]:
            lines.append(f"{name}: {_describe(saved[name])} in the snapshot, {_describe(expected[name])} expected")
    return lines


def _describe(leaf: tuple[tuple[int, ...], str]) -> str:
    return f"{leaf[1].removeprefix('torch.')} {leaf[0]}"


def _report(data: Mapping[str, Any]) -> EpochReport:
    return EpochReport(**{**data, "best": Best(**data["best"])})
