"""The configs of an ensemble's members: every combination of the swept values and the seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from dwiml_func.experiment.config import RunConfig

__all__ = ["member_configs"]

_MAX_MEMBERS = 10_000
_NAMES = ("learning-rate", "weight-decay", "rng")


def member_configs(config: RunConfig, *, num_models: int = 1, sweep: Sequence[str] = ()) -> list[RunConfig]:
    """The configs of all members. `sweep` has NAME=VALUE,VALUE,... of learning-rate, weight-decay or rng.

    `num_models` seeds count up from the config's. Members that differ in their seed see the same batches: those of the
    config's seed, which becomes their `data_rng`.
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
        swept[name] = [_parse_value(name, value) for value in values.split(",")]
    count = math.prod([num_models, *(len(values) for values in swept.values())])
    if count > _MAX_MEMBERS:
        raise ValueError(f"An ensemble has at most {_MAX_MEMBERS} members, each with its folder. Received: {count}.")
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


def _parse_value(name: str, value: str) -> object:
    if name == "learning-rate":
        return tuple(value.split())
    try:
        return float(value) if name == "weight-decay" else int(value)
    except ValueError:
        raise ValueError(f"--sweep {name}: cannot read {value!r} as a number.") from None
