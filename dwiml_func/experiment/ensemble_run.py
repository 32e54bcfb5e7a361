"""An ensemble in its directory: trained by one step for all, saved as the ordinary experiments that its members are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dwiml_func.checkpoint.arrays import CorruptError
from dwiml_func.checkpoint.checkpoint import Checkpoint, remove_old, restore, save
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.checkpoint.history import fill_digests
from dwiml_func.checkpoint.index import checkpoint_name, list_checkpoints
from dwiml_func.core.loop import EpochReport
from dwiml_func.core.rng import Key
from dwiml_func.ensemble.loop import EnsembleReport, train_and_validate_ensemble
from dwiml_func.ensemble.state import EnsembleState, member, stack_states
from dwiml_func.ensemble.step import ensemble_eval_step, ensemble_step
from dwiml_func.experiment.best_model import save_best_model
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import read_config, read_ended, write_ended
from dwiml_func.experiment.logs import experiment_writer, write_parameters
from dwiml_func.experiment.resume import repair_experiment, with_new_options
from dwiml_func.experiment.setup import RunParts, make_optimizer, prepare, with_seed
from dwiml_func.experiment.signals import StopRequest, TrainingStopped
from dwiml_func.files.atomic import atomic_write, remove_leftovers
from dwiml_func.files.fingerprint import fingerprint, same_file
from dwiml_func.optim.schedules import per_epoch

__all__ = ["prepare_ensemble", "resume_ensemble", "run_ensemble"]

Histories = Sequence[tuple[EpochReport, ...]]
"""The reports of each member's epochs so far."""


def prepare_ensemble(configs: Sequence[RunConfig]) -> list[RunParts]:
    """The parts of all members' runs, which share the data. Nothing is written.

    Args:
        configs: those of the members.

    Returns:
        A setup for each.

    Raises:
        FileNotFoundError, ValueError: as `dwiml_func.experiment.setup.prepare`, or shards or compilation are asked for.

    Example:
        >>> setups = prepare_ensemble(member_configs(config, num_models=3))  # doctest: +SKIP
    """
    if configs[0].training.num_shards > 1:
        raise ValueError("An ensemble trains in one process. Expected --num-shards 1.")
    if configs[0].training.compile:
        # Under vmap the recurrent layers are a loop over time steps: a graph for each length, minutes to compile.
        raise ValueError("An ensemble cannot be compiled: each length would be another graph. Leave --compile out.")
    first = prepare(configs[0])
    return [with_seed(first, config) for config in configs]


def run_ensemble(
    directory: Path,
    setups: Sequence[RunParts],
    *,
    ensemble: EnsembleState | None = None,
    histories: Histories | None = None,
    stop: StopRequest | None = None,
) -> Iterator[EnsembleReport]:
    """Train all members; save checkpoints, best models and logs of each as `run_experiment` does for one.

    A member is saved whenever the others are, until it has stopped. Hold the locks of the ensemble and of its members.

    Args:
        directory: the ensemble.
        setups: the parts of each member's run.
        ensemble: where to go on from; None starts at the beginning.
        histories: the reports of the epochs before it.
        stop: looked at after each batch.

    Yields:
        Each epoch's report. After the last, everything is on disk.

    Raises:
        TrainingStopped: `stop` asked for it; all members are saved up to the last batch.
        OSError: a checkpoint could not be saved; those before stand.

    Example:
        >>> for report in run_ensemble(directory, prepare_ensemble(configs)):  # doctest: +SKIP
        ...     print(report.epoch, report.failed)
    """
    torch.set_num_threads(setups[0].config.training.num_threads)
    ensemble = stack_states([setup.state for setup in setups]) if ensemble is None else ensemble
    run = _Run(directory, setups, [()] * len(setups) if histories is None else histories, stop or StopRequest())
    for number, setup in enumerate(setups):
        write_parameters(directory / str(number), setup.config, nb_features=setup.nb_features, now=datetime.now())
    try:
        yield from run.epochs(ensemble)
    except Exception as error:
        if run.stop.signal is None:
            raise
        besides = None if isinstance(error, _Stop) else error
        raise TrainingStopped(run.stop.signal, directory, run.save_position(), error=besides) from besides


