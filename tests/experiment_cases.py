"""Small experiments in this process, for the tests of what makes, trains and resumes them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from dwiml_func import EpochReport, TrainState
from dwiml_func.checkpoint.checkpoint import read, restore
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.data.config import BatchConfig
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import create_experiment, read_config
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models.config import ModelConfig

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
MODEL = ModelConfig(rnn_layer_sizes=(8,), dg_dropout=0.25)
BATCHES = BatchConfig(batch_size_training=40, batch_size_validation=20)
CONFIG = RunConfig(hdf5_file=str(PHANTOM), model=MODEL, batches=BATCHES, training=TrainingConfig(max_epochs=2))


def trained(parent: Path, config: RunConfig, name: str = "run") -> Path:
    directory = create_experiment(parent, name, config)
    list(run_experiment(directory, prepare(config)))
    return directory


def latest_digest(directory: Path) -> str:
    """The digest of the latest state, computed from the bytes on disk."""
    return state_digest(read(directory).state)


def restored(directory: Path, *, name: str | None = None) -> tuple[TrainState, tuple[EpochReport, ...]]:
    checkpoint = restore(directory, prepare(read_config(directory)).first_state(), name=name)
    return checkpoint.state, checkpoint.history


def without_digests(history: tuple[EpochReport, ...]) -> tuple[EpochReport, ...]:
    return tuple(replace(report, digest=None) for report in history)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def without_validation(folder: Path) -> Path:
    path = folder / "no_validation.hdf5"
    shutil.copy(PHANTOM, path)
    with h5py.File(path, "r+") as file:
        file.attrs["validation_subjs"] = np.array([], dtype=float)  # as the reference writes an empty list
    return path


def train_stopped_early(parent: Path) -> Path:
    """Two epochs that learn and two that cannot: the best is epoch 2, and patience ends the run after epoch 4."""
    rates = TrainingConfig(max_epochs=9, patience=2, learning_rate=("0.01*2", "1e-30"))
    return trained(parent, replace(CONFIG, training=rates))
