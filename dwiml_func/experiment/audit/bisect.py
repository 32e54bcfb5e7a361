"""The first place at which two runs differ, or a run and what it recorded, from checkpoints and by training again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dwiml_func.checkpoint.checkpoint import Checkpoint, read
from dwiml_func.checkpoint.digest import state_leaves
from dwiml_func.checkpoint.index import list_checkpoints, position_name, position_of
from dwiml_func.checkpoint.manifest import CorruptError
from dwiml_func.checkpoint.provenance import environment_differences
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.experiment.audit.lockstep import Difference, before_batch, first_difference, tensor_differences
from dwiml_func.experiment.audit.replay import environment_changes, recorded_run, recorded_threads, replay_problems
from dwiml_func.experiment.audit.verify import train_epochs
from dwiml_func.experiment.comparison.compare import differences, leaf_problems, report_differences
from dwiml_func.experiment.folder import is_ensemble, read_config
from dwiml_func.experiment.setup import RunParts, prepare

__all__ = ["Bisection", "bisect_record", "bisect_runs"]

Position = tuple[int, int]
"""Epochs done, and batches done in the current one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisection:
    """What a bisection found.

    The recorded states agree up to `equal` (None: nowhere) and differ from `different` on (None: they never do).
    `start` is the checkpoint from which both were trained again. `found` is where the replays first differ; where they
    do not differ, `unlike` names the runs of which this machine computes something else than was recorded. `lines`
    say more.
    """

    equal: Position | None
    different: Position | None
    start: str | None = None
    found: Difference | None = None
    unlike: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()


def bisect_runs(a: str | Path, b: str | Path) -> Bisection:
    """Find the first epoch, batch, tensor and operation in which two runs differ. Nothing is written.

    Their records tell between which checkpoints it is. From there both are trained again, batch by batch, with one
    number of threads, that of A.

    ValueError where a run has no recorded epoch, or nothing is left to train from.
    """
    directories = (Path(a), Path(b))
    latest, reports = zip(*map(_recorded_run, directories), strict=True)
    digests = [_recorded_digests(directory, run) for directory, run in zip(directories, latest, strict=True)]
    common = sorted(digests[0].keys() & digests[1].keys())
    other_metrics = [
        (epoch, 0) for epoch in reports[0].keys() & reports[1].keys()
        if report_differences(reports[0][epoch], reports[1][epoch])
    ]  # fmt: skip
    different = min([at for at in common if digests[0][at] != digests[1][at]] + other_metrics, default=None)
    equal = max((at for at in common if different is None or at < different), default=None)
    if different is None:
        return Bisection(equal=equal, different=None)
    context = tuple(f"config: {text}" for text in differences(latest[0].config, latest[1].config))
    context += tuple(f"environment: {text}" for text in environment_differences(*(run.environment for run in latest)))
    threads = recorded_threads(latest[0].environment, default=1)
    with threads:
        both = tuple(prepare(read_config(directory)) for directory in directories)
        firsts = tuple(part.first_state() for part in both)
        starts, name = _common_start(directories, firsts, equal)
        if starts is None:
            lines = tensor_differences(state_leaves(firsts[0]), state_leaves(firsts[1]))
            if firsts[0].key != firsts[1].key:
                lines.insert(0, f"seed: {firsts[0].key.seed} in A, {firsts[1].key.seed} in B")
            if lines:
                found = Difference(0, None, (), tuple(lines))
                return Bisection(equal=None, different=different, found=found, lines=context)
            starts = (firsts[0], firsts[1])
        last_epoch = different[0] + (different[1] > 0)
        result = first_difference(starts, (both[0], both[1]), last_epoch)
        if isinstance(result, Difference):
            return Bisection(equal=equal, different=different, start=name, found=result, lines=context)
        unlike = tuple(
            label
            for label, recorded, digest in zip("AB", digests, result, strict=True)
            if recorded.get((last_epoch, 0)) not in (None, digest)
        )
    return Bisection(equal=equal, different=different, start=name, unlike=unlike, lines=context)


def bisect_record(directory: str | Path) -> tuple[list[str], int]:
    """Find the first epoch, and tensor, in which this machine computes something else than a run has recorded.

    The run is trained again from each of its checkpoints to the next one. Returns a text for each thing that differs
    there, and how many epochs were trained again. ValueError where no epoch is recorded.
    """
    directory = Path(directory)
    (latest, reports), config = _recorded_run(directory), read_config(directory)
    with recorded_threads(latest.environment, default=config.training.num_threads):
        parts = prepare(config)
        first, like = parts.first_state(), parts.first_state()  # a training reuses the first one's memory
        context = environment_changes(latest.environment, first)
        kept = [read(directory, name, like=like) for name in list_checkpoints(directory) if name not in latest.corrupt]
        start = kept.pop(0).state if config.origin is not None or position_of(kept[0].name) == (0, 0) else first
        num_before = start.epoch
        for checkpoint in kept:
            problems = _piece_problems(start, checkpoint, parts, reports)
            if problems:
                since = position_name(start.epoch, start.batch) if start.step else "the first state"
                head = f"{directory}: from {since} to {checkpoint.name}, this machine computes something else:"
                return [head, *(f"  {text}" for text in (*problems, *context))], 0
            start = checkpoint.state
    return [], start.epoch - num_before


def _piece_problems(
    start: TrainState, checkpoint: Checkpoint, parts: RunParts, reports: Mapping[int, EpochReport]
) -> list[str]:
    """What differs from a checkpoint and the reports up to it when a run is trained again from a state before it."""
    epoch, batch = position_of(checkpoint.name)
    if not batch:
        return replay_problems(train_epochs(start, parts, None, epoch), reports, epoch, checkpoint)
    reached = before_batch(start, parts, epoch + 1, batch + 1)
    if reached is None:  # the epoch ends with this batch, and the next checkpoint tells
        return []
    return leaf_problems(state_leaves(checkpoint.state), state_leaves(reached.state), checkpoint.name)


def _recorded_run(directory: Path) -> tuple[Checkpoint, dict[int, EpochReport]]:
    if is_ensemble(directory) or is_ensemble(directory.parent):
        where = directory if is_ensemble(directory) else directory.parent
        raise ValueError(
            f"Expected a single run. Received: {directory}, of an ensemble, whose step trains all members at once. "
            f"Compare members with dwiml-func diff. Audit the ensemble: dwiml-func verify {where} --all"
        )
    return recorded_run(directory)


def _recorded_digests(directory: Path, latest: Checkpoint) -> dict[Position, str]:
    """The digests of a run's states, as its history and its checkpoints within epochs record them."""
    found = {(report.epoch, 0): report.digest for report in latest.history if report.digest and not report.batch}
    for name in list_checkpoints(directory):
        if name not in latest.corrupt and position_of(name)[1]:
            found[position_of(name)] = read(directory, name).digest
    return found


def _common_start(
    directories: tuple[Path, Path], firsts: tuple[TrainState, ...], equal: Position | None
) -> tuple[tuple[TrainState, TrainState] | None, str | None]:
    """The newest state at or before `equal` that either run has kept, for both, and its checkpoint's name."""
    names = [set(list_checkpoints(directory)) for directory in directories]
    kept = {position_of(name) for name in names[0] | names[1]}
    for at in sorted((at for at in kept if equal is not None and at <= equal), reverse=True):
        name = position_name(*at)
        owners = [directories[number if name in names[number] else 1 - number] for number in (0, 1)]
        try:
            a, b = (read(owner, name, like=first).state for owner, first in zip(owners, firsts, strict=True))
        except CorruptError:
            continue
        return (a, b), name
    return None, None
