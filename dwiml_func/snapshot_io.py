"""One snapshot on disk: written as it is, and read into a state of the same structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dwiml_func.core.loop import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.digest import leaf_differences, numbers_to_fields, state_leaves, state_numbers
from dwiml_func.files.atomic import make_directory
from dwiml_func.history import history_from_json, history_to_json
from dwiml_func.leaf_store import SnapshotError, load_leaves, save_leaves
from dwiml_func.record import read_record
from dwiml_func.snapshot_names import snapshot_path

__all__ = ["Snapshot", "restore", "write_snapshot"]


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


def write_snapshot(directory: str | Path, snapshot: Snapshot, *, leaf_digests: Mapping[str, str] | None = None) -> Path:
    """Write a snapshot as it is: the inverse of `restore`. No other one is looked at or removed.

    Args:
        directory: the experiment; snapshots go to its sub-folder `checkpoint`, made where needed.
        snapshot: what to write; without an `environment`, that of this process.
        leaf_digests: what `dwiml_func.digest.leaf_digest` gives for each leaf of the state, if it is known.

    Returns:
        The snapshot's directory. It appears by one rename, after its bytes are on the disk.

    Example:
        >>> import tempfile, torch
        >>> from dwiml_func import init_state, sgd
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = write_snapshot(directory, Snapshot(name="0", state=state, data={"sha256": "0f3a"}))
        ...     restore(directory, state).data
        {'sha256': '0f3a'}
    """
    folder = Path(directory) / "checkpoint"
    make_directory(folder)
    facts = {
        "history": history_to_json(snapshot.history),
        "config": dict(snapshot.config),
        "data": dict(snapshot.data),
        **({"environment": dict(snapshot.environment)} if snapshot.environment else {}),
    }
    path, state = folder / snapshot.name, snapshot.state
    save_leaves(path, state_leaves(state), facts, numbers=state_numbers(state), leaf_digests=leaf_digests)
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
        >>> from dwiml_func.snapshot import save
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save(directory, state.replace(epoch=3))
        ...     restore(directory, state).state.epoch
        3
    """
    path = snapshot_path(directory, name)
    manifest = read_record(directory, path.name)
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
