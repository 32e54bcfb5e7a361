"""Snapshots of a run on disk: `checkpoint/<epoch>[-<batch>]/`, each whole or absent.

A snapshot holds the state, the reports of all epochs so far, the run's config, and what wrote it. Its `manifest.json`
is readable without the tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dwiml_func.core.loop import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.digest import combine_digests, leaf_digest, state_leaves, state_numbers
from dwiml_func.files.atomic import atomic_remove
from dwiml_func.history import fill_digests, history_from_json
from dwiml_func.leaf_store import SnapshotError, load_leaves
from dwiml_func.record import newest_sound, read_record
from dwiml_func.snapshot_io import Snapshot, restore, write_snapshot
from dwiml_func.snapshot_names import list_snapshots, snapshot_name, snapshot_path

__all__ = [
    "Snapshot",
    "latest_digest",
    "list_snapshots",
    "read_record",
    "remove_old",
    "restore",
    "restore_newest",
    "restore_or",
    "save",
    "write_snapshot",
]


def save(
    directory: str | Path,
    state: TrainState,
    history: Sequence[EpochReport] = (),
    *,
    config: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
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
        environment: what computed the state; None takes this process and the devices of the state's tensors.
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
    leaf_digests = {name: leaf_digest(leaf) for name, leaf in state_leaves(state).items()}
    digest = combine_digests(leaf_digests, state_numbers(state)) if state.batch == 0 else None
    snapshot = Snapshot(
        name=snapshot_name(state),
        state=state,
        history=fill_digests(history, _earlier_history(directory), state.epoch, digest),
        config=config or {},
        data=data or {},
        environment=environment or {},
    )
    path = write_snapshot(directory, snapshot, leaf_digests=leaf_digests)
    remove_old(directory, state, keep, keep_always)
    return path


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
    snapshot, damaged = newest_sound(directory, lambda name: restore(directory, like, name=name))
    return snapshot, list(damaged)


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
    manifest = read_record(directory, path.name)
    leaves = {name: leaf_digest(leaf) for name, leaf in load_leaves(path, manifest).items()}
    return combine_digests(leaves, manifest["numbers"])


def _earlier_history(directory: str | Path) -> tuple[EpochReport, ...]:
    try:
        return history_from_json(read_record(directory)["history"])
    except (FileNotFoundError, SnapshotError):
        return ()


def remove_old(directory: str | Path, state: TrainState, keep: int | None, keep_always: Collection[str] = ()) -> None:
    """Remove snapshots, as `save` does.

    Args:
        directory: the experiment.
        state: that of its latest snapshot.
        keep, keep_always: as for `save`.

    Example:
        >>> remove_old(directory, state, keep=2)  # doctest: +SKIP
    """
    if keep is None:
        return
    names = list_snapshots(directory)
    ends = [name for name in names if "-" not in name]
    within = [name for name in names if name.startswith(f"{state.epoch}-")] if state.batch else []
    kept = {*ends[-max(keep, 1) :], str(state.best.epoch), *within[-2:], *keep_always}
    for name in names:
        if name not in kept:
            atomic_remove(Path(directory) / "checkpoint" / name)
