"""One checkpoint on disk: written as it is, and read into a state of the same structure.

Checkpoints of a run on disk: `checkpoint/<epoch>[-<batch>]/`, each whole or absent.

A checkpoint holds the state, the reports of all epochs so far, the run's config, and what wrote it. Its `manifest.json`
is readable without the tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dwiml_func.checkpoint.arrays import CheckpointError, load_leaves, save_leaves
from dwiml_func.checkpoint.digest import (
    combine_digests,
    leaf_differences,
    leaf_digest,
    numbers_to_fields,
    state_leaves,
    state_numbers,
)
from dwiml_func.checkpoint.history import fill_digests, history_from_json, history_to_json
from dwiml_func.checkpoint.index import checkpoint_name, checkpoint_path, list_checkpoints, newest_valid, read_record
from dwiml_func.core.loop import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.files.atomic import atomic_remove, make_directory

__all__ = [
    "Checkpoint",
    "latest_digest",
    "list_checkpoints",
    "read_record",
    "remove_old",
    "restore",
    "restore_newest",
    "restore_or",
    "save",
    "write_checkpoint",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A restored checkpoint.

    Args:
        name: its name, such as "3" (after three epochs) or "3-50" (and fifty batches of the fourth).
        state: the run.
        history: the reports of all epochs up to it, with their digests.
        config: what was recorded as the run's config.
        environment: what wrote it: versions, processor, number of threads, devices.
        data: the fingerprint of the data, as it was given to `save`.

    Example:
        >>> Checkpoint.__slots__
        ('name', 'state', 'history', 'config', 'environment', 'data')
    """

    name: str
    state: TrainState
    history: tuple[EpochReport, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)


def write_checkpoint(
    directory: str | Path, checkpoint: Checkpoint, *, leaf_digests: Mapping[str, str] | None = None
) -> Path:
    """Write a checkpoint as it is: the inverse of `restore`. No other one is looked at or removed.

    Args:
        directory: the experiment; checkpoints go to its sub-folder `checkpoint`, made where needed.
        checkpoint: what to write; without an `environment`, that of this process.
        leaf_digests: what `dwiml_func.checkpoint.digest.leaf_digest` gives for each leaf of the state, if it is known.

    Returns:
        The checkpoint's directory. It appears by one rename, after its bytes are on the disk.

    Example:
        >>> import tempfile, torch
        >>> from dwiml_func import init_state, sgd
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = write_checkpoint(directory, Checkpoint(name="0", state=state, data={"sha256": "0f3a"}))
        ...     restore(directory, state).data
        {'sha256': '0f3a'}
    """
    folder = Path(directory) / "checkpoint"
    make_directory(folder)
    facts = {
        "history": history_to_json(checkpoint.history),
        "config": dict(checkpoint.config),
        "data": dict(checkpoint.data),
        **({"environment": dict(checkpoint.environment)} if checkpoint.environment else {}),
    }
    path, state = folder / checkpoint.name, checkpoint.state
    save_leaves(path, state_leaves(state), facts, numbers=state_numbers(state), leaf_digests=leaf_digests)
    return path


def restore(directory: str | Path, like: TrainState, *, name: str | None = None) -> Checkpoint:
    """Read a checkpoint into a state of the same structure.

    Args:
        directory: the experiment.
        like: a state with the names, shapes, dtypes, devices and key to expect, e.g. `init_state(...)` of the same
            model, optimizer and seed.
        name: which checkpoint, e.g. "3" or "3-50"; None takes the latest.

    Returns:
        The checkpoint; its tensors are on the devices of those of `like`.

    Raises:
        FileNotFoundError: there is no checkpoint, or none of that name.
        CorruptError: it is corrupt.
        CheckpointError: it differs from `like`; the message lists every difference, with both values.

    Example:
        >>> import tempfile, torch
        >>> from dwiml_func import init_state, sgd
        >>> from dwiml_func.checkpoint.checkpoint import save
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save(directory, state.replace(epoch=3))
        ...     restore(directory, state).state.epoch
        3
    """
    path = checkpoint_path(directory, name)
    manifest = read_record(directory, path.name)
    differences = leaf_differences(manifest["leaves"], state_leaves(like))
    fields = numbers_to_fields(manifest["numbers"])
    if fields["key"] != like.key:
        differences.append(f"key: {fields['key']} in the checkpoint, {like.key} expected")
    if differences:
        raise CheckpointError(f"Checkpoint {path} does not fit the state to restore into: {'; '.join(differences)}.")
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
    return Checkpoint(
        name=path.name,
        state=state,
        history=history_from_json(manifest["history"]),
        config=manifest["config"],
        environment=manifest["environment"],
        data=manifest.get("data", {}),
    )


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
    """Write a checkpoint of a run, and remove older ones.

    Args:
        directory: the experiment; checkpoints go to its sub-folder `checkpoint`, made where needed.
        state: the run.
        history: the reports of all epochs so far. Digests that they lack are taken from the checkpoints before, and from
            the state itself.
        config: JSON data to record, e.g. the run's config.
        data: a fingerprint of the data to record.
        environment: what computed the state; None takes this process and the devices of the state's tensors.
        keep: how many of the latest checkpoints at an epoch's end stay, besides that of the best epoch and the latest two
            within the epoch under way; None keeps all.
        keep_always: names of checkpoints that stay whatever `keep` is.

    Returns:
        The checkpoint's directory. It appears by one rename, after its bytes are on the disk.

    Example:
        >>> import tempfile, torch
        >>> from dwiml_func import init_state, sgd
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = save(directory, state)
        ...     path.name, list_checkpoints(directory)
        ('0', ['0'])
    """
    leaf_digests = {name: leaf_digest(leaf) for name, leaf in state_leaves(state).items()}
    digest = combine_digests(leaf_digests, state_numbers(state)) if state.batch == 0 else None
    checkpoint = Checkpoint(
        name=checkpoint_name(state),
        state=state,
        history=fill_digests(history, _earlier_history(directory), state.epoch, digest),
        config=config or {},
        data=data or {},
        environment=environment or {},
    )
    path = write_checkpoint(directory, checkpoint, leaf_digests=leaf_digests)
    remove_old(directory, state, keep, keep_always)
    return path


