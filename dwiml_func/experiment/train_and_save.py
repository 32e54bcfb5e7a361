"""The loop that trains and saves: checkpoints when they are due, and before an error or a signal ends the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dwiml_func.checkpoint.index import checkpoint_name
from dwiml_func.core.interval import Interval
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.run_epoch import Interrupted
from dwiml_func.distributed.process_group import ProcessLostError
from dwiml_func.experiment.signals import StopRequest, TrainingStopped
from dwiml_func.types import Metrics

__all__ = ["train_and_save"]

Report = TypeVar("Report")


def train_and_save(
    loop: Callable[..., Iterator[tuple[Any, Report]]],
    state: Any,
    *,
    save: Callable[[Any, tuple[Report, ...]], None],
    must_save: Callable[[Report], bool],
    interval: Interval,
    on_batch: Sequence[Callable[[Any, Metrics], object]] = (),
    on_report: Callable[[Any, Report], object] | None = None,
    stop: StopRequest,
    directory: Path,
) -> Iterator[Report]:
    """Run a training loop from `state` and yield its reports; save when the interval, a report or a stop request asks.

    `loop(state, on_batch=..., interrupt=...)` is `train_and_validate` or `train_and_validate_ensemble`. `save(state,
    reports)` gets the reports since the last save. After a stop request the last state is saved, also when another
    error ends the loop, and `TrainingStopped` is raised. Any other error but that of a step that was not finite, such
    as one in the validation, costs no batch that was trained either.
    """
    saves = _Saves(save, newest=checkpoint_name(state) if state.epoch or state.batch else None)

    def after_batch(state: Any, metrics: Metrics) -> None:
        saves.unsaved = state
        for call in on_batch:
            call(state, metrics)
        if interval.due_within_epoch(batch=state.batch, seconds=time.monotonic() - saves.saved_at):
            saves.save(state)

    try:
        for done, report in loop(state, on_batch=after_batch, interrupt=stop.agreed):
            saves.unsaved, saves.reports = done, (*saves.reports, report)
            if on_report is not None:  # before a save: a resume does not repeat it
                on_report(done, report)
            if interval.due_after_epoch(done.epoch) or must_save(report):
                saves.save(done)
            yield report
    except ProcessLostError:
        raise  # the signal may be torchrun's, which stops the others when one process has ended
    except Exception as error:
        if stop.signal is None:
            if not isinstance(error, NonFiniteError):
                saves.save_despite(error)
            raise
        failure = None if isinstance(error, Interrupted) else error
        try:
            saves.save_rest()
        except NonFiniteError as not_finite:  # the checkpoint before is the last one to resume from
            failure = not_finite
        raise TrainingStopped(stop.signal, directory, saves.newest, error=failure) from failure


@dataclass(slots=True)
class _Saves:
    """What is saved and what is not: the newest checkpoint's name, the last state, the reports since the last save."""

    function: Callable[[Any, tuple[Any, ...]], None]
    newest: str | None
    unsaved: Any = None
    reports: tuple[Any, ...] = ()
    saved_at: float = field(default_factory=time.monotonic)

    def save(self, state: Any) -> None:
        """Save a state, which is the last one."""
        self.function(state, self.reports)
        self.newest, self.unsaved, self.reports, self.saved_at = checkpoint_name(state), None, (), time.monotonic()

    def save_rest(self) -> None:
        """Save the last state, if it is not saved."""
        if self.unsaved is not None:
            self.save(self.unsaved)

    def save_despite(self, error: Exception) -> None:
        """Save the last state after an error; where that fails, the error says so."""
        try:
            self.save_rest()
        except Exception as failure:  # a step that failed may have reused the state's memory
            if type(failure) is not type(error):  # else it was a save that failed, and the disk fails again
                error.add_note(f"The state before the error could not be saved: {failure}")
