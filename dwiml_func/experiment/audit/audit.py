"""An audit of a whole experiment: what was recorded is checked, and its epochs are trained again."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dwiml_func.checkpoint.checkpoint import Checkpoint
from dwiml_func.checkpoint.index import list_checkpoints, position_of
from dwiml_func.core.loop_options import Track
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.data.processes import in_processes
from dwiml_func.experiment.audit.consistency import best_model_problems, record_digest, record_problems
from dwiml_func.experiment.audit.replay import (
    NothingLeft,
    checkpoint_after,
    environment_changes,
    recorded_run,
    recorded_threads,
    replay_problems,
    replay_start,
    start_problems,
)
from dwiml_func.experiment.audit.verify import data_problems, train_epochs
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import is_ensemble, read_config
from dwiml_func.experiment.resume import with_new_options
from dwiml_func.experiment.setup import RunParts, prepare
from dwiml_func.experiment.tracking.lag_validation import without_window_lag
from dwiml_func.experiment.training_config import WINDOW_LAG

__all__ = ["Audit", "Replayed", "Span", "audit_experiment", "replayed", "sample_epochs", "spans", "summed_up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Epochs that are trained again in one go, `first` to `last`, from the checkpoint before them."""

    first: int
    last: int

    def __str__(self) -> str:
        """As a problem names it."""
        return f"epoch {self.last}" if self.first == self.last else f"epochs {self.first} to {self.last}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The result of an audit.

    `recorded` are the epochs that the run itself has trained, `replayed` those that were trained again, `num_chosen` of
    them because they were asked for. `problems` has
    a text for each thing that differs; `left_out` says what could not be audited. `record` is the SHA-256 of the run.
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
    """Check what an experiment recorded, and train all its epochs again, or a random sample of them.

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
    latest, reports = recorded_run(directory)
    replayed_config = with_new_options(config, hdf5_file=hdf5_file)
    first, left_out = 1, []
    if config.origin is not None and (first := position_of(config.origin.checkpoint)[0] + 1) > 1:
        left_out = [f"epochs 1 to {first - 1}: trained before the fork. Audit {config.origin.experiment}."]
    recorded = tuple(epoch for epoch in sorted(reports) if epoch >= first)
    if not recorded:
        raise ValueError(f"{directory} has trained no epoch of its own yet. Expected at least one. {left_out[0]}")

    problems: list[str] = []

    def check_record() -> None:
        problems.extend(record_problems(directory, latest, config))
        problems.extend(best_model_problems(directory, latest, config))
        problems.extend(data_problems(latest, replayed_config.hdf5_file))

    epochs = recorded if sample is None else sample_epochs(recorded, sample)
    ends = {int(name) for name in list_checkpoints(directory) if "-" not in name}
    chosen = spans(ends, recorded, epochs)
    if min(num_processes, len(chosen)) > 1:  # a process of an audit loads by itself, and shows no bar
        replayed_config = replace(replayed_config, batches=replace(config.batches, processes=0))
        track = None
    found = in_processes(_replay_all, (directory, replayed_config, track), chosen, num_processes, check_record)
    return summed_up(found, recorded, len(epochs), chosen, problems, left_out, record_digest(latest))


def summed_up(
    found: Iterable[tuple[Span, Replayed]],
    recorded: tuple[int, ...],
    num_chosen: int,
    chosen: Sequence[Span],
    problems: list[str],
    left_out: list[str],
    record: str,
) -> Audit:
    """An audit, from what the replay of each span found; `problems` and `left_out` are those found before."""
    replayed: list[int] = []
    context: dict[str, None] = {}
    for span, result in found:
        replayed += range(span.first, span.last + 1) if result.is_replayed else ()
        problems += result.problems
        context |= dict.fromkeys(result.context)
        left_out += result.left_out
    return Audit(
        recorded=recorded,
        replayed=tuple(sorted(replayed)),
        num_chosen=num_chosen,
        spans=tuple(chosen),
        problems=tuple(dict.fromkeys(problems)),
        context=tuple(context),
        left_out=tuple(left_out),
        record=record,
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


def replayed(span: Span, replay: Callable[[], tuple[list[str], tuple[str, ...]]]) -> Replayed:
    """The result of `replay`, which returns what differs and how the environment does, or why there is none."""
    try:
        problems, context = replay()
    except NothingLeft as error:
        return Replayed(False, left_out=(f"{span}: {error}",))
    except (ValueError, NonFiniteError) as error:
        return Replayed(False, (f"{span}: the replay failed: {error}",))
    return Replayed(True, tuple(problems), context)


def _replay_all(
    directory: Path, config: RunConfig, track: Track | None, chosen: Sequence[Span]
) -> Iterator[tuple[Span, Replayed]]:
    """Replay spans one after the other, also as one process of several."""
    replay = _Replay(directory, config, track)
    for span in chosen:
        yield span, replay(span)


class _Replay:
    """Trains spans again. The parts of the run are made once, and a span may begin with the end of the one before."""

    def __init__(self, directory: Path, config: RunConfig, track: Track | None) -> None:
        self._latest, self._reports = recorded_run(directory)
        self._directory, self._config, self._track = directory, config, track
        self._parts: RunParts | None = None
        self._end: TrainState | None = None  # of a replay that was identical to the recorded one

    def __call__(self, span: Span) -> Replayed:
        after, _ = checkpoint_after(self._directory, span.last, self._reports, is_read=False)
        threads = recorded_threads((after or self._latest).environment, default=self._config.training.num_threads)
        with threads:
            result = replayed(span, partial(self._train, span, after))
        if result.problems or self._reports[span.last].digest is None:
            self._end = None
        return result

    def _train(self, span: Span, after: Checkpoint | None) -> tuple[list[str], tuple[str, ...]]:
        """Train a span again: what differs from what was recorded, and how the environment does."""
        reports, origin, problems = self._reports, self._config.origin, []
        parts = self._made(WINDOW_LAG in reports[span.last].valid)  # not by earlier versions
        state = self._start(span.first)
        if state is None:
            state, start, _ = replay_start(self._directory, parts.first_state(), span.first, origin)
            problems += start_problems(state, start, reports, origin)
        context = environment_changes((after or self._latest).environment, state)
        epochs = self._kept(train_epochs(state, parts, self._track, span.last))
        problems += replay_problems(epochs, reports, span.last, after)
        return [f"{span}: {problem}" for problem in problems], context

    def _made(self, is_measured: bool) -> RunParts:
        if self._parts is None:
            self._parts = prepare(self._config if is_measured else without_window_lag(self._config))
        return self._parts

    def _start(self, first: int) -> TrainState | None:
        """The end of the replay before, where it is the state before this epoch: the checkpoint has the same digest."""
        state, self._end = self._end, None
        return state if state is not None and (state.epoch, state.batch) == (first - 1, 0) else None

    def _kept(self, epochs: Iterator[tuple[TrainState, EpochReport]]) -> Iterator[tuple[TrainState, EpochReport]]:
        for state, report in epochs:
            self._end = state
            yield state, report
