"""Training an ensemble in its directory: one step trains all members, and each is saved as an ordinary experiment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dwiml_func.checkpoint.checkpoint import read, write
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.checkpoint.history import fill_digests, one_an_epoch
from dwiml_func.checkpoint.index import checkpoint_name, list_checkpoints
from dwiml_func.checkpoint.manifest import CorruptError
from dwiml_func.checkpoint.retention import remove_old
from dwiml_func.core.checked_step import checked_step
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.ensemble.captured import capture_ensemble_step
from dwiml_func.ensemble.loop import EnsembleReport, train_and_validate_ensemble
from dwiml_func.ensemble.state import EnsembleState, member, member_sums, stack_states
from dwiml_func.ensemble.step import ensemble_eval_step, ensemble_step
from dwiml_func.experiment.batches import open_data
from dwiml_func.experiment.best_model import save_best_model
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import write_ended
from dwiml_func.experiment.logs import experiment_writer, write_parameters
from dwiml_func.experiment.optimizers import configured_optimizer
from dwiml_func.experiment.run import set_num_threads, train_and_save
from dwiml_func.experiment.run_files import HASH_PATIENCE, data_in_background
from dwiml_func.experiment.setup import MAX_GRAPHS, RunParts, check_monitored, make_parts
from dwiml_func.experiment.signals import StopRequest
from dwiml_func.experiment.tracking.lag_validation import with_window_lag
from dwiml_func.files.lock import same_folder
from dwiml_func.types import Metrics
from dwiml_func.writers.steps import step_scalars
from dwiml_func.writers.writer import StepWriter

__all__ = ["ended_members", "loop_arguments", "prepare_ensemble", "run_ensemble"]

Histories = Sequence[tuple[EpochReport, ...]]
"""The reports of each member's epochs so far."""


def prepare_ensemble(configs: Sequence[RunConfig]) -> list[RunParts]:
    """Make the parts of all members' runs, which share the data; ValueError for what an ensemble cannot do."""
    if configs[0].training.num_shards > 1:
        raise ValueError("An ensemble trains in one process. Expected --num-shards 1.")
    if configs[0].training.skip_batches:
        raise ValueError("An ensemble leaves no batch out. Expected no --skip-batches.")
    if configs[0].training.compile and not configs[0].training.captures:
        # Under vmap the recurrent layers are a loop over time steps: a graph for each length, minutes to compile.
        raise ValueError(
            "An ensemble is compiled on a GPU only, as CUDA graphs: torch.compile would make a graph for each length. "
            "Leave --compile out, or add --use-gpu."
        )
    data = open_data(configs[0])
    members = [make_parts(config, data, is_member=True) for config in configs]
    check_monitored(members[0], is_member=True)
    return members


def run_ensemble(
    directory: Path,
    members: Sequence[RunParts],
    arguments: Mapping[str, Any] | None = None,
    *,
    ensemble: EnsembleState | None = None,
    histories: Histories | None = None,
    stop: StopRequest | None = None,
) -> Iterator[EnsembleReport]:
    """Train all members from `ensemble`, by default their first states, and yield each epoch's report.

    `arguments` are those of the loop, by default `loop_arguments(members, device)`. Saves checkpoints, best models and
    logs of each member as `run_experiment` does for one. A member that has stopped is not saved again. A request in
    `stop` ends the run with `TrainingStopped`, after all members have been saved. Hold the locks of the ensemble and of
    its members.
    """
    if ensemble is None:
        ensemble = stack_states([parts.first_state() for parts in members])
    set_num_threads(members[0].config.training.num_threads)
    folders = [directory / str(number) for number in range(len(members))]
    writers = [experiment_writer(folder, parts.config) for folder, parts in zip(folders, members, strict=True)]
    log_every = members[0].config.logging.log_every
    if log_every is not None:  # before the histories, which may send what is in the logs of steps
        for log, step in zip(writers, ensemble.done[:, 0].tolist(), strict=True):
            log.write_scalars(step, {})
    for folder, parts, log, history in zip(folders, members, writers, histories or [()] * len(members), strict=True):
        write_parameters(folder, parts.config, nb_features=parts.nb_features, now=datetime.now())
        log(*history)
    all_reports = [list(history) for history in histories or [()] * len(members)]
    in_background = data_in_background(folders[0], members[0].data, members[0].config.hdf5_file)

    def save_members(ensemble: EnsembleState, reports: tuple[EnsembleReport, ...]) -> None:
        for check in checks:
            check()  # before anything is written
        has_ended = any(own.stop is not None for report in reports for own in report.members.values())
        data = partial(in_background, patience=None if has_ended else HASH_PATIENCE)
        states, active = [member(ensemble, number) for number in range(len(members))], ensemble.active.tolist()
        new = [[report.members[n] for report in reports if n in report.members] for n in range(len(members))]
        for number, (folder, state) in enumerate(zip(folders, states, strict=True)):
            all_reports[number] = list(one_an_epoch((*all_reports[number], *new[number])))
            # It may have been saved before a kill, ahead of others. The epoch's report has been made again since then.
            is_new = not _holds(folder, state, may_differ=active[number] or bool(new[number]))
            if state.batch == 0 and (is_new or active[number]):
                all_reports[number] = list(fill_digests(all_reports[number], (), state.epoch, state_digest(state)))
            if is_new:  # not by `save`, which refuses a state that is behind one of the folder's
                config = members[number].config.to_dict()
                write(folder, state, all_reports[number], config=config, data=data(), environment=None)
        # Only now, when all have this checkpoint, is anything removed, or written that may be ahead of an older one.
        for number, (folder, parts, state) in enumerate(zip(folders, members, states, strict=True)):
            if new[number] and new[number][-1].is_best:  # a best epoch is saved at once, so this is its state
                save_best_model(folder, state, parts)
            writers[number](*new[number])
            remove_old(folder, state, parts.config.checkpoints.keep)
        write_ended(directory, len(members), ended_members(states, active))

    with ExitStack() as stack:
        checks = [stack.enter_context(same_folder(folder)) for folder in (directory, *folders)]
        yield from train_and_save(
            partial(train_and_validate_ensemble, **(arguments or loop_arguments(members, ensemble.active.device))),
            ensemble,
            save=save_members,
            must_save=lambda report: (
                report.batch > 0
                or bool(report.failed)
                or any(own.is_best or own.stop is not None for own in report.members.values())
            ),
            interval=members[0].config.checkpoints.save_interval,
            on_batch=() if log_every is None else (partial(_log_step, members, writers, log_every),),
            on_report=None if log_every is None else partial(_log_validation, writers),
            stop=stop or StopRequest(),
            directory=directory,
        )
        in_background()  # also where nothing was saved