def resume_ensemble(
    directory: Path,
    *,
    new_max_epochs: int | None = None,
    new_patience: int | None = None,
    hdf5_file: str | None = None,
    processes: int | None = None,
    checkpoint_every: str | None = None,
    keep: int | str | None = None,
) -> tuple[list[RunParts], EnsembleState, list[tuple[EpochReport, ...]]]:
    """Make ready to go on with an ensemble, from the newest checkpoint that all members that had not stopped have.

    Args:
        directory: the ensemble.
        new_max_epochs, new_patience, hdf5_file, processes, checkpoint_every, keep: as for
            `resume_experiment`, for all members. One that has stopped early stays as it is.

    Returns:
        The parts, the ensemble and the histories for `run_ensemble`.

    Raises:
        FileNotFoundError, ValueError: something on disk does not fit, or no member has an epoch left to do.

    Example:
        >>> setups, ensemble, histories = resume_ensemble(directory)  # doctest: +SKIP
    """
    num_members, ended = read_ended(directory)
    folders = [directory / str(number) for number in range(num_members)]
    old = [read_config(folder) for folder in folders]
    new = partial(with_new_options, new_max_epochs=new_max_epochs, new_patience=new_patience, hdf5_file=hdf5_file)
    configs = [new(config, processes=processes, checkpoint_every=checkpoint_every, keep=keep) for config in old]
    setups = prepare_ensemble(configs)
    checkpoints = _newest_of_all(folders, setups, ended)
    if checkpoints is None:
        ensemble, histories = stack_states([setup.state for setup in setups]), [()] * num_members
    else:
        if checkpoints[0].data and not same_file(checkpoints[0].data, configs[0].hdf5_file):
            raise ValueError(f"{configs[0].hdf5_file} is not the dataset that this ensemble was trained on.")
        active = [ended.get(number) != checkpoint.name for number, checkpoint in enumerate(checkpoints)]
        ensemble = stack_states([checkpoint.state for checkpoint in checkpoints], active=active)
        histories = [checkpoint.history for checkpoint in checkpoints]
        if not any(active) or ensemble.epoch >= configs[0].training.max_epochs:
            raise ValueError(
                f"No member of {directory} has an epoch left to do after epoch {ensemble.epoch}. Give --new-max-epochs "
                f"if one has not stopped early, or go on with one alone: dwiml-func resume {directory} 0"
            )
    remove_leftovers(directory)
    for number, (folder, before, setup) in enumerate(zip(folders, old, setups, strict=True)):
        if setup.config != before:
            atomic_write(folder / "config.json", setup.config.to_json())
        state = checkpoints[number].state if checkpoints else setup.state
        repair_experiment(folder, setup, state, histories[number])
    return setups, ensemble, histories


def _newest_of_all(
    folders: Sequence[Path], setups: Sequence[RunParts], ended: dict[int, str]
) -> list[Checkpoint] | None:
    """The newest checkpoint that all members that had not stopped have, and those of the others; None: there are none."""
    names = [list_checkpoints(folder) for folder in folders]
    running = [number for number in range(len(folders)) if number not in ended]
    common = [name for name in names[running[0]] if all(name in names[n] for n in running)] if running else [""]
    for name in reversed(common):
        try:
            return [
                restore(folder, setup.state, name=ended.get(number, name))
                for number, (folder, setup) in enumerate(zip(folders, setups, strict=True))
            ]
        except CorruptError:
            continue
    if max(map(len, names)) > 1 or all(names):  # else the very first save was cut off
        raise CorruptError(
            f"The members in {folders[0].parent} have no sound checkpoint of the same epoch and batch. "
            f"Go on with each by itself: dwiml-func resume {folders[0].parent} 0"
        )
    return None


class _Stop(Exception):
    """Leaves the loop; it is no error."""


