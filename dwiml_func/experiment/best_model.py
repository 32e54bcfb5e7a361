"""An experiment's `best_model/`: written at each best epoch, and made whole again after a crash."""

from __future__ import annotations

import logging
from pathlib import Path

from dwiml_func.checkpoint.arrays import CheckpointError, load_leaves, read_manifest
from dwiml_func.checkpoint.checkpoint import restore
from dwiml_func.core.state import TrainState
from dwiml_func.experiment.model_store import MANIFEST, save_model
from dwiml_func.experiment.setup import RunParts

__all__ = ["repair_best_model", "save_best_model"]


def save_best_model(directory: Path, setup: RunParts, state: TrainState) -> None:
    """Write the model of a best epoch.

    Args:
        directory: the experiment.
        setup: its parts.
        state: the run after that epoch.

    Example:
        >>> save_best_model(directory, setup, state)  # doctest: +SKIP
    """
    facts = {"loss": state.best.value}
    save_model(directory / "best_model", state, setup.config, nb_features=setup.nb_features, facts=facts)


def repair_best_model(directory: Path, setup: RunParts, state: TrainState) -> None:
    """Write the best model again from its checkpoint where a crash came between the two, or where it is corrupt.

    Args:
        directory: the experiment.
        setup: its parts.
        state: the run, whose best epoch counts.

    Example:
        >>> repair_best_model(directory, setup, state)  # doctest: +SKIP
    """
    best, path = state.best.epoch, directory / "best_model"
    if best is None or _epoch_written(path) == best:
        return
    try:
        best_state = restore(directory, setup.state, name=str(best)).state
    except (FileNotFoundError, CheckpointError) as error:
        logging.getLogger(__name__).warning(
            "%s is not the model of the best epoch, %d, and cannot be written again: %s The next better epoch will.",
            path,
            best,
            error,
        )
        return
    save_best_model(directory, setup, best_state)


def _epoch_written(path: Path) -> int | None:
    """The epoch whose model stands there, whole."""
    try:
        facts = read_manifest(path, MANIFEST)
        load_leaves(path, facts)
    except (FileNotFoundError, CheckpointError):
        return None
    return facts.get("epoch")
