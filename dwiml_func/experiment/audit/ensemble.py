"""An audit of an ensemble: its members' records, and its epochs trained again by the step that trains all at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dwiml_func.checkpoint.checkpoint import Checkpoint, newest, read
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.checkpoint.index import list_checkpoints, position_of
from dwiml_func.checkpoint.manifest import CorruptError
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.data.processes import in_processes
from dwiml_func.ensemble.loop import EnsembleReport, train_and_validate_ensemble
from dwiml_func.ensemble.state import EnsembleState, member, stack_states
from dwiml_func.experiment.audit.audit import Audit, Replayed, Span, replayed, sample_epochs, spans, summed_up
from dwiml_func.experiment.audit.consistency import best_model_problems, record_digest, record_problems
from dwiml_func.experiment.audit.replay import (
    NothingLeft,
    checkpoint_after,
    environment_changes,
    recorded_threads,
    start_problems,
    state_problems,
)
from dwiml_func.experiment.audit.verify import data_problems
from dwiml_func.experiment.comparison.compare import differences, differing, report_differences
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.ensemble_run import loop_arguments, prepare_ensemble
from dwiml_func.experiment.folder import member_folders, read_config, read_ended
from dwiml_func.experiment.resume import with_new_options
from dwiml_func.experiment.setup import RunParts
from dwiml_func.experiment.tracking.lag_validation import without_window_lag
from dwiml_func.experiment.training_config import WINDOW_LAG
from dwiml_func.files.fingerprint import content

__all__ = ["audit_ensemble"]

_OWN = {"learning_rate", "weight_decay", "rng", "data_rng", "max_epochs", "patience"}
"""Options in which members may differ, also because one was resumed by itself."""

_LABELS = ("recorded", "replayed")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """What was recorded of a member: its reports by epoch, and where it stopped, in epochs and batches, or None."""

    folder: Path
    config: RunConfig
    latest: Checkpoint | None
    reports: Mapping[int, EpochReport]
    ended: tuple[int, int] | None

    def trains_in(self, epoch: int) -> bool:
        """Whether the member took steps in an epoch, counted from 1."""
        return epoch in self.reports or (self.ended is not None and self.ended[0] == epoch - 1 and self.ended[1] > 0)


def audit_ensemble(
    directory: str | Path, *, sample: int | None = None, num_processes: int = 1, hdf5_file: str | None = None
) -> Audit:
    """Check the records of an ensemble's members, and train all its epochs again, or a random sample of them.

    As `audit_experiment`, for all members at once. Epochs that one member trained by itself, after the others had
    ended, are left out.
    """
    directory = Path(directory)
    members = _read_members(directory, hdf5_file)
    recorded = tuple(sorted({epoch for each in members for epoch in each.reports}))
    if not recorded:
        raise ValueError(f"{directory} has no recorded epoch yet. Expected at least one.")
    problems, links = [], hashlib.sha256()
    for each in members:
        if each.latest is None:
            problems += _of(each, ["there is no checkpoint"])
            continue
        links.update(record_digest(each.latest).encode())
        problems += _of(each, record_problems(each.folder, each.latest, read_config(each.folder)))
        problems += _of(each, best_model_problems(each.folder, each.latest, each.config))
        problems += data_problems(each.latest, each.config.hdf5_file)
    problems += _other_than_first(members)
    alone = [epoch for epoch in recorded if _trains_alone(members, epoch)]
    left_out = [f"epoch {epoch}: member {_only(members, epoch)} trained by itself there." for epoch in alone]
    shared = tuple(epoch for epoch in recorded if epoch not in alone)
    epochs = shared if sample is None else sample_epochs(shared, sample)
    chosen = spans(_ends(members), shared, epochs)
    found = in_processes(_replays, (directory, hdf5_file), chosen, num_processes)
    return summed_up(found, recorded, len(epochs), chosen, problems, left_out, links.hexdigest())


def _replays(directory: Path, hdf5_file: str | None, chosen: Sequence[Span]) -> Iterator[tuple[Span, Replayed]]:
    """Replay spans, one after the other; of one process of several, too."""
    members = _read_members(directory, hdf5_file)
    recorded = next(each.latest.environment for each in members if each.latest is not None)
    with recorded_threads(recorded, default=members[0].config.training.num_threads):
        is_measured = any(WINDOW_LAG in report.valid for each in members for report in each.reports.values())
        configs = [each.config if is_measured else without_window_lag(each.config) for each in members]
        parts = prepare_ensemble(configs)  # earlier versions recorded no window lag
        for span in chosen:
            yield span, replayed(span, partial(_replay, members, parts, recorded, span))


def _read_members(directory: Path, hdf5_file: str | None) -> list[_Member]:
    """What the members recorded, in the order of their numbers."""
    _, ended = read_ended(directory)
    found = []
    for number, folder in enumerate(member_folders(directory)):
        latest = newest(folder)
        reports = {report.epoch: report for report in latest.history if not report.batch} if latest else {}
        stopped = position_of(ended[number]) if ended.get(number) else None
        config = with_new_options(read_config(folder), hdf5_file=hdf5_file)
        found.append(_Member(folder=folder, config=config, latest=latest, reports=reports, ended=stopped))
    return found


def _other_than_first(members: Sequence[_Member]) -> list[str]:
    """Where members differ in options or data that they share: the replay takes those of the first."""
    first, problems = members[0], []
    for each in members[1:]:
        pairs = differing(each.config.to_dict(), first.config.to_dict())
        texts = [f"{name}: {own}, of the first {other}" for name, (own, other) in pairs.items() if _is_shared(name)]
        if each.latest is not None and first.latest is not None:
            labels = ("recorded", "by the first")
            texts += differences(content(each.latest.data), content(first.latest.data), labels)
        problems += _of(each, texts)
    return problems


def _is_shared(name: str) -> bool:
    part, _, option = name.partition(".")
    return name != "hdf5_file" and part not in ("checkpoints", "logging") and option not in _OWN


def _trains_alone(members: Sequence[_Member], epoch: int) -> bool:
    """Whether a member was resumed as a single run, which is evaluated at its end, before this epoch."""
    only = _only(members, epoch)
    return only is not None and len(members) > 1 and (members[only].folder / "evaluation.json").is_file()


def _only(members: Sequence[_Member], epoch: int) -> int | None:
    """The number of the only member that trained in an epoch."""
    numbers = [number for number, each in enumerate(members) if each.trains_in(epoch)]
    return numbers[0] if len(numbers) == 1 else None


def _ends(members: Sequence[_Member]) -> set[int]:
    """The epochs after which all members that continued have a checkpoint."""
    names = [{int(name) for name in list_checkpoints(each.folder) if "-" not in name} for each in members]
    return {
        end
        for end in set().union(*names)
        if all(end in own or not each.trains_in(end + 1) for each, own in zip(members, names, strict=True))
    }


def _replay(
    members: Sequence[_Member], parts: Sequence[RunParts], environment: Mapping[str, Any], span: Span
) -> tuple[list[str], tuple[str, ...]]:
    """What differs when a span is trained again; NothingLeft where a checkpoint from its start on is corrupt."""
    states, problems = [], []
    for each, own in zip(members, parts, strict=True):
        state, start = _start(each, own, span.first)
        states.append(state)
        if start is not None:
            problems += _of(each, start_problems(state, start, each.reports))
    context = environment_changes(environment, states[0])
    arguments = loop_arguments(parts, next(iter(states[0].params.values())).device)
    ensemble = stack_states(states, active=[each.trains_in(span.first) for each in members])
    for epoch in range(span.first, span.last + 1):
        active = ensemble.active.new_tensor([each.trains_in(epoch) for each in members])
        arguments |= {"max_epochs": epoch, "patience": None}  # the recorded run went that far
        *_, (ensemble, report) = train_and_validate_ensemble(ensemble.replace(active=active), **arguments)
        for number, each in enumerate(members):
            if each.trains_in(epoch):
                found = _member_problems(each, ensemble, number, epoch, report)
                problems += _of(each, [f"epoch {epoch}: {text}" for text in found])
    return problems, context


def _start(each: _Member, parts: RunParts, first: int) -> tuple[TrainState, str | None]:
    """A member's state before an epoch: that after the epoch before, or its last one where it had stopped."""
    like = parts.first_state()
    if first == 1:
        return like, None
    name = str(first - 1)
    if name not in list_checkpoints(each.folder):
        if each.trains_in(first) or each.latest is None:
            raise NothingLeft(f"{each.folder} has no checkpoint {name}.")
        name = each.latest.name
    try:
        return read(each.folder, name, like=like).state, name
    except CorruptError as error:
        raise NothingLeft(str(error)) from None


def _member_problems(
    each: _Member, ensemble: EnsembleState, number: int, epoch: int, report: EnsembleReport
) -> list[str]:
    """How a member's epoch differs from what was recorded."""
    if epoch not in each.reports:
        has_stopped = each.latest is not None and each.latest.history[-1:] and each.latest.history[-1].stop is not None
        text = "the member has failed as recorded, and not when trained again"
        return [] if number in report.failed or has_stopped else [text]
    if number in report.failed:
        return [f"the member failed when trained again: {report.failed[number]}"]
    state, recorded = member(ensemble, number), each.reports[epoch]
    after, _ = checkpoint_after(each.folder, epoch, each.reports, is_read=False)
    found = state_problems(state, state_digest(state), recorded, after)
    return [*found, *report_differences(recorded, report.members[number], _LABELS)]


def _of(each: _Member, texts: Sequence[str]) -> list[str]:
    return [f"member {each.folder.name}, {text}" for text in texts]
