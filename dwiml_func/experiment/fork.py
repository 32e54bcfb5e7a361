"""A new experiment that begins with a checkpoint of another one, with changed options, or with its weights alone."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dwiml_func.checkpoint.checkpoint import Checkpoint, newest, restore, write
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.checkpoint.index import best_name, checkpoint_name
from dwiml_func.checkpoint.manifest import CheckpointError, CorruptError
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.state import TrainState, init_state
from dwiml_func.core.weights import with_eval_params
from dwiml_func.distributed.sharding import SINGLE_PROCESS, ProcessGroup
from dwiml_func.experiment.best_model import save_evaluated
from dwiml_func.experiment.config import Origin, RunConfig
from dwiml_func.experiment.folder import create_experiment, read_config
from dwiml_func.experiment.optimizers import configured_optimizer
from dwiml_func.experiment.pretrained import PretrainedReport, load_pretrained
from dwiml_func.experiment.record import check_same_config
from dwiml_func.experiment.resume import check_has_epochs_left
from dwiml_func.experiment.setup import RunParts, make_model, make_parts, prepare
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.files.fingerprint import fingerprint, same_file
from dwiml_func.types import Plateau

__all__ = ["Fork", "create_fork", "create_initialized", "initialize_from", "prepare_fork"]

_SAME_RESULTS = {"data.lazy", "data.cache_size", "batches.processes"}
_VALIDATION_ONLY = {"batches.batch_size_validation", "batches.max_batches_per_epoch_validation"}
_TRAINING_ONLY = {
    *("model.dropout", "model.dropout_rate", "model.dg_dropout"),
    *("batches.batch_size_training", "batches.max_batches_per_epoch_training"),
    *("batches.noise_gaussian_size_forward", "batches.noise_gaussian_size_loss"),
    *("batches.split_ratio", "batches.reverse_ratio"),
}
"""Options that leave the validation loss of a given model as it is."""
_OPTIMIZER = ("optimizer", "momentum", "rule", "accumulate", "ema", "skip_not_finite")
"""Options that decide what the optimizer state is."""
_MONITORED = {"training.monitor", "training.monitor_mode"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A fork, ready to be written and trained.

    `checkpoint` is the source's; `state` is its state with the parts that the changes reset, and `notes` has a sentence
    for each of these. `best_state` is the state after the best epoch so far, with the parameters that were evaluated;
    None where the best epoch is reset. `data` is the fingerprint of the dataset.
    """

    parts: RunParts
    checkpoint: Checkpoint
    state: TrainState
    data: Mapping[str, Any]
    best_state: TrainState | None = None
    notes: tuple[str, ...] = ()


