"""Train an epoch of an experiment again, and compare it with the record bit for bit. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwiml_func.checkpoint.checkpoint import Checkpoint, newest, read, restore
from dwiml_func.checkpoint.digest import bit_difference, leaf_differences, state_digest, state_leaves, state_numbers
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.manifest import CorruptError
from dwiml_func.checkpoint.provenance import environment, environment_differences
from dwiml_func.core.loop import EpochReport, Track, train_and_validate
from dwiml_func.core.state import TrainState
from dwiml_func.core.step import NonFiniteError
from dwiml_func.experiment.compare import differences, report_differences, report_values
from dwiml_func.experiment.config import Origin, RunConfig
from dwiml_func.experiment.folder import is_ensemble, read_config
from dwiml_func.experiment.setup import RunParts, prepare
from dwiml_func.files.fingerprint import fingerprint
from dwiml_func.optim.schedules import per_epoch

__all__ = ["Verification", "verify_epoch"]

_LABELS = ("recorded", "replayed")
_MEMBER = "a member of an ensemble: all are trained in one step, which has other last bits than a run by itself"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a replay showed.

    Args:
        epoch: the epoch; 1 is the first.
        is_replayed: whether the epoch could be trained again.
        start: where the replay began: the name of a checkpoint, or None for the first state of all.
        digest: on record for the state after the epoch; None where none is.
        num_values: numbers of the epoch's report that were compared.
        problems: a text for each thing that is not as recorded.
        surroundings: a text for each difference of environment or config, which may be why.

    Example:
        >>> verify_epoch("experiments/first_run").problems  # doctest: +SKIP
        ()
    """

    epoch: int
    is_replayed: bool
    start: str | None
    digest: str | None
    num_values: int
    problems: tuple[str, ...]
    surroundings: tuple[str, ...]


def verify_epoch(
    directory: str | Path,
    *,
    epoch: int | None = None,
    hdf5_file: str | None = None,
    track: Track | None = None,
) -> Verification:
    """Train an epoch again from the checkpoint before it, or the nearest one before that, and compare.

    The config is that of `config.json`, the number of threads the recorded one; it is put back afterwards. Compared
    with the record are the state's digest, every metric, the digest of the state that the replay began from, the
    checkpoint after the epoch, where there is one, and the data file.

    Args:
        directory: the experiment.
        epoch: which epoch; None takes the last on record.
        hdf5_file: where the dataset is, if it has moved.
        track: shows progress, as in `train_and_validate`.

    Returns:
        What is not as recorded.

    Raises:
        FileNotFoundError: there is no such experiment, or no dataset.
        ValueError: the epoch is not on record, or was trained in the experiment that this one was forked from; or
            nothing is left to replay it from.

    Example:
        >>> verify_epoch("/no/such/experiment")
        Traceback (most recent call last):
        ...
        FileNotFoundError: '/no/such/experiment' is not an experiment: it has no config.json.
    """
    directory = Path(directory)
    config = read_config(directory)
    latest = newest(directory)
    if latest is None or not latest.history:
        raise ValueError(f"{directory} has no epoch on record yet. Expected one that has been finished and saved.")
    reports = {report.epoch: report for report in latest.history}
    epoch = latest.history[-1].epoch if epoch is None else epoch
    if epoch not in reports:
        raise ValueError(f"Epoch {epoch} of {directory} is not on record. Expected one of 1 to {max(reports)}.")
    _check_epochs_of_origin(config, epoch)
    replayed_config = replace(config, hdf5_file=str(Path(hdf5_file).absolute())) if hdf5_file is not None else config

    problems = list(latest.corrupt.values())
    after, corrupt = _checkpoint_after(directory, epoch)
    problems += [problem for problem in corrupt if problem not in problems]
    recorded_environment = (after or latest).environment
    surroundings = differences(latest.config, config.to_dict(), ("recorded", "in config.json"))
    data_problems = _data_problems(latest, replayed_config.hdf5_file)
    with _num_threads(recorded_environment.get("num_threads"), default=config.training.num_threads):
        # Where nothing can be replayed, nothing is known of another device either.
        devices, start, is_replayed = set(recorded_environment.get("devices", ())), None, False
        try:
            parts = prepare(replayed_config)
            first = parts.first_state()
            devices = {str(leaf.device) for leaf in state_leaves(first).values()}
            state, start, corrupt = _start(directory, config, first, epoch)
            problems += corrupt
            problems += _start_problems(state, start, reports, config.origin)
            problems += _replay_problems(state, parts, track, reports, epoch, after)
            is_replayed = True
        except (ValueError, NonFiniteError) as error:
            if isinstance(error, _NothingLeft) or not (data_problems or surroundings or problems):
                raise
            problems.append(f"the replay is not possible: {error}")
        changes = environment_differences(recorded_environment, environment(devices))
    return Verification(
        epoch=epoch,
        is_replayed=is_replayed,
        start=start,
        digest=reports[epoch].digest,
        num_values=len(report_values(reports[epoch])),
        problems=(*problems, *data_problems),
        surroundings=(
            *(f"environment: {text}" for text in changes),
            *(f"config: {text}" for text in surroundings),
            *((_MEMBER,) if problems and is_ensemble(directory.parent) else ()),
        ),
    )


class _NothingLeft(ValueError):
    pass


