"""The writers of an experiment's logs, as its config asks, and dwi_ml's file of its options."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from dwiml_func.experiment.comparison.compare import flatten
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.learning_rate import parse_rates
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.files.atomic import atomic_write
from dwiml_func.writers.comet import Comet
from dwiml_func.writers.jsonl import jsonl
from dwiml_func.writers.npy import npy
from dwiml_func.writers.tensorboard import tensorboard
from dwiml_func.writers.writer import StepWriter, Writer, fan_out

__all__ = ["experiment_comet", "experiment_writer", "read_parameters", "run_parameters", "write_parameters"]


_PARAMETERS = "parameters_latest.json"


def write_parameters(directory: str | Path, config: RunConfig, *, nb_features: int, now: datetime) -> None:
    """Write a run's options to dwi_ml's file, under dwi_ml's headings, for its scripts to read."""
    content = {"Date": str(now), **run_parameters(config, nb_features=nb_features)}
    atomic_write(Path(directory) / _PARAMETERS, json.dumps(content, indent=4) + "\n")


def read_parameters(directory: str | Path) -> dict[str, Any]:
    """What `run_parameters` gave for the run's last start; nothing where the file is missing or corrupt."""
    try:
        content = json.loads((Path(directory) / _PARAMETERS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: value for name, value in content.items() if name != "Date"} if isinstance(content, dict) else {}


def run_parameters(config: RunConfig, *, nb_features: int | None) -> dict[str, Any]:
    """A run's options under dwi_ml's headings."""
    training, batches = asdict(config.training), asdict(config.batches)
    patience, patience_delta = training.pop("patience"), training.pop("patience_delta")
    training["learning_rate"] = _rates(config.training)
    options = ("batch_size_units", "nb_streamlines_per_chunk", "nb_subjects_per_batch", "cycles")
    sampler = {name: batches[name] for name in ("batch_size_training", "batch_size_validation", *options)}
    return {
        "hdf5 file": config.hdf5_file,
        "Trainer params": training | {name: value for name, value in batches.items() if name not in sampler},
        "Sampler params": sampler | {"rng": config.training.rng},
        "Loader params": asdict(config.data),
        "Model params": {"nb_features": nb_features, **asdict(config.model)},
        "Patience": patience,
        "Patience_delta": patience_delta,
    }


def experiment_writer(directory: str | Path, config: RunConfig) -> StepWriter:
    """Make one writer of all that the config asks for; it raises nothing."""
    writers: list[Writer] = [npy(directory), jsonl(directory)]
    if config.logging.tensorboard:
        writers.append(tensorboard(directory))
    if config.logging.uses_comet:
        writers.append(experiment_comet(directory, config))
    return fan_out(*writers)


def experiment_comet(directory: str | Path, config: RunConfig, **options: Any) -> Comet:
    """Make the Comet writer, with the run's options as parameters; `options` replace those of the config."""
    logging, origin = config.logging, config.origin
    named = {name.rpartition(".")[2]: value for name, value in flatten(config.to_dict()).items()}  # they are unique
    defaults = {
        "workspace": logging.comet_workspace,
        "project": logging.comet_project,
        "parameters": {
            name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in named.items()
        },
        "branch": "" if origin is None else f"{origin.digest} {Path(directory).absolute().name}",
    }
    return Comet(directory, **(defaults | options))


def _rates(training: TrainingConfig) -> tuple[float, ...] | str:
    """The rates of the epochs, as dwi_ml writes them; a schedule in words as text."""
    text = " ".join(training.learning_rate)
    try:
        return parse_rates(text.split(), text)
    except ValueError:
        return text
