"""Training a recorded epoch again with given functions, and comparing it bitwise. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dwiml_func.checkpoint.checkpoint import Checkpoint, newest, read
from dwiml_func.checkpoint.digest import state_digest, state_leaves, state_numbers
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.manifest import CorruptError
from dwiml_func.checkpoint.provenance import environment_differences, environment_of
from dwiml_func.core.batch_source import Batches
from dwiml_func.core.early_stopping import Mode
from dwiml_func.core.epoch import EvalStep
from dwiml_func.core.loop import train_and_validate
from dwiml_func.core.rates import Step
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.experiment.comparison.compare import differences, leaf_problems, report_differences, report_values
from dwiml_func.types import Schedule

if TYPE_CHECKING:
    from dwiml_func.experiment.config import Origin

__all__ = [
    "NothingLeft",
    "Verification",
    "checkpoint_after",
    "environment_changes",
    "recorded_run",
    "recorded_threads",
    "replay_problems",
    "replay_start",
    "start_problems",
    "state_problems",
    "verify",
]

_LABELS = ("recorded", "replayed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The result of a replay.

    Args:
        epoch: the epoch that was trained again; 1 is the first.
        is_replayed: whether it could be trained.
        start: name of the checkpoint from which the replay began; None for the first state.
        digest: the recorded one of the state after the epoch; None where no checkpoint was saved there.
        num_values: how many numbers of the report were compared.
        problems: a text for each thing that differs from what was recorded; empty where all is bitwise identical.
        context: a text for each difference of environment or config, which may be the cause.

    Example:
        >>> Verification(epoch=1, is_replayed=True, start=None, digest=None, num_values=9, problems=(), context=())
        Verification(epoch=1, is_replayed=True, start=None, digest=None, num_values=9, problems=(), context=())
    """

    epoch: int
    is_replayed: bool
    start: str | None
    digest: str | None
    num_values: int
    problems: tuple[str, ...]
    context: tuple[str, ...]


class NothingLeft(ValueError):
    """No checkpoint is left to replay an epoch from."""


def verify(
    directory: str | Path,
    *,
    train: Batches,
    step: Step,
    valid: Batches | None = None,
    eval_step: EvalStep | None = None,
    learning_rate: float | Schedule,
    monitor: str = "loss",
    mode: Mode = "min",
    validate_every: int | str = 1,
    patience_delta: float = 1e-6,
    epoch: int | None = None,
    first_state: TrainState | None = None,
) -> Verification:
    """Train a recorded epoch again with a script's own functions, from the checkpoint before it, and compare bitwise.

    Compared with what was recorded are the digest of the state, every metric, the digest of the state from which the
    replay begins, and the checkpoint after the epoch, where there is one. torch's number of threads is the recorded one
    meanwhile. Nothing is written.

    Args:
        directory: where the script saved its run with `save`.
        train, step, valid, eval_step, learning_rate, monitor, mode, validate_every, patience_delta: those of the
            script's `train_and_validate`.
        epoch: the epoch to train again; 1 is the first. None: the last whole one.
        first_state: the first state of the run, for an epoch without a checkpoint before it; the replay begins on its
            devices. None: on the CPU.

    Returns:
        What differs: nothing where `problems` is empty.

    Raises:
        ValueError: the epoch is not recorded, or nothing is left to replay it from.
        CheckpointError: every checkpoint is corrupt, or differs from `first_state`.

    Example:
        >>> import tempfile
        >>> from functools import partial
        >>> from dwiml_func import init_state, module_loss, save, sgd, train_step
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
        >>> options = {
        ...     "train": lambda key, epoch, start_batch: [torch.ones(4, 2)] * (3 - start_batch),
        ...     "step": partial(train_step, loss_fn=loss_fn, optimizer=sgd()),
        ...     "learning_rate": 0.1,
        ... }
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     history = ()
        ...     for state, report in train_and_validate(init_state(model, sgd(), seed=0), max_epochs=2, **options):
        ...         history = (*history, report)
        ...         _ = save(directory, state, history)
        ...     verify(directory, **options).problems
        ()
    """
    directory = Path(directory)
    latest, reports = recorded_run(directory)
    epoch = max(reports) if epoch is None else epoch
    after, problems = checkpoint_after(directory, epoch, reports)
    recorded = (after or latest).environment
    with recorded_threads(recorded, default=torch.get_num_threads()):
        state, start, corrupt = replay_start(directory, first_state, epoch)
        epochs = train_and_validate(
            state,
            train=train,
            step=step,
            valid=valid,
            eval_step=eval_step,
            learning_rate=learning_rate,
            monitor=monitor,
            mode=mode,
            validate_every=validate_every,
            max_epochs=epoch,  # without patience: the recorded run went that far
            patience_delta=patience_delta,
        )
        context = environment_changes(recorded, state)
        problems += [*corrupt, *start_problems(state, start, reports)]
        problems += replay_problems(epochs, reports, epoch, after)
    return Verification(
        epoch=epoch,
        is_replayed=True,
        start=start,
        digest=reports[epoch].digest,
        num_values=len(report_values(reports[epoch])),
        problems=tuple(dict.fromkeys(problems)),
        context=context,
    )


