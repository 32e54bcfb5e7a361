"""The writers of an experiment's logs, as its config says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwiml_func.config import RunConfig
from dwiml_func.writers.comet import Comet
from dwiml_func.writers.jsonl import jsonl
from dwiml_func.writers.npy import npy
from dwiml_func.writers.tensorboard import tensorboard
from dwiml_func.writers.writer import Writer, fan_out

__all__ = ["experiment_comet", "experiment_writer"]


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