def _log_step(
    members: Sequence[RunParts], writers: Sequence[StepWriter], every: int, ensemble: EnsembleState, metrics: Metrics
) -> None:
    """`log_steps` for each member that trains."""
    if ensemble.step % every:
        return
    active, position = ensemble.active.tolist(), {"epoch": ensemble.epoch, "step": ensemble.step - 1}
    for number, own in enumerate(member_sums(metrics, len(ensemble))):
        if active[number]:
            schedule, plateau = members[number].config.training.schedule, ensemble.plateau[number]
            values = step_scalars(own, schedule, **position, plateau=plateau)
            writers[number].write_scalars(ensemble.step, values)


def _log_validation(writers: Sequence[StepWriter], ensemble: EnsembleState, report: EnsembleReport) -> None:
    """Log a validation within an epoch with the step before it, of each member, as `log_steps` does."""
    for number, own in report.members.items() if report.batch else ():
        writers[number].write_scalars(ensemble.step, {f"valid_{name}": mean for name, mean in own.valid.items()})


def loop_arguments(members: Sequence[RunParts], device: torch.device) -> dict[str, Any]:
    """The arguments of `train_and_validate_ensemble`; members may differ in learning rate, weight decay and seed."""
    first, options = members[0], [parts.config.training for parts in members]
    valid, evaluate = first.valid, partial(ensemble_eval_step, loss_fn=first.loss_fn, optimizer=first.optimizer)
    if valid is not None and not options[0].skip_window_lag:
        tracked: dict[str, Any] = {"dataset": first.data.validation, "model": first.model, "optimizer": first.optimizer}
        valid, evaluate = with_window_lag(valid, evaluate, config=first.config, **tracked)
    step = _make_step(first, [training.weight_decay for training in options], device)
    every = first.config.checkpoints.check_every
    return {
        **first.loop_options,
        "step": step if every is None else checked_step(step, every),
        "valid": valid,
        "eval_step": evaluate if valid else None,
        "learning_rate": [training.schedule for training in options],
        "max_epochs": options[0].max_epochs,
        "patience": options[0].patience,
    }


def _make_step(first: RunParts, decays: Sequence[float], device: torch.device) -> Any:
    """The training step, on a GPU with `compile` as CUDA graphs."""
    training = first.config.training
    options: dict[str, Any] = {"loss_fn": first.loss_fn, "clip_grad": training.step_clip_grad}
    if differ := len(set(decays)) > 1:
        options["optimizer"] = partial(configured_optimizer, training)
    else:
        options["optimizer"] = first.optimizer
    step: Any = partial(ensemble_step, **options)
    if training.captures:
        step = capture_ensemble_step(**options, max_graphs=MAX_GRAPHS)
    return step if not differ else partial(step, weight_decay=torch.tensor(decays, dtype=torch.float64, device=device))


def ended_members(states: Sequence[TrainState], active: Sequence[bool]) -> dict[int, str]:
    """The last checkpoints of members that have stopped, by number."""
    return {number: checkpoint_name(state) for number, state in enumerate(states) if not active[number]}


def _holds(folder: Path, state: TrainState, *, may_differ: bool) -> bool:
    """Whether a folder has the checkpoint of a state; where it `may_differ`, digests are compared too."""
    if checkpoint_name(state) not in list_checkpoints(folder):
        return False
    try:
        return not may_differ or read(folder, checkpoint_name(state)).digest == state_digest(state)
    except CorruptError:
        return False