def recorded_run(directory: Path) -> tuple[Checkpoint, dict[int, EpochReport]]:
    """The newest checkpoint, and the reports of whole epochs by number; ValueError where there is none."""
    latest = newest(directory)
    reports = {report.epoch: report for report in latest.history if not report.batch} if latest else {}
    if latest is None or not reports:
        raise ValueError(f"{directory} has no recorded epoch yet. Expected at least one.")
    return latest, reports


def environment_changes(recorded: Mapping[str, Any], state: TrainState) -> tuple[str, ...]:
    """How what computes with this state differs from what was recorded: a text for each difference."""
    return tuple(f"environment: {text}" for text in environment_differences(recorded, environment_of(state)))


def checkpoint_after(
    directory: Path, epoch: int, reports: Mapping[int, EpochReport], *, is_read: bool = True
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint after the epoch, or what is wrong; ValueError for one that is not recorded.

    With `is_read` its tensors are read at once; without, when they are first used.
    """
    if epoch not in reports:
        raise ValueError(f"Epoch {epoch} of {directory} is not recorded. Expected one of 1 to {max(reports)}.")
    if str(epoch) not in list_checkpoints(directory):
        return None, []
    try:
        checkpoint = read(directory, str(epoch))
        if is_read:
            _ = checkpoint.state
    except CorruptError as error:
        return None, [str(error)]
    return checkpoint, []


def replay_start(
    directory: Path, first: TrainState | None, epoch: int, origin: Origin | None = None
) -> tuple[TrainState, str | None, list[str]]:
    """The newest valid state at the end of an epoch before this one, its checkpoint's name, and what is corrupt."""
    names = list_checkpoints(directory)
    candidates = [name for name in reversed(names) if "-" not in name and int(name) < epoch]
    if origin is not None and origin.checkpoint in names and origin.checkpoint not in candidates:
        candidates.append(origin.checkpoint)  # within an epoch
    corrupt = []
    for name in candidates:
        try:
            return read(directory, name, like=first).state, name, corrupt
        except CorruptError as error:
            corrupt.append(str(error))
    if origin is None and first is not None:
        return first, None, corrupt
    hint = (
        f"Expected checkpoint {origin.checkpoint}, where it was forked, or a later one."
        if origin is not None
        else "Give first_state, the first state of the run."
    )
    raise NothingLeft(f"{directory} has no valid checkpoint before epoch {epoch}. {hint}")


def start_problems(
    state: TrainState, start: str | None, reports: Mapping[int, EpochReport], origin: Origin | None = None
) -> list[str]:
    """How the start of the replay differs from what was recorded."""
    if origin is not None and start == origin.checkpoint:
        recorded = origin.start_digest
    else:
        recorded = reports[state.epoch].digest if state.epoch in reports and not state.batch else None
    found = state_digest(state)
    if recorded in (None, found):
        return []
    return [f"checkpoint {start}, where the replay began: digest {recorded} recorded, {found} found"]


def replay_problems(
    epochs: Iterable[tuple[TrainState, EpochReport]],
    reports: Mapping[int, EpochReport],
    epoch: int,
    after: Checkpoint | None,
) -> list[str]:
    """What differs from the recorded reports and the checkpoint after the epoch, when these epochs are trained."""
    problems: list[str] = []
    for state, report in epochs:
        if report.batch:
            continue
        recorded, digest = reports[report.epoch], state_digest(state)
        metrics = report_differences(recorded, report, _LABELS)
        if report.epoch == epoch:
            return [*problems, *state_problems(state, digest, recorded, after), *metrics]
        if not problems and (metrics or recorded.digest not in (None, digest)):
            problems.append(f"epoch {report.epoch}, replayed before, also differs")
    raise AssertionError("the state to start from is before the epoch")


def state_problems(state: TrainState, digest: str, recorded: EpochReport, after: Checkpoint | None) -> list[str]:
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


@contextmanager
def recorded_threads(environment: Mapping[str, Any], *, default: int) -> Iterator[None]:
    """Within the block, torch has the recorded number of threads."""
    recorded, before = environment.get("num_threads"), torch.get_num_threads()
    torch.set_num_threads(recorded if isinstance(recorded, int) and 1 <= recorded <= 1 << 12 else default)
    try:
        yield
    finally:
        torch.set_num_threads(before)