def prepare_fork(
    source: Path,
    config: RunConfig,
    *,
    name: str | None = None,
    accept: Collection[str] = (),
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Fork:
    """Prepare to fork an experiment from its checkpoint `name`, by default the newest valid one. Nothing is written.

    The source may be training meanwhile. The complete state is copied: a fork without changes ends bitwise identical
    to its source. Another optimizer, momentum, rule, accumulation or average resets the optimizer state, another seed
    the key; options that change the meaning of the monitored loss reset the best epoch. Within an epoch, the model, the
    training batches and the seed cannot change.

    CorruptError for a corrupt checkpoint; ValueError where the model has other tensors, an option cannot change, the
    fork would end at once, or the dataset has changed under the same path.
    """
    recorded = read_config(source)
    check_same_config(source, recorded, newest(source), accept=accept)
    changed = _changed_options(recorded, config)
    parts = prepare(config, process_group)
    first = parts.first_state()
    like = _first_state(parts, recorded.training)
    checkpoint = _restore(source, like, name, changed)
    has_same_data = _has_same_data(checkpoint, recorded, config)
    data = checkpoint.data if has_same_data else fingerprint(config.hdf5_file, parts.data.linked)
    if not has_same_data:
        changed = changed | {"hdf5_file"}
    if checkpoint.state.batch:
        _check_within_epoch(checkpoint, changed)

    state, notes = checkpoint.state.replace(key=first.key), []
    if names := [name for name in _OPTIMIZER if f"training.{name}" in changed]:
        tensors = {**state.params, **state.buffers}
        params, buffers = ({name: tensors[name] for name in part} for part in (first.params, first.buffers))
        opt_state = parts.optimizer.init(params)
        state = state.replace(params=params, buffers=buffers, opt_state=opt_state, step=0)
        notes.append(f"Another {', '.join(names)}: the optimizer state is reset.")
    if "training.learning_rate" in changed and state.plateau != Plateau():
        state = state.replace(plateau=Plateau())
        notes.append("The reductions of the learning rate are reset: the fork has another schedule.")
    best_state, why = _best(source, like, checkpoint.state, changed, is_validated=parts.valid is not None)
    if best_state is not None:
        best_state = with_eval_params(best_state, configured_optimizer(recorded.training))
    if why is not None:
        state = state.replace(best=Best(), plateau=state.plateau._replace(best=None, num_bad=0, cooldown=0))
        notes.append(f"The best epoch and the count of bad epochs are reset: {why}.")
    check_has_epochs_left(state, config.training, option_prefix="--")

    origin = Origin(
        experiment=str(source.absolute()),
        checkpoint=checkpoint.name,
        digest=state_digest(checkpoint.state),
        start_digest=state_digest(state),
    )
    parts = make_parts(replace(config, origin=origin), parts.data, process_group).as_new()
    return Fork(parts=parts, checkpoint=checkpoint, state=state, data=data, best_state=best_state, notes=tuple(notes))


def create_fork(experiments_path: str | Path, experiment_name: str, fork: Fork) -> Path:
    """Create a fork's directory, complete or not at all: its config, its checkpoint and the best model so far."""
    parts = fork.parts

    def fill(directory: Path) -> None:
        source, config = fork.checkpoint, parts.config.to_dict()
        write(directory, fork.state, source.history, config=config, data=fork.data, environment=source.environment)
        if fork.best_state is not None:
            save_evaluated(directory, fork.best_state, parts)

    return create_experiment(experiments_path, experiment_name, parts.config, fill=fill)


def initialize_from(parts: RunParts, path: str | Path) -> tuple[RunParts, TrainState, PretrainedReport]:
    """Load weights into the model of a run that has not started, and record their source in its config."""
    report = load_pretrained(parts.model, path)
    state = parts.first_state()
    origin = Origin(
        experiment=str(Path(path).absolute()),
        checkpoint="0",
        digest=report.digest,
        start_digest=state_digest(state),
        weights_only=True,
    )
    return replace(parts, config=replace(parts.config, origin=origin)), state, report


def create_initialized(experiments_path: str | Path, experiment_name: str, parts: RunParts, state: TrainState) -> Path:
    """Create the experiment with its first state as checkpoint 0, so that it never needs the source again."""

    def fill(directory: Path) -> None:
        write(directory, state, (), config=parts.config.to_dict(), data=None, environment=None)

    return create_experiment(experiments_path, experiment_name, parts.config, fill=fill)


def _first_state(parts: RunParts, recorded: TrainingConfig) -> TrainState:
    """The first state that the source would have with the fork's model."""
    config, model = replace(parts.config, training=recorded), parts.model
    if recorded.rule != parts.config.training.rule:  # other parameters are frozen
        model = make_model(config, parts.nb_features, training=parts.data.training).to(next(model.parameters()).device)
    return init_state(model, configured_optimizer(recorded), seed=recorded.rng)


def _changed_options(recorded: RunConfig, config: RunConfig) -> Set[str]:
    parts = ("data", "batches", "model", "training")
    pairs = {part: (asdict(getattr(recorded, part)), asdict(getattr(config, part))) for part in parts}
    return {f"{part}.{name}" for part, (old, new) in pairs.items() for name in old if old[name] != new[name]}


def _restore(source: Path, like: TrainState, name: str | None, changed: Set[str]) -> Checkpoint:
    try:
        if name is not None:
            return restore(source, like, name=name)
        checkpoint = newest(source, like=like) or restore(source, like)  # which raises: there is none
    except CorruptError:
        raise
    except CheckpointError as error:
        options = ", ".join(sorted(option for option in changed if not option.startswith("training."))) or "nothing"
        raise ValueError(f"{error} A fork keeps the model's tensors. Changed: {options}.") from None
    for newer in checkpoint.corrupt:
        logging.getLogger(__name__).warning(
            "Checkpoint %s of %s is corrupt. Forking from checkpoint %s.", newer, source, checkpoint.name
        )
    return checkpoint


def _has_same_data(checkpoint: Checkpoint, recorded: RunConfig, config: RunConfig) -> bool:
    if not checkpoint.data:
        return config.hdf5_file == recorded.hdf5_file
    if same_file(checkpoint.data, config.hdf5_file):
        return True
    if config.hdf5_file == recorded.hdf5_file:
        raise ValueError(
            f"Expected the dataset that the source was trained on. Received: {config.hdf5_file}, whose bytes differ. "
            f"To train on other data, give a file of another path (--hdf5-file)."
        )
    return False


def _check_within_epoch(checkpoint: Checkpoint, changed: Set[str]) -> None:
    fixed = {option for option in changed if not option.startswith("training.")} - _SAME_RESULTS - _VALIDATION_ONLY
    if fixed := sorted(fixed | (changed & {"training.rng"})):
        raise ValueError(
            f"Within an epoch, {', '.join(fixed)} cannot change, and checkpoint {checkpoint.name} is within epoch "
            f"{checkpoint.state.epoch + 1}. Choose a checkpoint at the end of an epoch."
        )


def _best(
    source: Path, like: TrainState, state: TrainState, changed: Set[str], *, is_validated: bool
) -> tuple[TrainState | None, str | None]:
    """The state after the best epoch; or None and, where that epoch cannot be taken over, the reason."""
    if state.best.epoch is None:
        return None, None
    same = _SAME_RESULTS | (_TRAINING_ONLY if is_validated else set())
    changed_data = {option for option in changed - same if not option.startswith("training.")}
    if meaning := sorted(changed_data | (changed & _MONITORED)):
        return None, f"another {', '.join(meaning)} changes the monitored {'loss' if changed_data else 'metric'}"
    name = best_name(state.best)
    if name == checkpoint_name(state):
        return state, None
    try:
        return restore(source, like, name=name).state, None
    except (FileNotFoundError, CheckpointError) as error:
        return None, f"the model of epoch {state.best.epoch} is missing ({str(error).rstrip('.')})"
