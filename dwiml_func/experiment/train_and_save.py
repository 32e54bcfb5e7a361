"""The loop that trains and saves: checkpoints when they are due, and before an error or a signal ends the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
    newest = checkpoint_name(state) if state.epoch or state.batch else None
    unsaved, reports, saved_at = None, (), time.monotonic()

    def save_now(state: Any) -> None:
        nonlocal newest, unsaved, reports, saved_at
        save(state, reports)
        newest, unsaved, reports, saved_at = checkpoint_name(state), None, (), time.monotonic()

    def after_batch(state: Any, metrics: Metrics) -> None:
        nonlocal unsaved
        unsaved = state
        for call in on_batch:
            call(state, metrics)
        if interval.due_within_epoch(batch=state.batch, seconds=time.monotonic() - saved_at):
            save_now(state)

    try:
        for done, report in loop(state, on_batch=after_batch, interrupt=stop.agreed):
            unsaved, reports = done, (*reports, report)
            if on_report is not None:  # before a save: a resume does not repeat it
                on_report(done, report)
            if interval.due_after_epoch(done.epoch) or must_save(report):
                save_now(done)
            yield report
    except ProcessLostError:
        raise  # the signal may be torchrun's, which stops the others when one process has ended
    except Exception as error:
        if stop.signal is None:
            if unsaved is not None and not isinstance(error, NonFiniteError):
                _save_despite(error, partial(save_now, unsaved))
            raise
        failure = None if isinstance(error, Interrupted) else error
        if unsaved is not None:
            try:
                save_now(unsaved)
            except NonFiniteError as not_finite:  # the checkpoint before is the last one to resume from
                failure = not_finite
        raise TrainingStopped(stop.signal, directory, newest, error=failure) from failure


def _save_despite(error: Exception, save: Callable[[], None]) -> None:
    """Save the last state after an error; where that fails, the error says so."""
    try:
        save()
    except Exception as failure:  # a step that failed may have reused the state's memory
        if type(failure) is not type(error):  # else it was a save that failed, and the disk fails again
            error.add_note(f"The state before the error could not be saved: {failure}")
