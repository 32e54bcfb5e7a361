"""The members of a new ensemble: their configs and their directories."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import check_new_experiment, write_ended
from dwiml_func.files.atomic import atomic_directory, remove_leftovers

__all__ = ["create_ensemble", "member_configs"]

_MOST = 10_000
_NAMES = ("learning-rate", "weight-decay", "rng")


def member_configs(config: RunConfig, *, num_models: int = 1, sweep: Sequence[str] = ()) -> list[RunConfig]:
    """The configs of all members: every combination of the values that are swept, and of the seeds.

    Members that differ in their seed see the same batches: those of the config's seed, which becomes their `data_rng`.

    Args:
        config: what they have in common.
        num_models: seeds: the config's and those that follow it.
        sweep: NAME=VALUE,VALUE,... of learning-rate, weight-decay or rng.

    Returns:
        A config for each member, that of an ordinary run.

    Raises:
        ValueError: a value cannot be read or is out of range, a name is another one or comes twice, or
            there would be more than 10,000 models.

    Example:
        >>> config = RunConfig(hdf5_file="data.hdf5")
        >>> [c.training.learning_rate for c in member_configs(config, sweep=["learning-rate=0.1,0.01*3 0.001"])]
        [('0.1',), ('0.01*3', '0.001')]
        >>> [(c.training.rng, c.training.data_rng) for c in member_configs(config, num_models=2)]
        [(1234, 1234), (1235, 1234)]
    """
    if num_models < 1:
        raise ValueError(f"num_models: expected a number of at least 1, received {num_models}.")
    swept: dict[str, list[object]] = {}
    for text in sweep:
        name, equals, values = text.partition("=")
        name = name.replace("_", "-")
        if not equals or name not in _NAMES or name in swept:
            raise ValueError(
                f"--sweep: expected NAME=VALUE,VALUE,... once each of {', '.join(_NAMES)}. Received: {text!r}"
            )
        swept[name] = [_read(name, value) for value in values.split(",")]
    count = math.prod([num_models, *(len(values) for values in swept.values())])
    if count > _MOST:
        raise ValueError(f"An ensemble has at most {_MOST} models, each with its folder. Received: {count} to train.")
    if num_models > 1:
        if "rng" in swept:
            raise ValueError("--num-models and --sweep rng both give seeds. Expected one of them.")
        swept["rng"] = [config.training.rng + number for number in range(num_models)]
    common: dict[str, object] = {}
    if "rng" in swept and config.training.data_rng is None:
        common["data_rng"] = config.training.rng
    fields = [name.replace("-", "_") for name in swept]
    combinations = [common | dict(zip(fields, values, strict=True)) for values in itertools.product(*swept.values())]
    return [replace(config, training=replace(config.training, **changes)) for changes in combinations]  # type: ignore[arg-type]


def create_ensemble(experiments_path: str | Path, experiment_name: str, configs: Sequence[RunConfig]) -> Path:
    """Make an ensemble's directory, with those of its members in it.

    Args:
        experiments_path: folder of all experiments; it exists.
        experiment_name: name of the new folder in it.
        configs: those of the members.

    Returns:
        The directory.

    Raises:
        FileNotFoundError, ValueError: as `dwiml_func.experiment.folder.create_experiment`.

    Example:
        >>> create_ensemble("/no/such/folder", "a", [])
        Traceback (most recent call last):
        ...
        FileNotFoundError: Experiments path '/no/such/folder' is not a folder. Create it, or give another one.
    """
    directory = check_new_experiment(experiments_path, experiment_name)
    remove_leftovers(experiments_path, experiment_name)
    with atomic_directory(directory, replace=False) as temporary:
        write_ended(temporary, len(configs), {})
        for number, config in enumerate(configs):
            (temporary / str(number)).mkdir()
            (temporary / str(number) / "config.json").write_text(config.to_json())
    return directory


def _read(name: str, value: str) -> object:
    try:
        return (
            tuple(value.split()) if name == "learning-rate" else float(value) if name == "weight-decay" else int(value)
        )
    except ValueError:
        raise ValueError(f"--sweep {name}: cannot read {value!r} as a number.") from None
