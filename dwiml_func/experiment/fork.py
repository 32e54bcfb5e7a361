"""A new experiment that begins with a checkpoint of another one, with changed options."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dwiml_func.checkpoint.checkpoint import Checkpoint, newest, restore, write
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.checkpoint.manifest import CheckpointError, CorruptError
from dwiml_func.core.early_stopping import Best, should_stop
from dwiml_func.core.rng import Key
from dwiml_func.core.state import TrainState
from dwiml_func.distributed.sharding import SINGLE_PROCESS, ProcessGroup
from dwiml_func.experiment.best_model import save_best_model
from dwiml_func.experiment.config import Origin, RunConfig
from dwiml_func.experiment.folder import create_experiment, read_config
from dwiml_func.experiment.setup import RunParts, make_optimizer, prepare
from dwiml_func.files.fingerprint import fingerprint, same_file

__all__ = ["Fork", "create_fork", "prepare_fork"]

_SAME_RESULTS = {"data.lazy", "data.cache_size", "batches.processes"}
_VALIDATION_ONLY = {"batches.batch_size_validation", "batches.max_batches_per_epoch_validation"}
_TRAINING_ONLY = {
    *("model.dropout", "model.dg_dropout", "batches.batch_size_training", "batches.max_batches_per_epoch_training"),
    *("batches.noise_gaussian_size_forward", "batches.noise_gaussian_size_loss"),
    *("batches.split_ratio", "batches.reverse_ratio"),
}
"""Options that leave the validation loss of a given model as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A fork, ready to be written and trained.

    Args:
        setup: its parts; `setup.config` names its origin.
        checkpoint: that of the source.
        state: what the fork begins with: the state of the checkpoint, with what is reset.
        data: the fingerprint of the data to record.
        best_state: the run after the best epoch so far; None where the best epoch begins anew.
        notes: a sentence for each change that reaches further than its option.

    Example:
        >>> fork = prepare_fork(Path("experiments/a"), config)  # doctest: +SKIP
        >>> fork.notes  # doctest: +SKIP
        ('Optimizer SGD instead of Adam: its moments begin at zero.',)
    """

    setup: RunParts
    checkpoint: Checkpoint
    state: TrainState
    data: Mapping[str, Any]
    best_state: TrainState | None = None
    notes: tuple[str, ...] = ()


def prepare_fork(
    source: Path, config: RunConfig, *, name: str | None = None, process_group: ProcessGroup = SINGLE_PROCESS
) -> Fork:
    """Make ready to fork an experiment. Nothing is written, and the source may be training meanwhile.

    The state is taken over whole: a fork without changes goes on to the same bits as its source. What cannot go on
    begins anew: another optimizer has moments of zero and counts its updates from 0; another seed replaces the key; and
    where other data or options change the very meaning of the monitored loss, or the best model is gone, the best epoch
    and the count of bad epochs begin anew.

    Args:
        source: the experiment's directory.
        config: the fork's config: that of the source with other values of any option that leaves the shapes of the
            model's tensors as they are. Learning rates are counted from the source's first epoch.
        name: which checkpoint, e.g. "3" or, within an epoch, "3-50"; None takes the newest sound one. Within an epoch the
            model, the training batches and the seed cannot change.
        process_group: the processes that train together, see `dwiml_func.distributed.process_group`. Only the first writes.

    Returns:
        The fork.

    Raises:
        FileNotFoundError: there is no such experiment, checkpoint or dataset.
        CorruptError: the checkpoint is corrupt.
        ValueError: the model has other tensors (the message lists all differences); an option cannot change within an
            epoch; the fork would end at once; or the dataset has changed under the same path.

    Example:
        >>> prepare_fork(Path("/no/such/experiment"), RunConfig(hdf5_file="data.hdf5"))
        Traceback (most recent call last):
        ...
        FileNotFoundError: '/no/such/experiment' is not an experiment: it has no config.json.
    """
    recorded = read_config(source)
    changed = _changed_options(recorded, config)
    setup = prepare(config, process_group)
    like = setup.state.replace(
        key=Key(recorded.training.rng), opt_state=make_optimizer(recorded.training).init(setup.state.params)
    )
    checkpoint = _restore(source, like, name, changed)
    has_same_data = _has_same_data(checkpoint, recorded, config)
    data = checkpoint.data if has_same_data else fingerprint(config.hdf5_file)
    if not has_same_data:
        changed = changed | {"hdf5_file"}
    if checkpoint.state.batch:
        _check_within_epoch(checkpoint, changed)

    state, notes = checkpoint.state, []
    if "training.optimizer" in changed:
        state = state.replace(opt_state=setup.state.opt_state, step=0)
        old, new = recorded.training.optimizer, config.training.optimizer
        notes.append(f"Optimizer {new} instead of {old}: its moments begin at zero.")
    state = state.replace(key=Key(config.training.rng))
    best_state, why = _best(source, like, checkpoint.state, changed, is_validated=setup.valid is not None)
    if why is not None:
        state = state.replace(best=Best())
        notes.append(f"The best epoch and the count of bad epochs begin anew: {why}.")
    _check_to_end_at_once(state, config)

    origin = Origin(
        experiment=str(source.absolute()),
        checkpoint=checkpoint.name,
        digest=state_digest(checkpoint.state),
        start_digest=state_digest(state),
    )
    setup = replace(setup, config=replace(config, origin=origin))
    return Fork(setup=setup, checkpoint=checkpoint, state=state, data=data, best_state=best_state, notes=tuple(notes))


def create_fork(experiments_path: str | Path, experiment_name: str, fork: Fork) -> Path:
    """Make a fork's directory with its config, its checkpoint and the best model so far. It appears in one step.

    Args:
        experiments_path: folder of all experiments; it exists.
        experiment_name: name of the new folder in it.
        fork: what to write.

    Returns:
        The experiment's directory, from which a run can be resumed.

    Raises:
        FileNotFoundError, ValueError: as `dwiml_func.experiment.folder.create_experiment`.
        OSError: the disk is full, or cannot be written to; nothing is left of the attempt.

    Example:
        >>> create_fork("experiments", "b", fork)  # doctest: +SKIP
    """

    def fill(directory: Path) -> None:
        source, config = fork.checkpoint, fork.setup.config.to_dict()
        write(directory, fork.state, source.history, config=config, data=fork.data, environment=source.environment)
        if fork.best_state is not None:
            save_best_model(directory, fork.setup, fork.best_state)

    return create_experiment(experiments_path, experiment_name, fork.setup.config, fill=fill)


def _changed_options(recorded: RunConfig, config: RunConfig) -> Set[str]:
    parts = ("data", "batches", "model", "training")
    pairs = {part: (asdict(getattr(recorded, part)), asdict(getattr(config, part))) for part in parts}
    return {f"{part}.{name}" for part, (old, new) in pairs.items() for name in old if old[name] != new[name]}


def _restore(source: Path, like: TrainState, name: str | None, changed: Set[str]) -> Checkpoint:
    try:
        if name is not None:
            return restore(source, like, name=name)
        checkpoint = newest(source, like=like) or restore(source, like)  # raises: there is none
    except CorruptError:
        raise
    except CheckpointError as error:
        options = ", ".join(sorted(option for option in changed if not option.startswith("training."))) or "nothing"
        raise ValueError(f"{error} A fork keeps the model's tensors. Changed: {options}.") from None
    for newer in checkpoint.corrupt:
        logging.getLogger(__name__).warning(
            "Checkpoint %s of %s is corrupt; forking %s.", newer, source, checkpoint.name
        )
    return checkpoint


def _has_same_data(checkpoint: Checkpoint, recorded: RunConfig, config: RunConfig) -> bool:
    if not checkpoint.data:
        return config.hdf5_file == recorded.hdf5_file
    if same_file(checkpoint.data, config.hdf5_file):
        return True
    if config.hdf5_file == recorded.hdf5_file:
        raise ValueError(
            f"{config.hdf5_file} is not the dataset that the source was trained on: its bytes differ. Expected the "
            f"same file or, to go on with other data, a file of another path (--hdf5-file)."
        )
    return False


def _check_within_epoch(checkpoint: Checkpoint, changed: Set[str]) -> None:
    fixed = {option for option in changed if not option.startswith("training.")} - _SAME_RESULTS - _VALIDATION_ONLY
    if fixed := sorted(fixed | (changed & {"training.rng"})):
        raise ValueError(
            f"Checkpoint {checkpoint.name} is within epoch {checkpoint.state.epoch + 1}, where {', '.join(fixed)} cannot "
            f"change. Expected a checkpoint at the end of an epoch, or only other options of the training."
        )


def _best(
    source: Path, like: TrainState, state: TrainState, changed: Set[str], *, is_validated: bool
) -> tuple[TrainState | None, str | None]:
    """The run after its best epoch; or None and, where there is one that cannot be taken over, why."""
    if state.best.epoch is None:
        return None, None
    same = _SAME_RESULTS | (_TRAINING_ONLY if is_validated else set())
    if meaning := sorted(option for option in changed - same if not option.startswith("training.")):
        return None, f"the monitored loss is another one with another {', '.join(meaning)}"
    if (state.best.epoch, 0) == (state.epoch, state.batch):
        return state, None
    try:
        return restore(source, like, name=str(state.best.epoch)).state, None
    except (FileNotFoundError, CheckpointError) as error:
        return None, f"the model of the best one, {state.best.epoch}, is gone ({str(error).rstrip('.')})"


def _check_to_end_at_once(state: TrainState, config: RunConfig) -> None:
    training = config.training
    if state.epoch >= training.max_epochs:
        raise ValueError(
            f"The checkpoint has {state.epoch} epochs done, so a maximum of {training.max_epochs} would end the fork at "
            f"once. Give --max-epochs of at least {state.epoch + 1}, or fork from an earlier checkpoint."
        )
    if should_stop(state.best, training.patience):
        raise ValueError(
            f"The checkpoint has {state.best.num_bad_epochs} epochs in a row without improvement, so a patience of "
            f"{training.patience} would end the fork at once. Give --patience of at least "
            f"{state.best.num_bad_epochs + 1}, or fork from an earlier checkpoint."
        )
