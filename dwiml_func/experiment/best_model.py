"""An experiment's `best_model/`: written at each best epoch, and repaired after a crash."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dwiml_func.checkpoint.arrays import load_leaves
from dwiml_func.checkpoint.checkpoint import restore
from dwiml_func.checkpoint.index import best_name, position_name
from dwiml_func.checkpoint.manifest import CheckpointError, read_manifest
from dwiml_func.core.state import TrainState
from dwiml_func.core.weights import with_eval_params
from dwiml_func.experiment.model_store import MANIFEST, save_model
from dwiml_func.experiment.optimizers import configured_optimizer
from dwiml_func.experiment.setup import RunParts
from dwiml_func.experiment.training_facts import TRAINED_ON, training_facts

__all__ = ["repair_best_model", "save_best_model", "save_evaluated"]


def save_best_model(directory: Path, state: TrainState, parts: RunParts) -> None:
    """Write the model of the best state, with the parameters that were evaluated."""
    save_evaluated(directory, with_eval_params(state, configured_optimizer(parts.config.training)), parts)


def save_evaluated(directory: Path, state: TrainState, parts: RunParts) -> None:
    """Write the best model of a state that has the parameters that were evaluated in place of its own."""
    value, monitor = state.best.value, parts.config.training.monitor
    facts: dict[str, Any] = {"loss": value} if monitor == "loss" else {"monitor": monitor, "monitored": value}
    if state.batch:
        facts["batch"] = state.batch
    facts[TRAINED_ON] = training_facts(parts.data.training)
    save_model(directory / "best_model", state, parts.config, nb_features=parts.nb_features, facts=facts)


def repair_best_model(directory: Path, state: TrainState, parts: RunParts) -> None:
    """Write the model of the state's best epoch from its checkpoint, where the folder has another one or is corrupt."""
    best, path = best_name(state.best), directory / "best_model"
    if best is None or _written(path) == best:
        return
    try:
        best_state = restore(directory, state, name=best).state
    except (FileNotFoundError, CheckpointError) as error:
        logging.getLogger(__name__).warning(
            "%s is not the model of the best epoch, %s, and cannot be repaired: %s The next best epoch replaces it.",
            path,
            best,
            error,
        )
        return
    save_best_model(directory, best_state, parts)


def _written(path: Path) -> str | None:
    """The checkpoint's name of the model in the folder; None if it is missing or corrupt."""
    try:
        facts = read_manifest(path, MANIFEST)
        load_leaves(path, facts)
    except (FileNotFoundError, CheckpointError):
        return None
    return position_name(facts["epoch"], facts.get("batch", 0)) if "epoch" in facts else None