def restore_newest(directory: str | Path, like: TrainState) -> tuple[Checkpoint, list[str]]:
    """Restore the newest checkpoint that is not corrupt.

    Args:
        directory: the experiment.
        like: as for `restore`.

    Returns:
        The checkpoint, and the names of newer ones that are corrupt.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CorruptError: all are corrupt; the message names each.
        CheckpointError: the newest sound one differs from `like`.

    Example:
        >>> import tempfile, torch
        >>> from dwiml_func import init_state, sgd
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save(directory, state.replace(epoch=1))
        ...     (save(directory, state.replace(epoch=2)) / "manifest.json").unlink()
        ...     checkpoint, corrupt = restore_newest(directory, state)
        ...     checkpoint.name, corrupt
        ('1', ['2'])
    """
    checkpoint, corrupt = newest_valid(directory, lambda name: restore(directory, like, name=name))
    return checkpoint, list(corrupt)


def restore_or(directory: str | Path, state: TrainState) -> tuple[TrainState, tuple[EpochReport, ...]]:
    """The newest sound checkpoint of a run, or, where there is none yet, the state that is given.

    Args:
        directory: the experiment; it need not exist.
        state: the first state of the run.

    Returns:
        The state to go on from and the reports of the epochs so far.

    Raises:
        CheckpointError: as `restore_newest`.

    Example:
        >>> import torch
        >>> from dwiml_func import init_state, sgd
        >>> state, history = restore_or("/no/such/run", init_state(torch.nn.Linear(1, 1), sgd(), seed=0))
        >>> state.epoch, history
        (0, ())
    """
    if not list_checkpoints(directory):
        return state, ()
    checkpoint, _ = restore_newest(directory, state)
    return checkpoint.state, checkpoint.history


def latest_digest(directory: str | Path) -> str:
    """The digest of an experiment's latest state, computed from the bytes on disk.

    Args:
        directory: the experiment.

    Returns:
        What `dwiml_func.checkpoint.digest.state_digest` gives for that state: 64 hexadecimal digits.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: it is corrupt.

    Example:
        >>> import tempfile, torch
        >>> from dwiml_func import digest, init_state, sgd
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save(directory, state)
        ...     latest_digest(directory) == digest.state_digest(state)
        True
    """
    path = checkpoint_path(directory, None)
    manifest = read_record(directory, path.name)
    leaves = {name: leaf_digest(leaf) for name, leaf in load_leaves(path, manifest).items()}
    return combine_digests(leaves, manifest["numbers"])


def _earlier_history(directory: str | Path) -> tuple[EpochReport, ...]:
    try:
        return history_from_json(read_record(directory)["history"])
    except (FileNotFoundError, CheckpointError):
        return ()


def remove_old(directory: str | Path, state: TrainState, keep: int | None, keep_always: Collection[str] = ()) -> None:
    """Remove checkpoints, as `save` does.

    Args:
        directory: the experiment.
        state: that of its latest checkpoint.
        keep, keep_always: as for `save`.

    Example:
        >>> remove_old(directory, state, keep=2)  # doctest: +SKIP
    """
    if keep is None:
        return
    names = list_checkpoints(directory)
    ends = [name for name in names if "-" not in name]
    within = [name for name in names if name.startswith(f"{state.epoch}-")] if state.batch else []
    kept = {*ends[-max(keep, 1) :], str(state.best.epoch), *within[-2:], *keep_always}
    for name in names:
        if name not in kept:
            atomic_remove(Path(directory) / "checkpoint" / name)
