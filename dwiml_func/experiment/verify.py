"""Training a recorded epoch again, and comparing it bit for bit. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dwiml_func.checkpoint.checkpoint import Checkpoint, newest, read, restore
from dwiml_func.checkpoint.digest import state_digest, state_leaves, state_numbers
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.manifest import CorruptError
from dwiml_func.checkpoint.provenance import environment, environment_differences
from dwiml_func.core.loop import Track, train_and_validate
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.experiment.compare import differences, leaf_problems, report_differences, report_values
from dwiml_func.experiment.config import Origin, RunConfig
from dwiml_func.experiment.folder import is_ensemble, read_config
from dwiml_func.experiment.setup import RunParts, prepare
from dwiml_func.experiment.window_lag import WINDOW_LAG, without_window_lag
from dwiml_func.files.fingerprint import content, fingerprint, linked_paths

__all__ = ["Verification", "verify_epoch"]

_LABELS = ("recorded", "replayed")
_MEMBER = "member of an ensemble: its common step is not bitwise identical to the step of a single run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The result of a replay.

    `start` is the checkpoint from which the replay began, None for the first state. `digest` is the recorded one of the
    state after the epoch, None where no checkpoint was due. `num_values` numbers of the report were compared.
    `problems` has a text for each thing that differs from what was recorded, `context` for each difference of
    environment or config, which may be the cause.
    """

    epoch: int
    is_replayed: bool
    start: str | None
    digest: str | None
    num_values: int
    problems: tuple[str, ...]
    context: tuple[str, ...]


def verify_epoch(
    directory: str | Path,
    *,
    epoch: int | None = None,
    hdf5_file: str | None = None,
    track: Track | None = None,
) -> Verification:
    """Train an epoch, by default the last one, again from the nearest checkpoint before it, and compare.

    Compared with what was recorded are the state's digest, every metric, the digest of the state from which the replay
    began, the checkpoint after the epoch, where there is one, and the data file. The config is that of `config.json`,
    the number of threads is the recorded one. `hdf5_file` is the path of a dataset that was moved.

    ValueError where the epoch is not recorded, or nothing is left to replay it from.
    """
    directory = Path(directory)
    config = read_config(directory)
    latest = newest(directory)
    if latest is None or not latest.history:
        raise ValueError(f"{directory} has no recorded epoch yet. Expected at least one.")
    reports = {report.epoch: report for report in latest.history}
    epoch = latest.history[-1].epoch if epoch is None else epoch
    if epoch not in reports:
        raise ValueError(f"Epoch {epoch} of {directory} is not recorded. Expected one of 1 to {max(reports)}.")
    _check_epochs_of_origin(config, epoch)
    replayed_config = replace(config, hdf5_file=str(Path(hdf5_file).absolute())) if hdf5_file is not None else config
    if WINDOW_LAG not in reports[epoch].valid:  # of an earlier version, or an ensemble's member
        replayed_config = without_window_lag(replayed_config)

    problems = list(latest.corrupt.values())
    after, corrupt = _checkpoint_after(directory, epoch)
    problems += [problem for problem in corrupt if problem not in problems]
    recorded_environment = (after or latest).environment
    changed_config = differences(latest.config, config.to_dict(), ("recorded", "in config.json"))
    data_problems = _data_problems(latest, replayed_config.hdf5_file)
    with _num_threads(recorded_environment.get("num_threads"), default=config.training.num_threads):
        # Without a replay, the device is the recorded one.
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
            if isinstance(error, _NothingLeft) or not (data_problems or changed_config or problems):
                raise
            problems.append(f"the replay failed: {error}")
        changes = environment_differences(recorded_environment, environment(devices))
    return Verification(
        epoch=epoch,
        is_replayed=is_replayed,
        start=start,
        digest=reports[epoch].digest,
        num_values=len(report_values(reports[epoch])),
        problems=(*problems, *data_problems),
        context=(
            *(f"environment: {text}" for text in changes),
            *(f"config: {text}" for text in changed_config),
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
            f"Epoch {epoch} was trained before this run was forked after epoch {forked}. "
            f"Verify it in {config.origin.experiment}."
        )


def _start(
    directory: Path, config: RunConfig, first: TrainState, epoch: int
) -> tuple[TrainState, str | None, list[str]]:
    """The newest valid state at the end of an epoch before this one, its checkpoint's name, and what is corrupt."""
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
        f"{directory} has no valid checkpoint before epoch {epoch}. "
        f"Expected checkpoint {config.origin.checkpoint}, where it was forked, or a later one."
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
        learning_rate=training.schedule,
        max_epochs=epoch,  # without patience: the recorded run went that far
        patience_delta=training.patience_delta,
    )
    problems: list[str] = []
    for state, report in epochs:
        recorded, digest = reports[report.epoch], state_digest(state)
        metrics = report_differences(recorded, report, _LABELS)
        if report.epoch == epoch:
            return [*problems, *_state_problems(state, digest, recorded, after), *metrics]
        if not problems and (metrics or recorded.digest not in (None, digest)):
            problems.append(f"epoch {report.epoch}, replayed before, also differs")
    raise AssertionError("the state to start from is before the epoch")


def _state_problems(state: TrainState, digest: str, recorded: EpochReport, after: Checkpoint | None) -> list[str]:
    """The first leaf that differs, where it is known, and the digests."""
    problems = []
    if after is not None and after.digest != digest:
        problems += leaf_problems(state_leaves(after.state), state_leaves(state), after.name)
        labels = (f"in checkpoint {after.name}", "replayed")
        problems += differences(state_numbers(after.state), state_numbers(state), labels)
    if recorded.digest not in (None, digest):
        problems.append(f"digest of the state: {recorded.digest} recorded, {digest} replayed")
        if after is None:
            problems.append(f"the leaf that differs is unknown: there is no valid checkpoint {recorded.epoch}")
    if after is not None and recorded.digest not in (None, after.digest):
        problems.append(f"digest of checkpoint {after.name}: {recorded.digest} recorded, {after.digest} found")
    return problems


def _data_problems(latest: Checkpoint, hdf5_file: str) -> list[str]:
    if not latest.data:
        return []
    if not Path(hdf5_file).is_file():
        raise FileNotFoundError(f"No dataset {hdf5_file}. If it was moved, give its path (--hdf5-file).")
    found = content(fingerprint(hdf5_file, linked_paths(latest.data, hdf5_file)))
    recorded = content(latest.data)
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