class _Run:
    """The position of an ensemble between its loop and the disk."""

    def __init__(self, directory: Path, setups: Sequence[RunParts], histories: Histories, stop: StopRequest) -> None:
        self.stop = stop
        self._directory = directory
        self._setups = setups
        self._folders = [directory / str(number) for number in range(len(setups))]
        self._histories = list(histories)
        self._writers = [experiment_writer(f, s.config) for f, s in zip(self._folders, setups, strict=True)]
        self._unwritten: list[tuple[EpochReport, ...]] = list(histories)
        self._is_best: set[int] = set()
        self._unsaved: EnsembleState | None = None
        self._name: str | None = None
        self._saved_at = time.monotonic()
        self._data = fingerprint(setups[0].config.hdf5_file)

    def epochs(self, ensemble: EnsembleState) -> Iterator[EnsembleReport]:
        first, configs = self._setups[0], [setup.config.training for setup in self._setups]
        save_interval = first.config.checkpoints.save_interval
        decays = [training.weight_decay for training in configs]
        bound: dict[str, Any] = {"loss_fn": first.loss_fn, "clip_grad": configs[0].clip_grad}
        if len(set(decays)) == 1:
            bound["optimizer"] = make_optimizer(configs[0])
        else:
            decay = torch.tensor(decays, dtype=torch.float64, device=ensemble.active.device)
            bound |= {"optimizer": partial(make_optimizer, configs[0]), "weight_decay": decay}
        epochs = train_and_validate_ensemble(
            ensemble,
            train=first.train,
            step=partial(ensemble_step, **bound),
            valid=None if first.valid is None else self._stoppable(first.valid),
            eval_step=None if first.valid is None else partial(ensemble_eval_step, loss_fn=first.loss_fn),
            learning_rate=[per_epoch(training.learning_rates) for training in configs],
            max_epochs=configs[0].max_epochs,
            patience=configs[0].patience,
            patience_delta=configs[0].patience_delta,
            on_batch=self._after_batch,
        )
        for ensemble, report in epochs:
            for number, own in report.members.items():
                self._histories[number] = (*self._histories[number], own)
                self._unwritten[number] = (*self._unwritten[number], own)
            self._unsaved = ensemble
            self._is_best = {number for number, own in report.members.items() if own.is_best}
            ends = report.failed or any(own.stop for own in report.members.values())
            if save_interval.due_after_epoch(report.epoch) or self._is_best or ends:
                self.save_position()
            yield report
            if self.stop.agreed() and ensemble.epoch < configs[0].max_epochs and bool(ensemble.active.any()):
                raise _Stop

    def save_position(self) -> str | None:
        """Save all members that moved since they were saved last; returns the name of the newest checkpoint."""
        ensemble = self._unsaved
        if ensemble is None:
            return self._name
        states, active = [member(ensemble, number) for number in range(len(self._folders))], ensemble.active.tolist()
        for number, (folder, state) in enumerate(zip(self._folders, states, strict=True)):
            if checkpoint_name(state) not in list_checkpoints(folder):
                config = self._setups[number].config.to_dict()
                save(folder, state, self._histories[number], config=config, data=self._data, keep=None)
            elif active[number] and state.batch == 0:
                # It was saved before a kill, ahead of others. The epoch's report has been made again since then.
                digest = state_digest(state)
                self._histories[number] = fill_digests(self._histories[number], (), state.epoch, digest)
        # Only now, when all have this checkpoint, is anything removed, or written that may be ahead of one before it.
        ended: dict[int, str] = {}
        for number, (folder, setup, state) in enumerate(zip(self._folders, self._setups, states, strict=True)):
            if number in self._is_best:
                save_best_model(folder, setup, state)
            if self._unwritten[number]:
                self._writers[number](*self._unwritten[number])
                self._unwritten[number] = ()
            if active[number]:
                self._name = checkpoint_name(state)
            else:
                ended[number] = checkpoint_name(state)
            keep = setup.config.checkpoints.keep
            remove_old(folder, state, None if keep == "all" else keep)
        write_ended(self._directory, len(self._folders), ended)
        self._unsaved, self._is_best, self._saved_at = None, set(), time.monotonic()
        return self._name

    def _after_batch(self, ensemble: EnsembleState, metrics: Any) -> None:
        self._unsaved, self._is_best = ensemble, set()
        if self.stop.agreed():
            raise _Stop
        save_interval = self._setups[0].config.checkpoints.save_interval
        if save_interval.due_within_epoch(batch=ensemble.batch, seconds=time.monotonic() - self._saved_at):
            self.save_position()

    def _stoppable(self, batches: Callable[[Key, int, int], Iterable[Any]]) -> Callable[[Key, int, int], Iterator[Any]]:
        def stoppable(key: Key, epoch: int, start_batch: int) -> Iterator[Any]:
            for batch in batches(key, epoch, start_batch):
                if self.stop.agreed():
                    raise _Stop
                yield batch

        return stoppable
