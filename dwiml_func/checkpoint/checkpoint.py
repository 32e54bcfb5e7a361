"""Checkpoints of a run on disk: `checkpoint/<epoch>[-<batch>]/` in an experiment, each complete or absent.

A checkpoint holds the state, the reports of all epochs so far, the run's config, the fingerprint of the data, and the
environment that wrote it; what each of them holds: `core/state.py`, `core/report.py`, `digest.py` and `manifest.py`.
All but the tensors stands in its `manifest.json`, so a `Checkpoint` reads them only when its state is asked for.
`read` takes the checkpoint of a name, `newest` the newest valid one; `restore` and `restore_or` are built on them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dwiml_func._checks import at_most_three, truncated_repr
from dwiml_func.checkpoint.arrays import load_leaves, save_leaves
from dwiml_func.checkpoint.digest import (
    combine_digests,
    is_starting_count,
    leaf_differences,
    leaf_digest,
    numbers_to_fields,
    state_from_leaves,
    state_leaves,
    state_numbers,
)
from dwiml_func.checkpoint.history import fill_digests, history_from_json, last_saved, remember_saved, serialize_history
from dwiml_func.checkpoint.index import (
    checkpoint_folder,
    checkpoint_name,
    checkpoint_path,
    list_checkpoints,
    names_after,
    position_name,
)
from dwiml_func.checkpoint.manifest import CheckpointError, CorruptError, read_manifest
from dwiml_func.checkpoint.retention import check_keep, remove_old
from dwiml_func.core.non_finite import check_finite
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState, check_not_donated
from dwiml_func.files.atomic import make_directory
from dwiml_func.files.json import to_json_data

__all__ = ["Checkpoint", "newest", "read", "restore", "restore_or", "save", "write"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk. Its tensors are read when `state` is first asked for.

    Args:
        name: such as "3" (after three epochs) or "3-50" (and fifty batches of the fourth).
        digest: the recorded `state_digest` of the state.
        history: the reports of all epochs up to it, with their digests.
        config: the run's config, as JSON data.
        environment: what wrote it: versions, processor, number of threads, devices.
        data: the fingerprint of the data; empty where none was recorded.
        corrupt: what is wrong with newer checkpoints, by name; only `newest` fills it.
        read_state: reads the state.

    Example:
        >>> import tempfile, torch
        >>> from dwiml_func import init_state, sgd
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save(directory, init_state(torch.nn.Linear(1, 1), sgd(), seed=0), config={"lr": 0.1})
        ...     checkpoint = read(directory)
        ...     checkpoint.name, checkpoint.config, checkpoint.state.step
        ('0', {'lr': 0.1}, 0)
    """

    name: str
    digest: str
    history: tuple[EpochReport, ...] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    environment: Mapping[str, Any] = field(repr=False)
    data: Mapping[str, Any]
    corrupt: Mapping[str, str] = field(default_factory=dict)
    read_state: Callable[[], TrainState] = field(repr=False, compare=False)

    @cached_property
    def state(self) -> TrainState:
        """The training state, whose tensors are checked against their digests as they are read."""
        return self.read_state()


def read(directory: str | Path, name: str | None = None, *, like: TrainState | None = None) -> Checkpoint:
    """Read a checkpoint without its tensors.

    Args:
        directory: the experiment.
        name: which checkpoint, e.g. "3" or "3-50"; None takes the latest.
        like: a state with the names, shapes, dtypes, devices and key to expect. Without it, the checkpoint's state is
            as recorded, on the CPU.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: there is no checkpoint, or none of that name.
        CorruptError: its manifest is corrupt. The same error comes from `state` if its tensors are.
        CheckpointError: it differs from `like`.

    Example:
        >>> read("/no/such/run")
        Traceback (most recent call last):
        ...
        FileNotFoundError: No checkpoint in /no/such/run/checkpoint. Has an epoch been finished there?
    """
    path = checkpoint_path(directory, name)
    manifest = read_manifest(path, needs=("numbers", "history", "config"))
    saved_as = position_name(manifest["numbers"]["epoch"], manifest["numbers"]["batch"])
    if saved_as != path.name:
        raise CorruptError(f"{path} is corrupt: what it holds was saved as {saved_as}.")
    if like is not None:
        _check_fit(path, manifest, like)
    return Checkpoint(
        name=path.name,
        digest=manifest["digest"],
        history=history_from_json(manifest["history"]),
        config=manifest["config"],
        environment=manifest["environment"],
        data=manifest.get("data") or {},
        read_state=partial(_load_state, path, manifest, like),
    )