def _checkpoint_after(directory: Path, epoch: int) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint after the epoch, with its tensors, or what is wrong with it."""
    if str(epoch) not in list_checkpoints(directory):
        return None, []
    try:
        checkpoint = read(directory, str(epoch))
        _ = checkpoint.state
    except CorruptError as error:
        return None, [str(error)]
    return checkpoint, []


def _check_epochs_of_origin(config: RunConfig, epoch: int) -> None:
    if config.origin is None:
        return
    forked = int(config.origin.checkpoint.partition("-")[0])
    if epoch <= forked:
        raise ValueError(
            f"Epoch {epoch} was trained before this run was forked, after epoch {forked}, "
            f"from {config.origin.experiment}. Verify it there."
        )


def _start(
    directory: Path, config: RunConfig, first: TrainState, epoch: int
) -> tuple[TrainState, str | None, list[str]]:
    """The newest sound state at the end of an epoch before this one, its checkpoint's name, and what is corrupt."""
    names = list_checkpoints(directory)
    candidates = [name for name in reversed(names) if "-" not in name and int(name) < epoch]
    if config.origin is not None and config.origin.checkpoint in names and config.origin.checkpoint not in candidates:
        candidates.append(config.origin.checkpoint)  # within an epoch
    corrupt = []
    for name in candidates:
        try:
            return restore(directory, first, name=name).state, name, corrupt
        except CorruptError as error:
            corrupt.append(str(error))
    if config.origin is None:
        return first, None, corrupt
    raise _NothingLeft(
        f"{directory} has no sound checkpoint before epoch {epoch} to replay it from. "
        f"Expected that of {config.origin.checkpoint}, where it was forked, or a later one."
    )


def _start_problems(
    state: TrainState, start: str | None, reports: Mapping[int, EpochReport], origin: Origin | None
) -> list[str]:
    if origin is not None and start == origin.checkpoint:
        recorded = origin.start_digest
    else:
        recorded = reports[state.epoch].digest if state.epoch in reports and not state.batch else None
    found = state_digest(state)
    if recorded in (None, found):
        return []
    return [f"checkpoint {start}, where the replay began: digest {recorded} recorded, {found} found"]


def _replay_problems(
    state: TrainState,
    parts: RunParts,
    track: Track | None,
    reports: Mapping[int, EpochReport],
    epoch: int,
    after: Checkpoint | None,
) -> list[str]:
    training = parts.config.training
    epochs = train_and_validate(
        state,
        train=parts.train,
        step=parts.step,
        valid=parts.valid,
        eval_step=parts.eval_step if parts.valid else None,
        track=track,
        learning_rate=per_epoch(training.learning_rates),
        max_epochs=epoch,  # and no patience: the recorded run went that far, whatever its options were then
        patience_delta=training.patience_delta,
    )
    problems: list[str] = []
    for state, report in epochs:
        recorded, digest = reports[report.epoch], state_digest(state)
        metrics = report_differences(recorded, report, _LABELS)
        if report.epoch == epoch:
            return [*problems, *_state_problems(state, digest, recorded, after), *metrics]
        if not problems and (metrics or recorded.digest not in (None, digest)):
            problems.append(f"epoch {report.epoch}, on the way, is not as recorded either")
    raise AssertionError("the state to start from is before the epoch")


def _state_problems(state: TrainState, digest: str, recorded: EpochReport, after: Checkpoint | None) -> list[str]:
    """The first leaf that differs, where it is known, and the digests."""
    problems = []
    if after is not None and after.digest != digest:
        problems += _first_leaf(state_leaves(after.state), state_leaves(state), after.name)
        labels = (f"in checkpoint {after.name}", "replayed")
        problems += differences(state_numbers(after.state), state_numbers(state), labels)
    if recorded.digest not in (None, digest):
        problems.append(f"digest of the state: {recorded.digest} recorded, {digest} replayed")
        if after is None:
            problems.append(f"which leaf differs is not known, for there is no valid checkpoint {recorded.epoch}")
    if after is not None and recorded.digest not in (None, after.digest):
        problems.append(f"digest of checkpoint {after.name}: {recorded.digest} recorded, {after.digest} found")
    return problems


def _first_leaf(stored: Mapping[str, Tensor], replayed: Mapping[str, Tensor], name: str) -> list[str]:
    table = [{"name": leaf, "shape": list(tensor.shape), "dtype": str(tensor.dtype)} for leaf, tensor in stored.items()]
    if lines := leaf_differences(table, replayed):
        return lines
    found = {leaf: bit_difference(stored[leaf], tensor) for leaf, tensor in replayed.items()}
    differing = [(leaf, difference) for leaf, difference in found.items() if difference is not None]
    if not differing:
        return []
    leaf, one = differing[0]
    return [
        f"first leaf that differs: {leaf}, {one.num_different} of {one.num_values} values, by {one.largest:.3g} "
        f"at most; the first at {list(one.first)}: {one.values[0]} in checkpoint {name}, {one.values[1]} replayed, "
        f"{one.ulps} ulp apart ({len(differing)} of {len(found)} leaves differ)"
    ]


def _data_problems(latest: Checkpoint, hdf5_file: str) -> list[str]:
    if not latest.data:
        return []
    if not Path(hdf5_file).is_file():
        raise FileNotFoundError(f"No dataset {hdf5_file}. If it has moved, say where it is (--hdf5-file).")
    found = fingerprint(hdf5_file)
    recorded = {name: latest.data[name] for name in ("size", "sha256") if name in latest.data}
    lines = differences(recorded, {name: found[name] for name in recorded}, ("recorded", "now"))
    return [f"data file {hdf5_file}: {text}" for text in lines]


@contextmanager
def _num_threads(recorded: Any, *, default: int) -> Iterator[None]:
    before = torch.get_num_threads()
    known = isinstance(recorded, int) and 1 <= recorded <= 1 << 12
    torch.set_num_threads(recorded if known else default)
    try:
        yield
    finally:
        torch.set_num_threads(before)
