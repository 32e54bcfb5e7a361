"""Resuming an ensemble from the newest valid checkpoint that its members share."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dwiml_func.checkpoint.checkpoint import Checkpoint, newest, restore
from dwiml_func.checkpoint.index import list_checkpoints, names_after, position_name
from dwiml_func.checkpoint.manifest import CorruptError
from dwiml_func.core.early_stopping import should_stop
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.ensemble.state import EnsembleState, stack_states
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.ensemble_run import ended_members, prepare_ensemble
from dwiml_func.experiment.folder import check_no_links, read_config, read_ended, write_ended
from dwiml_func.experiment.record import check_same_config, check_same_data
from dwiml_func.experiment.resume import repair_experiment, set_aside, with_new_options, with_same_results
from dwiml_func.experiment.setup import RunParts
from dwiml_func.files.atomic import atomic_write, remove_leftovers

__all__ = ["resume_ensemble"]

_log = logging.getLogger(__name__)


def resume_ensemble(
    directory: Path,
    *,
    accept: Collection[str] = (),
    may_have_ended: bool = False,
    given: Sequence[RunConfig] | None = None,
    **new_options: Any,
) -> tuple[list[RunParts], EnsembleState, list[tuple[EpochReport, ...]]]:
    """Restore an ensemble from the newest valid checkpoint that all members that had not stopped have.

    `new_options` are those of `with_new_options`, for all members; one that has stopped early stays as it is. `given`
    has a config for each, as for `with_same_results`. Corrupt
    checkpoints are named and renamed, and what a crash left behind is repaired, as `resume_experiment` does. Returns
    the parts, the ensemble and the histories for `run_ensemble`. ValueError where something on disk does not fit, or,
    unless `may_have_ended`, no member has an epoch left to do.
    """
    num_members, ended = read_ended(directory)
    folders = [directory / str(number) for number in range(num_members)]
    for folder in (directory, *folders):
        check_no_links(folder)
    old_configs = [read_config(folder) for folder in folders]
    for folder, config in zip(folders, old_configs, strict=True):
        check_same_config(folder, config, newest(folder), accept=accept)
    pairs = zip(old_configs, given or [None] * num_members, strict=True)
    members = prepare_ensemble([with_new_options(with_same_results(*pair), **new_options) for pair in pairs])
    first_states = [parts.first_state() for parts in members]
    checkpoints, corrupt = _newest_of_all(folders, first_states, ended)
    if checkpoints is None:
        states, histories, active = first_states, [()] * num_members, [True] * num_members
    else:
        check_same_data(checkpoints[0], members[0].config)
        states = [checkpoint.state for checkpoint in checkpoints]
        histories = [checkpoint.history for checkpoint in checkpoints]
        active = [
            # patience may have ended a member, and a kill may have come before that was written
            ended.get(number) != checkpoint.name and not should_stop(checkpoint.state.best, config.training.patience)
            for number, (checkpoint, config) in enumerate(zip(checkpoints, old_configs, strict=True))
        ]
    ensemble = stack_states(states, active=active)
    for path in corrupt:
        _log.warning(
            "Checkpoint %s is corrupt. Resuming from checkpoint %s.",
            path,
            position_name(ensemble.epoch, ensemble.batch),
        )
        set_aside(path)
    remove_leftovers(directory)
    for folder, parts, state, history in zip(folders, members, states, histories, strict=True):
        repair_experiment(folder, parts, state, history)  # also after the last epoch: the crash may have come then
    write_ended(directory, num_members, ended_members(states, active))
    has_ended = not any(active) or ensemble.epoch >= members[0].config.training.max_epochs
    if has_ended and not may_have_ended:
        raise ValueError(
            f"No member of {directory} has an epoch left to do after epoch {ensemble.epoch}. Give --new-max-epochs "
            f"if one has not stopped early, or resume one by itself: dwiml-func resume {directory} 0"
        )
    for folder, config, parts in zip(folders, old_configs, members, strict=True):
        if parts.config != config:
            atomic_write(folder / "config.json", parts.config.to_json())
    return members, ensemble, histories


def _newest_of_all(
    folders: Sequence[Path], like: Sequence[TrainState], ended: Mapping[int, str]
) -> tuple[list[Checkpoint] | None, list[Path]]:
    """The newest valid checkpoint of all running members, the last ones of the others, and those found corrupt."""
    # None if there are none. Corrupt ones: among the last of the others and, of the running, from there on.
    names = [list_checkpoints(folder) for folder in folders]
    problems: dict[Path, str] = {}

    def valid(number: int, name: str) -> Checkpoint | None:
        try:
            return restore(folders[number], like[number], name=name)
        except CorruptError as error:
            problems[folders[number] / "checkpoint" / name] = str(error)
            return None

    last = {number: valid(number, name) for number, name in ended.items() if name in names[number]}
    running = [number for number in range(len(folders)) if last.get(number) is None]
    shared = set.intersection(*(set(names[number]) for number in running)) if running else {""}
    for name in [name for name in reversed(names[running[0]]) if name in shared] if running else [""]:
        found = last | {number: valid(number, name) for number in running}
        checkpoints = [checkpoint for _, checkpoint in sorted(found.items()) if checkpoint is not None]
        if len(checkpoints) == len(folders):
            for number in running:
                for later in names_after(names[number], checkpoints[number].state):
                    if folders[number] / "checkpoint" / later not in problems:
                        valid(number, later)  # it may have been saved ahead of the others
            return checkpoints, list(problems)
    if problems or max(map(len, names)) > 1 or all(names):  # otherwise the very first save was cut off
        raise CorruptError(
            f"The members in {folders[0].parent} have no valid checkpoint of the same epoch and batch. "
            f"Resume each by itself: dwiml-func resume {folders[0].parent} 0. {' '.join(problems.values())}".strip()
        )
    return None, []