def newest(directory: str | Path, *, like: TrainState | None = None) -> Checkpoint | None:
    """Read the newest valid checkpoint, also while a run in another process saves and removes checkpoints.

    Args:
        directory: the experiment.
        like: as for `read`. With it the tensors are read too, and must be valid; without it, only the manifest.

    Returns:
        The checkpoint, whose `corrupt` says what is wrong with newer ones; None where there is no checkpoint yet.

    Raises:
        CorruptError: all are corrupt.
        CheckpointError: the newest valid one differs from `like`.

    Example:
        >>> newest("/no/such/run") is None
        True
    """
    corrupt: dict[str, str] = {}
    while names := [name for name in list_checkpoints(directory) if name not in corrupt]:
        try:
            found = replace(read(directory, names[-1], like=like), corrupt=corrupt)
            if like is not None:
                _ = found.state
        except (CorruptError, FileNotFoundError) as error:
            if names[-1] not in list_checkpoints(directory):
                continue  # it was removed while it was read
            if not isinstance(error, CorruptError):
                raise
            corrupt[names[-1]] = str(error)
        else:
            return found
    if corrupt:
        raise CorruptError(f"Every checkpoint is corrupt. {' '.join(corrupt.values())}")
    return None


def restore(directory: str | Path, like: TrainState, *, name: str | None = None) -> Checkpoint:
    """Read a checkpoint with its tensors into a state of the same structure.

    Args:
        directory: the experiment.
        like: a state with the names, shapes, dtypes, devices and key to expect, e.g. `init_state(...)` of the same
            model, optimizer and seed.
        name: which checkpoint, e.g. "3" or "3-50"; None takes the latest.

    Returns:
        The checkpoint; the tensors of its `state` are on the devices of those of `like`.

    Raises:
        FileNotFoundError: there is no checkpoint, or none of that name.
        CorruptError: it is corrupt.
        CheckpointError: it differs from `like`.

    Example:
        >>> import tempfile, torch
        >>> from dwiml_func import init_state, sgd
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save(directory, state.replace(epoch=3))
        ...     restore(directory, state).state.epoch
        3
    """
    checkpoint = read(directory, name, like=like)
    _ = checkpoint.state
    return checkpoint


def restore_or(directory: str | Path, state: TrainState) -> tuple[TrainState, tuple[EpochReport, ...]]:
    """The newest valid checkpoint of a run or, where there is none yet, the given state.

    Args:
        directory: the experiment; it need not exist.
        state: the first state of the run.

    Returns:
        The state to continue from and the reports of the epochs so far.

    Raises:
        CheckpointError: as `newest`.

    Example:
        >>> import torch
        >>> from dwiml_func import init_state, sgd
        >>> state, history = restore_or("/no/such/run", init_state(torch.nn.Linear(1, 1), sgd(), seed=0))
        >>> state.epoch, history
        (0, ())
    """
    checkpoint = newest(directory, like=state)
    return (state, ()) if checkpoint is None else (checkpoint.state, checkpoint.history)


def save(
    directory: str | Path,
    state: TrainState,
    history: Sequence[EpochReport] = (),
    *,
    config: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    keep: int | str | None = 2,
    keep_always: Collection[str] = (),
) -> Path:
    """Write a checkpoint of a run, and remove older ones.

    The folder belongs to one run. A run that was restored from an older checkpoint may be saved over its later ones as
    long as it repeats them bitwise; with other options it is another run, and belongs in another folder.

    Args:
        directory: the experiment; checkpoints go to its sub-folder `checkpoint`, made where needed.
        state: the run.
        history: the reports of all epochs so far. Missing digests are taken from the checkpoints before, and from the
            state itself.
        config: JSON data to record, e.g. the run's config; arrays, tensors and paths become lists, numbers and texts.
        data: a fingerprint of the data to record.
        environment: what computed the state; None takes this process and the devices of the state's tensors.
        keep: how many of the latest checkpoints at an epoch's end stay, besides that of the best epoch and the latest
            two within the current epoch. "every:5": the latest two, and those of every fifth epoch. "all" and None keep
            all.
        keep_always: names of checkpoints that stay whatever `keep` is.

    Returns:
        The checkpoint's directory. It appears by one rename, after its bytes are on the disk.

    Raises:
        OSError: the disk is full, or cannot be written to; the checkpoints before stay.
        TypeError: something given is not JSON data, or `history` has more than reports.
        CheckpointError: the folder holds later checkpoints, and they are not known to be of this run. Nothing is
            written then.
        NonFiniteError: a deferred check found that a step of the current epoch was not finite. Nothing is written then:
            a run that is resumed from such a state could take no step.

    Example:
        >>> import tempfile, torch
        >>> from dwiml_func import init_state, sgd
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = save(directory, state)
        ...     path.name, list_checkpoints(directory)
        ('0', ['0'])
    """
    if keep is not None:
        check_keep(keep)
    check_not_donated(state)
    check_finite(state)
    leaf_digests = {name: leaf_digest(leaf) for name, leaf in state_leaves(state).items()}
    digest = combine_digests(leaf_digests, state_numbers(state)) if state.batch == 0 else None
    if not all(isinstance(report, EpochReport) for report in history):
        raise TypeError(f"history: expected the reports of epochs. Received: {truncated_repr(history)}")
    earlier = _earlier_history(directory)
    history = fill_digests(history, earlier, state.epoch, digest)
    known = {report.epoch: report.digest for report in history} | ({} if digest is None else {state.epoch: digest})
    _check_later_are_of_this_run(directory, state, known, earlier)
    facts = {"config": config, "data": data, "environment": environment}
    path = write(directory, state, history, leaf_digests=leaf_digests, **facts)
    remember_saved(path, history)
    remove_old(directory, state, keep, keep_always)
    return path


