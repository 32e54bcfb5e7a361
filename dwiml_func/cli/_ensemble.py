"""What `train` and `resume` share for ensembles: training with a line per member and epoch, and a summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dwiml_func.cli._messages import print_progress
from dwiml_func.cli._sweep import print_table
from dwiml_func.cli._training import describe_start
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.report import EpochReport
from dwiml_func.ensemble.loop import EnsembleReport
from dwiml_func.ensemble.state import EnsembleState
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.ensemble_resume import resume_ensemble
from dwiml_func.experiment.ensemble_run import prepare_ensemble, run_ensemble
from dwiml_func.experiment.folder import create_ensemble, read_ended
from dwiml_func.experiment.setup import RunParts
from dwiml_func.experiment.signals import stop_on_signals
from dwiml_func.files.lock import experiment_lock

__all__ = ["describe_members", "resume_members", "train_members"]


def train_members(
    experiments_path: str, experiment_name: str, configs: Sequence[RunConfig], deadline: float | None = None
) -> None:
    """Make an ensemble and train it, with a line per member and epoch."""
    members = [parts.as_new() for parts in prepare_ensemble(configs)]
    with experiment_lock(experiments_path, wait=True):
        directory = create_ensemble(experiments_path, experiment_name, [parts.config for parts in members])
    with _locks(directory, len(configs)):
        failed = _train(directory, members, None, [()] * len(configs), deadline)
    _summarize(directory, failed)


def resume_members(directory: Path, *, deadline: float | None = None, **options: Any) -> None:
    """Resume an ensemble; `options` are those of `resume_ensemble`."""
    num_members, _ = read_ended(directory)
    with _locks(directory, num_members):
        members, ensemble, histories = resume_ensemble(directory, **options)
        failed = _train(directory, members, ensemble, histories, deadline)
    _summarize(directory, failed)


def describe_members(directory: Path, configs: Sequence[RunConfig]) -> str:
    """The ensemble, and a line for each member with what it does not share."""
    lines = [f"{directory}: an ensemble of {len(configs)} members, each in its own folder"]
    for number, training in enumerate(config.training for config in configs):
        rate = " ".join(training.learning_rate)
        lines.append(f"  {number}: learning rate {rate}, weight decay {training.weight_decay:g}, rng {training.rng}")
    return "\n".join(lines)


@contextmanager
def _locks(directory: Path, num_members: int) -> Iterator[None]:
    with ExitStack() as stack:
        for path in (directory, *(directory / str(number) for number in range(num_members))):
            stack.enter_context(experiment_lock(path))
        yield


def _train(
    directory: Path,
    members: Sequence[RunParts],
    ensemble: EnsembleState | None,
    histories: Sequence[tuple[EpochReport, ...]],
    deadline: float | None,
) -> dict[int, str]:
    """Train, and return the errors of members that have failed."""
    print_progress(describe_members(directory, [parts.config for parts in members]))
    if ensemble is not None and any(histories):
        print_progress(describe_start(ensemble.epoch, ensemble.batch))
    failed: dict[int, str] = {}
    own = list(histories)
    max_epochs = members[0].config.training.max_epochs
    with stop_on_signals(deadline=deadline) as stop:
        for report in run_ensemble(directory, members, ensemble=ensemble, histories=histories, stop=stop):
            failed |= report.failed
            own = [
                (*history, report.members[number]) if number in report.members else history
                for number, history in enumerate(own)
            ]
            _print(report, max_epochs)
    if not any(own):
        raise NonFiniteError(next(iter(failed.values()), "No member was trained."))
    return failed


def _print(report: EnsembleReport, max_epochs: int) -> None:
    position = f"Epoch {report.epoch}/{max_epochs}" + (f", batch {report.batch}" if report.batch else "")
    for number, own in report.members.items():
        best = "  best" if own.is_best else ""
        valid = f"  validation loss {own.valid['loss']:.4f}" if own.valid else ""
        if own.monitor != "loss" and own.monitor in (means := own.valid or own.train):
            valid += f"  {own.monitor} {means[own.monitor]:.4f}"
        stop = "  stopped early" if own.stop == "patience" else ""
        print_progress(f"{position}  {number}: training loss {own.train['loss']:.4f}{valid}{best}{stop}")
    for number, text in report.failed.items():
        print_progress(f"{position}  {number}: {text}")


def _summarize(directory: Path, failed: dict[int, str]) -> None:
    """Print a table, when no lock makes the members look as if they were running."""
    print_table(directory, {str(number): text for number, text in failed.items()})
