"""`parameters_latest.json`: a run's options in the reference's file and under its headings, for its scripts to read.

The writers of an experiment's logs, as its config says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from dwiml_func.experiment.config import RunConfig
from dwiml_func.files.atomic import atomic_write
from dwiml_func.writers.comet import Comet
from dwiml_func.writers.jsonl import jsonl
from dwiml_func.writers.npy import npy
from dwiml_func.writers.tensorboard import tensorboard
from dwiml_func.writers.writer import Writer, fan_out

__all__ = ["experiment_comet", "experiment_writer", "write_parameters"]


def write_parameters(directory: str | Path, config: RunConfig, *, nb_features: int, now: datetime) -> None:
    """Write the file.

    Args:
        directory: the experiment.
        config: the run's config.
        nb_features: features of the input volume at a point.
        now: the time to record.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     config = RunConfig(hdf5_file="data.hdf5")
        ...     write_parameters(directory, config, nb_features=28, now=datetime(2026, 1, 1))
        ...     json.loads((Path(directory) / "parameters_latest.json").read_text())["Patience_delta"]
        1e-06
    """
    training, batches = asdict(config.training), asdict(config.batches)
    patience, patience_delta = training.pop("patience"), training.pop("patience_delta")
    training["learning_rate"] = config.training.learning_rates
    options = ("batch_size_units", "nb_streamlines_per_chunk", "nb_subjects_per_batch", "cycles")
    sampler = {name: batches[name] for name in ("batch_size_training", "batch_size_validation", *options)}
    content = {
        "Date": str(now),
        "hdf5 file": config.hdf5_file,
        "Trainer params": training | {name: value for name, value in batches.items() if name not in sampler},
        "Sampler params": sampler | {"rng": config.training.rng},
        "Loader params": asdict(config.data),
        "Model params": {"nb_features": nb_features, **asdict(config.model)},
        "Patience": patience,
        "Patience_delta": patience_delta,
    }
    atomic_write(Path(directory) / "parameters_latest.json", json.dumps(content, indent=4) + "\n")


def experiment_writer(directory: str | Path, config: RunConfig) -> Writer:
    """All writers of an experiment as one.

    Args:
        directory: the experiment.
        config: the run's config.

    Returns:
        The writer; it raises nothing.

    Example:
        >>> write = experiment_writer("experiments/first_run", RunConfig(hdf5_file="data.hdf5"))
    """
    writers: list[Writer] = [npy(directory), jsonl(directory)]
    if config.logging.tensorboard:
        writers.append(tensorboard(directory))
    if config.logging.uses_comet:
        writers.append(experiment_comet(directory, config))
    return fan_out(*writers)


def experiment_comet(directory: str | Path, config: RunConfig, **options: Any) -> Comet:
    """The writer that logs an experiment with Comet, with the run's options as parameters.

    Args:
        directory: the experiment.
        config: the run's config.
        **options: further ones of `Comet`; they replace those of the config.

    Returns:
        The writer.

    Example:
        >>> comet = experiment_comet("experiments/first_run", RunConfig(hdf5_file="data.hdf5"))
    """
    logging, origin = config.logging, config.origin
    defaults = {
        "workspace": logging.comet_workspace,
        "project": logging.comet_project,
        "parameters": _flat(config.to_dict()),
        "branch": "" if origin is None else f"{origin.digest} {Path(directory).absolute().name}",
    }
    return Comet(directory, **(defaults | options))


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options by their names on the command line, which no two of them share; lists as text."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value)
        else:
            flat[name] = " ".join(map(str, value)) if isinstance(value, list) else value
    return flat