def write(
    directory: str | Path,
    state: TrainState,
    history: Sequence[EpochReport],
    *,
    config: Mapping[str, Any] | None,
    data: Mapping[str, Any] | None,
    environment: Mapping[str, Any] | None,
    leaf_digests: Mapping[str, str] | None = None,
) -> Path:
    """Write one checkpoint, as `save` does, with the history as it is; no other checkpoint is read or removed."""
    folder = checkpoint_folder(directory)
    make_directory(folder)
    given = {"config": config or {}, "data": data or {}, **({"environment": environment} if environment else {})}
    facts = {
        "history": serialize_history(history),
        **{name: to_json_data(value, name) for name, value in given.items()},
    }
    path = folder / checkpoint_name(state)
    save_leaves(path, state_leaves(state), facts, numbers=state_numbers(state), leaf_digests=leaf_digests)
    return path


def _earlier_history(directory: str | Path) -> tuple[EpochReport, ...]:
    if (history := last_saved(directory)) is not None:
        return history
    try:
        found = newest(directory)
    except CheckpointError:
        return ()
    return found.history if found else ()


def _check_later_are_of_this_run(
    directory: str | Path, state: TrainState, known: Mapping[int, str | None], earlier: Sequence[EpochReport]
) -> None:
    """Raise CheckpointError if valid checkpoints come after `state`, unless all digests known by epoch are theirs."""
    # At least one epoch must be in both: numbers and names alone do not tell two runs apart.
    names = list_checkpoints(directory)
    if not (later := names_after(names, state)):
        return
    recorded = {report.epoch: report.digest for report in earlier}
    if state.batch == 0 and checkpoint_name(state) in names and _is_valid(directory, checkpoint_name(state)):
        recorded[state.epoch] = read(directory, checkpoint_name(state)).digest
    pairs = [(digest, recorded[epoch]) for epoch, digest in known.items() if digest and recorded.get(epoch)]
    if pairs and all(own == other for own, other in pairs):
        return
    if valid := [name for name in later if _is_valid(directory, name)]:
        raise CheckpointError(
            f"Expected a folder without later epochs of another run, to save checkpoint {checkpoint_name(state)}. "
            f"Received: {checkpoint_folder(directory)}, which holds {at_most_three(valid, ', ')}. "
            f"Save to another folder, or delete these checkpoints."
        )


def _is_valid(directory: str | Path, name: str) -> bool:
    try:
        _ = read(directory, name).state
    except (CorruptError, FileNotFoundError):
        return False
    except CheckpointError:  # of another version
        return True
    return True


def _check_fit(path: Path, manifest: Mapping[str, Any], like: TrainState) -> None:
    key = numbers_to_fields(manifest["numbers"])["key"]
    differences = [] if key == like.key else [f"key: {key} in the checkpoint, {like.key} expected"]
    table = [row for row in manifest["leaves"] if not is_starting_count(row["name"], row)]
    expected = {name: leaf for name, leaf in state_leaves(like).items() if not is_starting_count(name, leaf)}
    differences += leaf_differences(table, expected)
    if differences:
        raise CheckpointError(
            f"Checkpoint {path} does not fit the state to restore into: {at_most_three(differences)}."
        )


def _load_state(path: Path, manifest: Mapping[str, Any], like: TrainState | None) -> TrainState:
    state = state_from_leaves(load_leaves(path, manifest), numbers_to_fields(manifest["numbers"]))
    if like is None:
        return state
    device = next(iter(like.params.values())).device

    def filled(part: Any, old: Any) -> Any:
        """In the order and on the devices of `like`."""
        if isinstance(part, Tensor):
            return part.to(old.device if isinstance(old, Tensor) else device)
        names = [name for name in dict.fromkeys((*old, *part)) if name in part or isinstance(old[name], Mapping)]
        return {name: filled(part.get(name, {}), old.get(name, {})) for name in names}

    groups = ("params", "buffers", "opt_state")
    return state.replace(**{group: filled(getattr(state, group), getattr(like, group)) for group in groups})
