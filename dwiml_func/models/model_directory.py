"""A trained model on disk: `best_model/`, which loads without optimizer, trainer or dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dwiml_func.config import ModelConfig
from dwiml_func.config_checks import require, shown
from dwiml_func.digest import leaf_differences
from dwiml_func.leaf_store import load_leaves, read_manifest, save_leaves
from dwiml_func.manifest import DamagedError
from dwiml_func.manifest_schema import first_problem
from dwiml_func.models.learn2track import Learn2Track
from dwiml_func.rng import Key, torch_rng
from dwiml_func.state import TrainState

__all__ = ["LoadedModel", "build_model", "load_model", "save_model"]

MANIFEST = "model.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that was read from disk.

    Args:
        module: the model, in evaluation mode.
        facts: what was recorded with it: `class`, `options`, `epoch`, `interpolation`, ...

    Example:
        >>> LoadedModel.__slots__
        ('module', 'facts')
    """

    module: torch.nn.Module
    facts: Mapping[str, Any]


def build_model(config: ModelConfig, *, nb_features: int) -> Learn2Track:
    """Make a model from its options, with parameters drawn from torch's generator.

    Args:
        config: the options.
        nb_features: features of the input volume at a point.

    Returns:
        A new module.

    Example:
        >>> build_model(ModelConfig(rnn_layer_sizes=(4,)), nb_features=3)(batch)  # doctest: +SKIP
    """
    return Learn2Track(nb_features, **asdict(config))


def save_model(
    path: str | Path, state: TrainState, config: ModelConfig, *, nb_features: int, facts: Mapping[str, Any]
) -> None:
    """Write a state's parameters and buffers, and what it takes to build the module again.

    Args:
        path: the directory; it appears by one rename, and replaces one that stands there.
        state: the run.
        config: the model's options.
        nb_features: features of the input volume at a point.
        facts: further JSON data, e.g. the interpolation that the model was trained with.

    Example:
        >>> save_model("best_model", state, config.model, nb_features=28, facts={})  # doctest: +SKIP
    """
    described = {"class": "Learn2Track", "nb_features": nb_features, "options": asdict(config)}
    leaves = {**state.params, **state.buffers}
    save_leaves(Path(path), leaves, described | {"epoch": state.epoch, **facts}, manifest_name=MANIFEST)


def load_model(path: str | Path) -> LoadedModel:
    """Read a model directory.

    Args:
        path: a directory that `save_model` wrote.

    Returns:
        The module and the recorded facts.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: it is damaged.
        ValueError: it holds another class of model.

    Example:
        >>> load_model("/no/such/model")
        Traceback (most recent call last):
        ...
        FileNotFoundError: No model.json in /no/such/model.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(f"No {MANIFEST} in {path}.")
    facts = read_manifest(path, MANIFEST, needs=("class", "options", "nb_features"))
    if facts["class"] != "Learn2Track":
        raise ValueError(f"{path} holds a model of class {shown(facts['class'])}; expected 'Learn2Track'.")
    import pydantic

    try:
        config = pydantic.TypeAdapter(ModelConfig).validate_json(json.dumps(facts["options"]))
        require("nb_features", facts["nb_features"], at_least=1)
        with torch_rng(Key(0)), torch.device("meta"):  # sizes alone: whatever the options say, this takes no memory
            expected = build_model(config, nb_features=facts["nb_features"]).state_dict()
    except (ValueError, TypeError) as error:
        raise DamagedError(
            f"{path} is damaged: {MANIFEST} has no options of a model ({first_problem(error)})."
        ) from None
    if differences := leaf_differences(facts["leaves"], expected):
        raise DamagedError(f"{path} is damaged: its tensors are not those of its options: {'; '.join(differences)}.")
    leaves = load_leaves(path, facts)
    with torch_rng(Key(0)):  # the draws are overwritten; the caller's generator must not move
        module = build_model(config, nb_features=facts["nb_features"])
    module.load_state_dict(leaves)
    return LoadedModel(module=module.eval(), facts=facts)
