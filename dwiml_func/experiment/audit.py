"""An audit of a whole experiment: its record is checked, and its epochs are trained again."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.checkpoint.digest import state_leaves
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.provenance import environment, environment_differences
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.run_epoch import Track
from dwiml_func.experiment.audit_processes import in_processes
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.consistency import best_model_problems, record_digest, record_problems
from dwiml_func.experiment.folder import is_ensemble, read_config
from dwiml_func.experiment.replay import (
    NothingLeft,
    checkpoint_after,
    recorded_epochs,
    recorded_threads,
    replay_problems,
    replay_start,
    start_problems,
)
from dwiml_func.experiment.setup import RunParts, prepare
from dwiml_func.experiment.verify import data_problems, train_epochs
from dwiml_func.experiment.window_lag import WINDOW_LAG, without_window_lag

__all__ = ["Audit", "Replayed", "Span", "audit_experiment", "sample_epochs", "spans"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Epochs that are trained again in one go, `first` to `last`, from the checkpoint before them."""

    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The result of an audit.

    `recorded` are the epochs that the run itself has trained, `replayed` those that were trained again, `num_chosen` of
    them because they were asked for. `problems` has
    a text for each thing that differs; `left_out` says what could not be audited. `record` identifies the whole record.
    """

    recorded: tuple[int, ...]
    replayed: tuple[int, ...]
    num_chosen: int
    spans: tuple[Span, ...]
    problems: tuple[str, ...]
    context: tuple[str, ...]
    left_out: tuple[str, ...]
    record: str


def audit_experiment(
    directory: str | Path,
    *,
    sample: int | None = None,
    num_processes: int = 1,
    hdf5_file: str | None = None,
    track: Track | None = None,
) -> Audit:
    """Check the record of an experiment, and train all its epochs again, or a random sample of them.

    An epoch is trained from the nearest checkpoint before it, so epochs without a checkpoint between them are trained
    in one go. Nothing is written. ValueError where no epoch is recorded.
    """
    directory = Path(directory)
    config = read_config(directory)
    if is_ensemble(directory.parent):
        raise ValueError(
            f"{directory} is a member of an ensemble, whose step trains all members at once. Audit them together: "
            f"dwiml-func verify {directory.parent} --all"
        )
    latest = newest(directory)
    reports = recorded_epochs(directory, latest)
    assert latest is not None
    replayed_config = replace(config, hdf5_file=str(Path(hdf5_file).absolute())) if hdf5_file is not None else config
    first = 1 if config.origin is None else int(config.origin.checkpoint.partition("-")[0]) + 1
    recorded = tuple(epoch for epoch in sorted(reports) if epoch >= first)
    left_out = [f"epochs 1 to {first - 1}: trained before the fork. Audit {_origin(config)}."] if first > 1 else []
    if not recorded:
        raise ValueError(f"{directory} has trained no epoch of its own yet. Expected at least one. {left_out[0]}")

    problems = [
        *record_problems(directory, latest, config),
        *best_model_problems(directory, latest, config),
        *data_problems(latest, replayed_config.hdf5_file),
    ]
    epochs = recorded if sample is None else sample_epochs(recorded, sample)
    ends = {int(name) for name in list_checkpoints(directory) if "-" not in name}
    chosen = spans(ends, recorded, epochs)
    replayed: list[int] = []
    changes: dict[str, None] = {}
    for span, found in _replays(directory, replayed_config, chosen, num_processes, track):
        replayed += range(span.first, span.last + 1) if found.is_replayed else ()
        problems += found.problems
        changes |= dict.fromkeys(found.context)
        left_out += found.left_out
    return Audit(
        recorded=recorded,
        replayed=tuple(sorted(replayed)),
        num_chosen=len(epochs),
        spans=tuple(chosen),
        problems=tuple(dict.fromkeys(problems)),
        context=tuple(changes),
        left_out=tuple(left_out),
        record=record_digest(latest),
    )


def sample_epochs(recorded: Sequence[int], number: int) -> list[int]:
    """So many of the epochs, which nobody can foresee."""
    return sorted(random.SystemRandom().sample(recorded, min(number, len(recorded))))


def spans(ends: Collection[int], recorded: Collection[int], epochs: Collection[int]) -> list[Span]:
    """The spans that cover these of the recorded epochs, in order; a state is left after each epoch of `ends`."""
    first, found = min(recorded), {}
    for epoch in sorted(epochs):
        start = max((end + 1 for end in ends if first <= end + 1 <= epoch), default=first)
        found[start] = Span(first=start, last=epoch)  # a later epoch of the same span takes its place
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Replayed:
    """What the replay of a span found."""

    is_replayed: bool
    problems: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def _replays(
    directory: Path, config: RunConfig, chosen: Sequence[Span], num_processes: int, track: Track | None
) -> Iterator[tuple[Span, Replayed]]:
    """Replay the spans, in this process or in several, in any order."""
    if num_processes == 1 or len(chosen) < 2:
        parts = None
        for span in chosen:
            found, parts = _replay(directory, config, span, parts, track)
            yield span, found
        return
    alone = replace(config, batches=replace(config.batches, processes=0))  # a process of an audit loads by itself
    yield from in_processes(_replay_all, (directory, alone), chosen, min(num_processes, len(chosen)))


def _replay_all(directory: Path, config: RunConfig, chosen: Sequence[Span]) -> Iterator[tuple[Span, Replayed]]:
    """Of one process of several."""
    yield from _replays(directory, config, chosen, 1, None)


def _replay(
    directory: Path, config: RunConfig, span: Span, parts: RunParts | None, track: Track | None
) -> tuple[Replayed, RunParts | None]:
    """Train a span again; the parts of the run are made once and handed back."""
    label = f"epoch {span.last}" if span.first == span.last else f"epochs {span.first} to {span.last}"
    latest = newest(directory)
    reports = recorded_epochs(directory, latest)
    assert latest is not None
    after, _ = checkpoint_after(directory, span.last, reports)
    recorded = (after or latest).environment
    problems: list[str] = []
    with recorded_threads(recorded, default=config.training.num_threads):
        try:
            if parts is None:
                is_measured = WINDOW_LAG in reports[span.last].valid  # not by earlier versions
                parts = prepare(config if is_measured else without_window_lag(config))
            first = parts.first_state()
            devices = {str(leaf.device) for leaf in state_leaves(first).values()}
            changes = environment_differences(recorded, environment(devices))
            state, start, _ = replay_start(directory, first, span.first, config.origin)
            problems += start_problems(state, start, reports, config.origin)
            problems += replay_problems(train_epochs(state, parts, track, span.last), reports, span.last, after)
        except NothingLeft as error:
            return Replayed(False, left_out=(f"{label}: {error}",)), parts
        except (ValueError, NonFiniteError) as error:
            return Replayed(False, (f"{label}: the replay failed: {error}",)), parts
    texts = tuple(f"{label}: {problem}" for problem in problems)
    return Replayed(True, texts, tuple(f"environment: {text}" for text in changes)), parts


def _origin(config: RunConfig) -> str:
    return "" if config.origin is None else config.origin.experiment
