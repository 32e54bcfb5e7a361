"""`parameters_latest.json`: a run's options in the reference's file and under its headings, for its scripts to read."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from dwiml_func.config import RunConfig
from dwiml_func.files.atomic import atomic_write

__all__ = ["write_parameters"]


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
