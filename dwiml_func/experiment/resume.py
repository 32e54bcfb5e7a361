"""Resuming an experiment from its newest valid checkpoint."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dwiml_func._checks import at_most_three
from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.checkpoint.index import CHECKPOINTS, checkpoint_folder, list_checkpoints, names_after, position_name
from dwiml_func.checkpoint.retention import remove_old
from dwiml_func.core.early_stopping import should_stop
from dwiml_func.core.report import EpochReport
from dwiml_func.core.skip_batches import parse_batch
from dwiml_func.core.state import TrainState
from dwiml_func.distributed.sharding import SINGLE_PROCESS, ProcessGroup
from dwiml_func.experiment.best_model import repair_best_model
from dwiml_func.experiment.comparison.compare import differences
from dwiml_func.experiment.config import Origin, RunConfig
from dwiml_func.experiment.folder import check_new_experiment, check_no_links, is_ensemble, read_config, read_ended
from dwiml_func.experiment.record import check_same_config, check_same_data, warn_of_other_environment
from dwiml_func.experiment.setup import RunParts, prepare
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.files.atomic import atomic_write, remove_leftovers
from dwiml_func.writers.jsonl import jsonl
from dwiml_func.writers.npy import npy
from dwiml_func.writers.writer import fan_out

__all__ = [
    "check_has_epochs_left",
    "check_same_ensemble",
    "check_same_run",
    "repair_experiment",
    "resume_experiment",
    "set_aside",
    "with_new_options",
    "with_same_results",
]

_log = logging.getLogger(__name__)


def resume_experiment(
    directory: Path,
    *,
    process_group: ProcessGroup = SINGLE_PROCESS,
    may_have_ended: bool = False,
    accept: Collection[str] = (),
    given: RunConfig | None = None,
    **new_options: Any,
) -> tuple[RunParts, TrainState, tuple[EpochReport, ...]]:
    """Restore an experiment from its newest valid checkpoint, or from its first state where it has none.

    `new_options` are those of `with_new_options`, `accept` has names of options for `check_same_config`; `given` is as
    for `with_same_results`. Removes what a crash left behind, repairs best model and logs, and renames corrupt
    checkpoints to `checkpoint/<name>.corrupt`. Of several processes only the first writes; the others call this after
    it. Hold the experiment's lock.

    Returns the parts, the state and the history for `run_experiment`. ValueError where the run has ended and would end
    again at once (unless `may_have_ended`), or where the dataset or a checkpoint does not fit.
    """
    check_no_links(directory)
    config = read_config(directory)
    changed = with_new_options(with_same_results(config, given), **new_options)
    check_same_config(directory, config, newest(directory), accept=accept)
    parts = prepare(changed, process_group)
    state, history, corrupt = parts.first_state(), (), {}
    checkpoint = newest(directory, like=state)
    if checkpoint is not None:
        check_same_data(checkpoint, changed)
        if process_group.rank == 0:
            warn_of_other_environment(checkpoint, state)
        state, history, corrupt = checkpoint.state, checkpoint.history, checkpoint.corrupt
        for name in corrupt:
            path = checkpoint_folder(directory) / name
            _log.warning("Checkpoint %s is corrupt. Resuming from checkpoint %s.", path, checkpoint.name)
    _check_not_trained(new_options.get("skip", ()), state)
    if process_group.rank == 0:
        repair_experiment(directory, parts, state, history)  # also after the last epoch: the crash may have come then
    if history and not may_have_ended:
        check_has_epochs_left(state, changed.training, option_prefix="--new-")
    if process_group.rank == 0:
        for name in corrupt:
            set_aside(checkpoint_folder(directory) / name)
        if changed != config:
            atomic_write(directory / "config.json", changed.to_json())
    return parts, state, history


def _check_not_trained(skip: Sequence[str], state: TrainState) -> None:
    """Raise ValueError where a batch to leave out was trained before this state."""
    for text in skip:
        epoch, batch = parse_batch(text)
        if (epoch - 1, batch - 1) < (state.epoch, state.batch):
            raise ValueError(
                f"--skip {text}: this batch was trained, and the run resumes after it, from checkpoint "
                f"{position_name(state.epoch, state.batch)}. Expected a later one. To leave it out, fork an earlier "
                f"checkpoint with --skip-batches {text}."
            )


def check_same_run(directory: Path, config: RunConfig, *, init_from: str | None = None) -> None:
    """Raise ValueError where a directory holds something else than a run of this config, and of these weights.

    Options that cannot change results may differ.
    """
    if is_ensemble(directory) or not (directory / "config.json").is_file():
        check_new_experiment(directory.parent, directory.name)
    _check_same(directory, directory, config, init_from=init_from)


def check_same_ensemble(directory: Path, configs: Sequence[RunConfig]) -> None:
    """Raise ValueError where a directory holds something else than an ensemble of these configs."""
    if not is_ensemble(directory):
        check_new_experiment(directory.parent, directory.name)
    num_members, _ = read_ended(directory)
    if num_members != len(configs):
        raise ValueError(
            f"Ensemble {directory.name!r} exists in {str(directory.parent)!r} with {num_members} members. Received: "
            f"{len(configs)}. Choose another name, or resume it as it is: "
            f"dwiml-func resume {directory.parent} {directory.name}"
        )
    for number, config in enumerate(configs):
        _check_same(directory, directory / str(number), config)


def with_same_results(config: RunConfig, given: RunConfig | None) -> RunConfig:
    """A config with those options of `given` that cannot change results; None changes nothing."""
    if given is None:
        return config
    num_threads = given.training.num_threads if config.training.num_shards > 1 else None
    return replace(
        config,
        training=_changed(config.training, num_threads=num_threads),
        data=replace(config.data, lazy=given.data.lazy, cache_size=given.data.cache_size),
        batches=replace(config.batches, processes=given.batches.processes),
        checkpoints=given.checkpoints,
        logging=given.logging,
    )


def _check_same(directory: Path, member: Path, config: RunConfig, *, init_from: str | None = None) -> None:
    recorded = read_config(member)
    config = replace(config, padded_lengths=recorded.padded_lengths)
    if not config.training.skip_batches:  # a resume may have added some
        config = replace(config, training=replace(config.training, skip_batches=recorded.training.skip_batches))
    if init_from is not None:
        origin, path = recorded.origin, str(Path(init_from).absolute())
        if origin is None or not origin.weights_only or origin.experiment != path:
            origin = Origin(experiment=path, checkpoint="0", digest="", start_digest="", weights_only=True)
        config = replace(config, origin=origin)
    if changes := differences(with_same_results(recorded, config).to_dict(), config.to_dict(), ("there", "here")):
        only_longer = len(changes) == 1 and config.training.max_epochs > recorded.training.max_epochs
        how, option = (
            ("train on", f" --new-max-epochs {config.training.max_epochs}")
            if only_longer
            else ("resume it as it is", "")
        )
        raise ValueError(
            f"Experiment {directory.name!r} exists in {str(directory.parent)!r} with another config "
            f"({at_most_three(changes)}). Choose another name, or {how}: "
            f"dwiml-func resume {directory.parent} {directory.name}{option}"
        )


def with_new_options(
    config: RunConfig,
    *,
    new_max_epochs: int | None = None,
    new_patience: int | None = None,
    hdf5_file: str | None = None,
    processes: int | None = None,
    checkpoint_every: str | None = None,
    keep: int | str | None = None,
    skip: Sequence[str] = (),
    num_threads: int | None = None,
) -> RunConfig:
    """A run's config with the options that a resume may change; None keeps a value.

    ValueError for another number of threads where it would change results.
    """
    recorded = config.training
    if recorded.num_shards == 1 and num_threads not in (None, recorded.num_threads):
        raise ValueError(
            f"--num-threads {num_threads}: results of a run without shards depend on it, and this one began "
            f"with {recorded.num_threads}. Leave the option out. Runs with --num-shards may change it."
        )
    return replace(
        config,
        hdf5_file=str(Path(hdf5_file).absolute()) if hdf5_file else config.hdf5_file,
        training=_changed(
            config.training,
            max_epochs=new_max_epochs,
            patience=new_patience,
            num_threads=num_threads,
            skip_batches=tuple(dict.fromkeys((*config.training.skip_batches, *skip))) if skip else None,
        ),
        batches=_changed(config.batches, processes=processes),
        checkpoints=_changed(config.checkpoints, checkpoint_every=checkpoint_every, keep=keep),
    )


def repair_experiment(directory: Path, parts: RunParts, state: TrainState, history: Sequence[EpochReport]) -> None:
    """Remove what a crash left behind, and bring best model and logs up to date with the checkpoint."""
    if not names_after(list_checkpoints(directory), state):  # else some are corrupt, or wait for an ensemble's members
        origin = parts.config.origin
        keep_always = () if origin is None else (origin.checkpoint,)
        remove_old(directory, state, parts.config.checkpoints.keep, keep_always)
    for folder in ("", CHECKPOINTS, "logs", "logs/comet", "logs/tensorboard", "plots"):
        remove_leftovers(directory / folder)
    if history:
        repair_best_model(directory, state, parts)
        fan_out(npy(directory), jsonl(directory))(*history)  # they are written without waiting for the disk


def check_has_epochs_left(state: TrainState, training: TrainingConfig, *, option_prefix: str) -> None:
    """Raise ValueError when early stopping or the number of epochs would end a run from this state at once."""
    bad, done = state.best.num_bad_epochs, state.epoch
    if should_stop(state.best, training.patience):
        raise ValueError(
            f"No epoch is left to train: with patience {training.patience}, early stopping ends this run after epoch "
            f"{done} (epochs in a row without improvement: {bad}). Give {option_prefix}patience of at least {bad + 1}."
        )
    if done >= training.max_epochs:
        raise ValueError(
            f"No epoch is left to train: the maximum is {training.max_epochs}, epochs done: {done}. "
            f"Give {option_prefix}max-epochs of at least {done + 1}."
        )


def _changed(part: Any, **values: Any) -> Any:
    return replace(part, **{name: value for name, value in values.items() if value is not None})


def set_aside(path: Path) -> None:
    """Rename a corrupt checkpoint; an earlier one of that name is removed."""
    aside = path.with_name(f"{path.name}.corrupt")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
