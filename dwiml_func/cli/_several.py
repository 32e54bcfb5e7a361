"""What `train` and `resume` do with several models: sweeps, one after the other, and ensembles, all at once."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dwiml_func._checks import one_line, pluralize
from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.cli._messages import print_progress
from dwiml_func.cli._training import describe_start, new_run, print_graphs, train_with_progress
from dwiml_func.cli.runs import format_runs
from dwiml_func.core.early_stopping import should_stop
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.report import EpochReport
from dwiml_func.distributed.process_group import join_process_group
from dwiml_func.ensemble.loop import EnsembleReport
from dwiml_func.ensemble.state import EnsembleState, stack_states
from dwiml_func.experiment.comparison.compare import distinguishing
from dwiml_func.experiment.comparison.run_values import best_first
from dwiml_func.experiment.comparison.runs import list_runs
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.ensemble_resume import resume_ensemble
from dwiml_func.experiment.ensemble_run import loop_arguments, prepare_ensemble, run_ensemble
from dwiml_func.experiment.finish import is_whole
from dwiml_func.experiment.folder import check_new_experiment, create_ensemble, is_sweep, read_ended
from dwiml_func.experiment.resume import check_same_run
from dwiml_func.experiment.setup import RunParts, prepare
from dwiml_func.experiment.signals import stop_on_signals
from dwiml_func.experiment.sweep import write_sweep
from dwiml_func.files.lock import experiment_lock, is_locked, remove_left_lock

__all__ = [
    "check_sweep",
    "describe_members",
    "describe_sweep",
    "print_table",
    "resume_members",
    "train_members",
    "train_sweep",
]


def check_sweep(directory: Path, configs: Mapping[str, RunConfig]) -> None:
    """Raise ValueError where a directory holds something else than these experiments, or some of them."""
    if directory.exists() and not is_sweep(directory):
        check_new_experiment(directory.parent, directory.name)
    for name, config in configs.items():
        if (directory / name).exists():
            check_same_run(directory / name, config)


def describe_sweep(directory: Path, configs: Mapping[str, RunConfig]) -> None:
    """Print what a sweep would train: the configs as JSON, and on standard error the experiments."""
    print(json.dumps([config.to_dict() for config in configs.values()], indent=2))
    print(f"{directory}: a sweep of {pluralize(len(configs), 'experiment')}, one after the other", file=sys.stderr)
    for name, config in configs.items():
        print(f"  {name}: {_progress(directory / name, config)}", file=sys.stderr)


def train_sweep(
    directory: Path, configs: Mapping[str, RunConfig], sweep: Sequence[str], *, deadline: float | None = None
) -> int:
    """Train the experiments that have not ended, one after the other, and print a table of all. Returns the exit code.

    One that breaks off is named, and the others are trained. One that another process is training is passed over.
    """
    first = next(iter(configs.values()))
    failed: dict[str, str] = {}
    with join_process_group("cuda" if first.training.use_gpu else "cpu") as process_group:
        for config in configs.values():
            prepare(config, process_group)  # what is wrong with one of them shows before the first is trained
        if process_group.rank == 0:
            with experiment_lock(directory.parent, wait=True):
                write_sweep(directory, sweep)
        for number, (name, config) in enumerate(configs.items(), start=1):
            folder = directory / name
            is_done = process_group.rank == 0 and (is_locked(folder) or _has_ended(folder, config))
            progress = "running in another process" if is_locked(folder) else _progress(folder, config)
            print_progress(f"\n[{number}/{len(configs)}] {name}: {progress}")
            if any(process_group.gather(torch.tensor([int(is_done)]))):
                continue
            try:
                with new_run(directory, name, config, process_group) as start:
                    train_with_progress(folder, *start, deadline)
            except NonFiniteError as error:
                failed[name] = one_line(error)
                print_progress(f"{name}: {failed[name]} The sweep continues.")
        if process_group.rank == 0:
            print_table(directory, failed)
    return 1 if failed else 0


def print_table(directory: Path, failed: Mapping[str, str] | None = None) -> None:
    """Print the members of a sweep or an ensemble, the best first, with the options that they differ in."""
    runs, by = best_first(list_runs(directory))
    options = distinguishing([run.record.config for run in runs])[0] if runs else {}
    names = [name.rpartition(".")[2] for name in options]
    shown = [] if is_sweep(directory) else [name for name in names if name in ("learning_rate", "weight_decay", "rng")]
    print(f"\n{directory}, the best by {by} first:\n{format_runs(runs, shown=shown)}")
    for name, text in (failed or {}).items():
        print(f"{name} ended with an error: {text}")


def _progress(folder: Path, config: RunConfig) -> str:
    if not folder.exists():
        return "new"
    checkpoint = newest(folder)
    if checkpoint is None:
        return "begun"
    return "has ended" if _has_ended(folder, config) else f"to be resumed from checkpoint {checkpoint.name}"


def _has_ended(folder: Path, config: RunConfig) -> bool:
    """Whether an experiment has all its epochs, its evaluation and its figures."""
    checkpoint = newest(folder) if folder.exists() else None
    if checkpoint is None or not checkpoint.history or (last := checkpoint.history[-1]).batch:
        return False
    is_over = last.epoch >= config.training.max_epochs or should_stop(last.best, config.training.patience)
    return is_over and is_whole(folder)


def train_members(
    experiments_path: str, experiment_name: str, configs: Sequence[RunConfig], deadline: float | None = None
) -> None:
    """Make an ensemble and train it, with a line per member and epoch."""
    members = [parts.as_new() for parts in prepare_ensemble(configs)]
    with experiment_lock(experiments_path, wait=True):
        directory = create_ensemble(experiments_path, experiment_name, [parts.config for parts in members])
    with _locks(directory, len(configs)):
        failed = _train_at_once(directory, members, None, [()] * len(configs), deadline)
    print_table(directory, failed)  # when no lock makes the members look as if they were running


def resume_members(directory: Path, *, deadline: float | None = None, **options: Any) -> None:
    """Resume an ensemble; `options` are those of `resume_ensemble`."""
    num_members, _ = read_ended(directory)
    remove_left_lock(directory.parent)  # of a kill when the ensemble had just been made
    with _locks(directory, num_members):
        members, ensemble, histories = resume_ensemble(directory, **options)
        failed = _train_at_once(directory, members, ensemble, histories, deadline)
    print_table(directory, failed)  # when no lock makes the members look as if they were running


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


def _train_at_once(
    directory: Path,
    members: Sequence[RunParts],
    ensemble: EnsembleState | None,
    histories: Sequence[tuple[EpochReport, ...]],
    deadline: float | None,
) -> dict[str, str]:
    """Train, and return the errors of members that have failed."""
    print_progress(describe_members(directory, [parts.config for parts in members]))
    if ensemble is not None and (ensemble.epoch or ensemble.batch):
        print_progress(describe_start(ensemble.epoch, ensemble.batch))
    if ensemble is None:
        ensemble = stack_states([parts.first_state() for parts in members])
    arguments = loop_arguments(members, ensemble.active.device)
    failed: dict[int, str] = {}
    own = list(histories)
    max_epochs = members[0].config.training.max_epochs
    with stop_on_signals(deadline=deadline) as stop:
        run = run_ensemble(directory, members, arguments, ensemble=ensemble, histories=histories, stop=stop)
        for report in run:
            failed |= report.failed
            own = [
                (*history, report.members[number]) if number in report.members else history
                for number, history in enumerate(own)
            ]
            _print_epoch(report, max_epochs)
    step = inspect.unwrap(arguments["step"])
    print_graphs(step.func if isinstance(step, partial) else step)
    if not any(own):
        raise NonFiniteError(next(iter(failed.values()), "No member was trained."))
    return {str(number): text for number, text in failed.items()}


def _print_epoch(report: EnsembleReport, max_epochs: int) -> None:
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
