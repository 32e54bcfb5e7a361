"""What a resume compares with what a run recorded: its options, its data and what computes."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dwiml_func._checks import at_most_three
from dwiml_func.checkpoint.checkpoint import Checkpoint
from dwiml_func.checkpoint.provenance import environment_differences, environment_of
from dwiml_func.core.state import TrainState
from dwiml_func.experiment.comparison.compare import differing
from dwiml_func.experiment.config import RunConfig, config_from_json
from dwiml_func.experiment.logs import read_parameters, run_parameters
from dwiml_func.files.fingerprint import same_file

__all__ = ["check_same_config", "check_same_data", "may_change", "warn_of_other_environment", "with_defaults"]

_MAY_CHANGE = ("max_epochs", "patience", "Patience", "processes", "skip_batches", "lazy", "cache_size")
_DECIDE_BITS = {"dwiml_func", "torch", "numpy", "machine", "cpu", "cpu_capability", "devices"}

_log = logging.getLogger(__name__)


def check_same_config(
    directory: Path, config: RunConfig, recorded: Checkpoint | None, *, accept: Collection[str] = ()
) -> None:
    """Raise ValueError where `config.json` has other options than the newest checkpoint recorded.

    Before the first checkpoint, the options in `parameters_latest.json` count. Options of which a resume may give new
    values only bring a warning, and so do those that `accept` names, such as model.dropout or dropout.
    """
    if recorded is not None:
        source, found = f"checkpoint {recorded.name}", differing(with_defaults(recorded.config), config.to_dict())
    else:
        source, parameters = "parameters_latest.json", read_parameters(directory)
        now = run_parameters(config, nb_features=parameters.get("Model params", {}).get("nb_features"))
        found = differing(parameters, now, only_common=True)
    texts = {
        name: f"{name} {new}, recorded {old}"
        for name, (old, new) in found.items()
        if name not in ("hdf5_file", "hdf5 file")  # the data are compared, wherever they are
    }
    has_shards = config.training.num_shards > 1
    fixed = [name for name in texts if not may_change(name, has_shards=has_shards)]
    if refused := [name for name in fixed if not {name, _option(name)} & set(accept)]:
        raise ValueError(
            f"Expected the options that {source} recorded. Received in {directory / 'config.json'}: "
            f"{at_most_three([texts[name] for name in refused])}. "
            f"Put them back, or accept them: --accept {' '.join(map(_option, refused))}"
        )
    if texts:
        _log.warning("%s is not what %s recorded: %s.", directory / "config.json", source, "; ".join(texts.values()))


def check_same_data(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Raise ValueError when the config's dataset is plainly not the one that the checkpoint recorded.

    A file of the same size and time is believed here: its hash is compared while the run trains.
    """
    if checkpoint.data and not same_file(checkpoint.data, config.hdf5_file):
        raise ValueError(
            f"Expected the dataset that this run was trained on. Received: {config.hdf5_file}, whose bytes differ. "
            f"To train on other data, use dwiml-func fork."
        )


def warn_of_other_environment(checkpoint: Checkpoint, like: TrainState) -> None:
    """Warn where other versions or another machine than those of the checkpoint would continue."""
    now = environment_of(like)
    recorded = {name: value for name, value in checkpoint.environment.items() if name in _DECIDE_BITS}
    changes = environment_differences(recorded, {name: now[name] for name in recorded})
    if changes:
        _log.warning(
            "From here on, results may not be bitwise identical: checkpoint %s comes from other versions or another "
            "machine (%s).",
            checkpoint.name,
            "; ".join(changes),
        )


def may_change(name: str, *, has_shards: bool = False) -> bool:
    """Whether a resume may give another value of an option; with shards, the number of threads is one."""
    option = _option(name)
    return (
        option in _MAY_CHANGE
        or (has_shards and option == "num_threads")
        or name.startswith(("checkpoints.", "logging."))
    )


def _option(name: str) -> str:
    return name.rpartition(".")[2]


def with_defaults(recorded: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recorded config with the options that its version did not have yet."""
    try:
        return config_from_json(json.dumps(recorded), source="a recorded config").to_dict()
    except ValueError:
        return recorded
