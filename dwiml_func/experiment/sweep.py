"""The configs of a sweep, as an ensemble or one after the other: every combination of the values and the seeds."""

from __future__ import annotations

import itertools
import json
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from dwiml_func._checks import error_text
from dwiml_func.experiment.comparison.run_values import check_known
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import SWEEP_FILE
from dwiml_func.files.atomic import atomic_write

__all__ = ["is_ensemble_sweep", "member_configs", "sweep_configs", "write_sweep"]

_MAX_MEMBERS = 10_000
_MAPPED = ("learning_rate", "weight_decay", "rng")
"""The options that members of an ensemble may differ in."""
_MAX_NAME = 200  # bytes of a folder's name


def is_ensemble_sweep(sweep: Sequence[str]) -> bool:
    """Whether one step can train all members of a sweep: where it is over learning rate, weight decay and seed."""
    return all(_option(text) in _MAPPED for text in sweep)


def member_configs(config: RunConfig, *, num_models: int = 1, sweep: Sequence[str] = ()) -> list[RunConfig]:
    """The configs of all members. `sweep` has NAME=VALUE,VALUE,... of any options.

    `num_models` seeds count up from the config's. Members that differ in their seed see the same batches: those of the
    config's seed, which becomes their `data_rng`.
    """
    return [own for _, own in _combinations(config, num_models, sweep)]


def sweep_configs(config: RunConfig, *, num_models: int = 1, sweep: Sequence[str] = ()) -> dict[str, RunConfig]:
    """The same by the names of the experiments, which say the values: dg-key=gaussian,learning-rate=0.01."""
    found: dict[str, RunConfig] = {}
    for values, own in _combinations(config, num_models, sweep):
        name = re.sub(
            r"[^\w.+=,-]", "_", ",".join(f"{option.replace('_', '-')}={text}" for option, text in values.items())
        )
        if name in found or len(name.encode()) > _MAX_NAME:
            raise ValueError(
                f"--sweep: expected different values, which name the experiments in at most {_MAX_NAME} bytes. "
                f"Received: {name}."
            )
        found[name] = own
    return found


def write_sweep(directory: Path, sweep: Sequence[str]) -> None:
    """Make a folder that of a sweep: its file has the names of the options that were swept first."""
    directory.mkdir(exist_ok=True)
    if not (directory / SWEEP_FILE).exists():
        atomic_write(directory / SWEEP_FILE, json.dumps({"sweep": [*map(_option, sweep)]}) + "\n")


def _combinations(
    config: RunConfig, num_models: int, sweep: Sequence[str]
) -> list[tuple[Mapping[str, str], RunConfig]]:
    """The words and the config of each combination."""
    if num_models < 1:
        raise ValueError(f"num_models: expected a number of at least 1, received {num_models}.")
    swept: dict[str, list[str]] = {}
    for text in sweep:
        name, (_, equals, values) = _option(text), text.partition("=")
        each = values.split(",")
        if not equals or name in swept or not all(each) or len({*each}) < len(each):
            raise ValueError(
                f"--sweep: expected NAME=VALUE,VALUE,... with each NAME once, and different values. Received: {text!r}."
            )
        swept[name] = each
    count = math.prod([num_models, *(len(values) for values in swept.values())])
    if count > _MAX_MEMBERS:
        raise ValueError(f"A sweep has at most {_MAX_MEMBERS} members, each with its folder. Received: {count}.")
    if num_models > 1:
        if "rng" in swept:
            raise ValueError("--num-models and --sweep rng both give seeds. Expected one of them.")
        swept["rng"] = [str(config.training.rng + number) for number in range(num_models)]
    common: dict[str, Any] = {}
    if "rng" in swept and config.training.data_rng is None and "data_rng" not in swept:
        common["data_rng"] = config.training.rng
    parsed = {name: {text: _parse(config, name, text) for text in texts} for name, texts in swept.items()}
    combinations = [dict(zip(swept, words, strict=True)) for words in itertools.product(*swept.values())]
    return [
        (words, _changed(config, common | {name: parsed[name][text] for name, text in words.items()}, words))
        for words in combinations
    ]


def _changed(config: RunConfig, changes: Mapping[str, Any], words: Mapping[str, str]) -> RunConfig:
    """A config with other values of options, checked as a whole."""
    try:
        parts: dict[str, Any] = {}
        for name, part in _parts(config).items():
            own = {each.name: changes[each.name] for each in fields(part) if each.name in changes}
            if own:
                parts[name] = replace(part, **own)
        return replace(config, **parts)
    except ValueError as error:
        given = " ".join(f"{name.replace('_', '-')}={text}" for name, text in words.items())
        raise ValueError(f"--sweep {given}: {error}" if words else str(error)) from None


def _parse(config: RunConfig, name: str, text: str) -> Any:
    """The value of an option from a word of the command line."""
    import pydantic

    known = {each.name: part for part in _parts(config).values() for each in fields(part)}
    if name not in known:
        names = [each.replace("_", "-") for each in known]
        check_known(name.replace("_", "-"), names, what="--sweep: expected the name of an option of a run")
    hint = get_type_hints(type(known[name]))[name]
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if text.lower() == "none" and type(None) in choices:
        return None
    kind: Any = Union[tuple(choice for choice in choices if choice is not type(None))]  # noqa: UP007
    try:
        if get_origin(kind) is not tuple:
            return pydantic.TypeAdapter(kind).validate_strings(text)
        item = pydantic.TypeAdapter(get_args(kind)[0])
        return tuple(item.validate_strings(word) for word in ([text] if name == "rule" else text.split()))
    except pydantic.ValidationError as error:
        raise ValueError(f"--sweep {name.replace('_', '-')}: {error_text(error)}.") from None


def _parts(config: RunConfig) -> dict[str, Any]:
    parts = {each.name: getattr(config, each.name) for each in fields(config) if each.name != "origin"}
    return {name: part for name, part in parts.items() if is_dataclass(part)}


def _option(text: str) -> str:
    return text.partition("=")[0].strip().replace("-", "_")
