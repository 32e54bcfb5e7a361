"""Snapshots of a run on disk: `checkpoint/<epoch>[-<batch>]/`, each whole or absent.

A snapshot holds the state, the reports of all epochs so far, the run's config, and what wrote it. Its `manifest.json`
is readable without the tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dwiml_func.atomic import atomic_remove, make_directory
from dwiml_func.digest import (
    combine_digests,
    leaf_differences,
    leaf_digest,
    numbers_to_fields,
    state_leaves,
    state_numbers,
)
from dwiml_func.history import fill_digests, history_from_json, history_to_json
from dwiml_func.leaf_store import DamagedError, SnapshotError, load_leaves, read_manifest, save_leaves
from dwiml_func.loop import EpochReport
from dwiml_func.record import read_record
from dwiml_func.snapshot_names import list_snapshots, snapshot_name, snapshot_path
from dwiml_func.state import TrainState

__all__ = [
    "Snapshot",
    "latest_digest",
    "list_snapshots",
    "read_record",
    "restore",
    "restore_newest",
    "restore_or",
    "save",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A restored snapshot.

    Args:
        name: its name, such as "3" (after three epochs) or "3-50" (and fifty batches of the fourth).
        state: the run.
        history: the reports of all epochs up to it, with their digests.
        config: what was recorded as the run's config.
        environment: what wrote it: versions, processor, number of threads, devices.
        data: the fingerprint of the data, as it was given to `save`.

    Example:
        >>> Snapshot.__slots__
        ('name', 'state', 'history', 'config', 'environment', 'data')
    """

    name: str
    state: TrainState
    history: tuple[EpochReport, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)


def save(
    directory: str | Path,
    state: TrainState,
    history: Sequence[EpochReport] = (),
    *,
    config: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    keep: int | None = 2,
    keep_always: Collection[str] = (),
) -> Path:
    """Write a snapshot of a run, and remove older ones.

    Args:
        directory: the experiment; snapshots go to its sub-folder `checkpoint`, made where needed.
        state: the run.
        history: the reports of all epochs so far. Digests that they lack are taken from the snapshots before, and from
            the state itself.
        config: JSON data to record, e.g. the run's config.
        data: a fingerprint of the data to record.
        keep: how many of the latest snapshots at an epoch's end stay, besides that of the best epoch and the latest two
            within the epoch under way; None keeps all.
        keep_always: names of snapshots that stay whatever `keep` is.

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
    make_directory(folder)
    numbers, leaves = state_numbers(state), state_leaves(state)
    leaf_digests = {name: leaf_digest(leaf) for name, leaf in leaves.items()}
    digest = combine_digests(leaf_digests, numbers) if state.batch == 0 else None
    facts = {
        "numbers": numbers,
        "history": history_to_json(fill_digests(history, _earlier_history(directory), state.epoch, digest)),
        "config": dict(config or {}),
        "data": dict(data or {}),
    }
    path = folder / snapshot_name(state)
    save_leaves(path, leaves, facts, numbers=numbers, leaf_digests=leaf_digests)
    if keep is not None:
        _remove_old(directory, state, keep, keep_always)
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
        DamagedError: it is damaged.
        SnapshotError: it differs from `like`; the message lists every difference, with both values.

    Example:
        >>> import tempfile, torch
        >>> from dwiml_func import init_state, sgd
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save(directory, state.replace(epoch=3))
        ...     restore(directory, state).state.epoch
        3
    """
    path = snapshot_path(directory, name)
    manifest = read_manifest(path)
    differences = leaf_differences(manifest["leaves"], state_leaves(like))
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
    return Snapshot(
        name=path.name,
        state=state,
        history=history_from_json(manifest["history"]),
        config=manifest["config"],
        environment=manifest["environment"],
        data=manifest.get("data", {}),
    )


def restore_newest(directory: str | Path, like: TrainState) -> tuple[Snapshot, list[str]]:
    """Restore the newest snapshot that is not damaged.

    Args:
        directory: the experiment.
        like: as for `restore`.

    Returns:
        The snapshot, and the names of newer ones that are damaged.

    Raises:
        FileNotFoundError: there is no snapshot.
        DamagedError: all are damaged; the message names each.
        SnapshotError: the newest sound one differs from `like`.

    Example:
        >>> import tempfile, torch
        >>> from dwiml_func import init_state, sgd
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save(directory, state.replace(epoch=1))
        ...     (save(directory, state.replace(epoch=2)) / "manifest.json").unlink()
        ...     snapshot, damaged = restore_newest(directory, state)
        ...     snapshot.name, damaged
        ('1', ['2'])
    """
    snapshot_path(directory, None)
    problems: dict[str, DamagedError] = {}
    for name in reversed(list_snapshots(directory)):
        try:
            return restore(directory, like, name=name), list(problems)
        except DamagedError as error:
            problems[name] = error
    raise DamagedError(f"Every snapshot is damaged. {' '.join(map(str, problems.values()))}")


def restore_or(directory: str | Path, state: TrainState) -> tuple[TrainState, tuple[EpochReport, ...]]:
    """The newest sound snapshot of a run, or, where there is none yet, the state that is given.

    Args:
        directory: the experiment; it need not exist.
        state: the first state of the run.

    Returns:
        The state to go on from and the reports of the epochs so far.

    Raises:
        SnapshotError: as `restore_newest`.

    Example:
        >>> import torch
        >>> from dwiml_func import init_state, sgd
        >>> state, history = restore_or("/no/such/run", init_state(torch.nn.Linear(1, 1), sgd(), seed=0))
        >>> state.epoch, history
        (0, ())
    """
    if not list_snapshots(directory):
        return state, ()
    snapshot, _ = restore_newest(directory, state)
    return snapshot.state, snapshot.history


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
    path = snapshot_path(directory, None)
    manifest = read_manifest(path)
    leaves = {name: leaf_digest(leaf) for name, leaf in load_leaves(path, manifest).items()}
    return combine_digests(leaves, manifest["numbers"])


def _earlier_history(directory: str | Path) -> tuple[EpochReport, ...]:
    try:
        return history_from_json(read_record(directory)["history"])
    except (FileNotFoundError, SnapshotError):
        return ()


def _remove_old(directory: str | Path, state: TrainState, keep: int, keep_always: Collection[str]) -> None:
    names = list_snapshots(directory)
    ends = [name for name in names if "-" not in name]
    within = [name for name in names if name.startswith(f"{state.epoch}-")] if state.batch else []
    kept = {*ends[-max(keep, 1) :], str(state.best.epoch), *within[-2:], *keep_always}
    for name in names:
        if name not in kept:
            atomic_remove(Path(directory) / "checkpoint" / name)
