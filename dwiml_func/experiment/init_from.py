"""A new experiment that starts from the weights of another model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dwiml_func.checkpoint.checkpoint import write
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.core.state import TrainState
from dwiml_func.experiment.config import Origin
from dwiml_func.experiment.folder import create_experiment
from dwiml_func.experiment.pretrained import PretrainedReport, load_pretrained
from dwiml_func.experiment.setup import RunParts

__all__ = ["create_initialized", "initialize_from"]


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
