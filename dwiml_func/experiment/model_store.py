"""Whether a model fits into memory, found out before any of it is taken.

A trained model on disk: `best_model/`, which loads without optimizer, trainer or dataset.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwiml_func._checks import truncated_repr
from dwiml_func.checkpoint.arrays import load_leaves, read_manifest, save_leaves
from dwiml_func.checkpoint.digest import leaf_differences
from dwiml_func.checkpoint.manifest import CorruptError, first_problem
from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.core.state import TrainState
from dwiml_func.data.neighborhood import Neighborhood
from dwiml_func.experiment.config import ModelConfig, RunConfig, config_from_json
from dwiml_func.experiment.folder import is_ensemble
from dwiml_func.models.learn2track import Learn2Track

__all__ = [
    "LoadedModel",
    "build_model",
    "check_memory",
    "filled_model",
    "find_model",
    "load_model",
    "model_shapes",
    "save_model",
]

_BYTES = 4 * 4  # a parameter, its gradient and two moments, float32


def check_memory(config: ModelConfig, *, nb_features: int, neighborhood: Neighborhood | None = None) -> None:
    """Refuse a model that cannot be trained in this machine's memory, whatever the batches are.

    Args:
        config: the options.
        nb_features: features of the input volume at a point.
        neighborhood: where around each point the volume is read too.

    Raises:
        ValueError: its parameters, their gradients and moments take more than all memory.

    Example:
        >>> check_memory(ModelConfig(rnn_layer_sizes=(10**9,)), nb_features=3)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: The layers of this model are too large (rnn_layer_sizes (1000000000,)): it has ...
    """
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    build = partial(build_model, config, nb_features=nb_features, neighborhood=neighborhood)
    try:
        num_parameters: float = sum(tensor.numel() for tensor in model_shapes(build).values())
    except OverflowError:
        num_parameters = math.inf
    if _BYTES * num_parameters > available:
        count = f"{num_parameters:.3g}" if math.isfinite(num_parameters) else "more than 1e18"
        raise ValueError(
            f"The layers of this model are too large (rnn_layer_sizes {config.rnn_layer_sizes}): it has {count} "
            f"parameters, training takes {_BYTES} bytes for each, and this machine has {available / 1e9:.3g} GB of "
            f"memory. Choose smaller ones."
        )


MANIFEST = "model.json"
_LAYOUT = 2  # of the facts in the manifest
_DATA_FACTS = (
    *("input_group_name", "streamline_group_name", "interpolation"),
    *("neighborhood_type", "neighborhood_radius", "neighborhood_resolution"),
)
_BATCH_FACTS = ("step_size", "nb_points", "compress")
_STEP_RULE = "step_rule"  # older directories do not have it


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that was read from disk.

    Args:
        module: the model, in evaluation mode.
        config: what the model is and what data it is for: the options of the model, of the data and of resampling.
            Further ones were not recorded and have their defaults, and the dataset has no name.
        facts: what was recorded with it: `class`, `nb_features`, `options`, `epoch`, ...

    Example:
        >>> LoadedModel.__slots__
        ('module', 'config', 'facts')
    """

    module: Learn2Track
    config: RunConfig
    facts: Mapping[str, Any]


def build_model(config: ModelConfig, *, nb_features: int, neighborhood: Neighborhood | None = None) -> Learn2Track:
    """Make a model from its options, with parameters drawn from torch's generator.

    Args:
        config: the options.
        nb_features: features of the input volume at a point.
        neighborhood: where around each point the volume is read too.

    Returns:
        A new module.

    Example:
        >>> build_model(ModelConfig(rnn_layer_sizes=(4,)), nb_features=3)(batch)  # doctest: +SKIP
    """
    return Learn2Track(nb_features, neighborhood=neighborhood, **config.arguments)


def model_shapes(build: Callable[[], Learn2Track]) -> dict[str, Tensor]:
    """The state of a model without its values, which takes no memory whatever the options say.

    Args:
        build: makes the model.

    Returns:
        Parameters and buffers by name, on torch's device "meta".

    Raises:
        OverflowError: torch has no number for the size of one.

    Example:
        >>> model_shapes(lambda: Learn2Track(6, rnn_layer_sizes=(10**6,)))["rnn_model.rnn_0.bias_ih_l0"].shape
        torch.Size([4000000])
    """
    try:
        with torch.device("meta"), torch_rng(Key(0)):
            return build().state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:  # torch has one or the other for it
        if not isinstance(error, OverflowError) and "overflow" not in str(error).lower():
            raise
        raise OverflowError("No machine can hold a model of the sizes in its options.") from None


def save_model(
    path: str | Path, state: TrainState, config: RunConfig, *, nb_features: int, facts: Mapping[str, Any]
) -> None:
    """Write a state's parameters and buffers, and what it takes to build the module again and to feed it.

    Args:
        path: the directory; it appears by one rename, and replaces one that stands there.
        state: the run.
        config: the run's config, of which the options of the model, the data and the resampling are recorded.
        nb_features: features of the input volume at a point.
        facts: further JSON data, e.g. the loss.

    Example:
        >>> save_model("best_model", state, config, nb_features=28, facts={})  # doctest: +SKIP
    """
    described = {"class": "Learn2Track", "layout": _LAYOUT, "nb_features": nb_features, "options": asdict(config.model)}
    described |= {name: getattr(config.data, name) for name in _DATA_FACTS}
    described |= {name: getattr(config.batches, name) for name in (*_BATCH_FACTS, _STEP_RULE)}
    leaves = {**state.params, **state.buffers}
    save_leaves(Path(path), leaves, described | {"epoch": state.epoch, **facts}, manifest_name=MANIFEST)


def load_model(path: str | Path) -> LoadedModel:
    """Read a model directory.

    Args:
        path: a directory that `save_model` wrote.

    Returns:
        The module, its config and the recorded facts.

    Raises:
        FileNotFoundError: there is none.
        CorruptError: it is corrupt.
        ValueError: it holds another class of model, or is of an older layout.

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
        raise ValueError(f"{path} holds a model of class {truncated_repr(facts['class'])}; expected 'Learn2Track'.")
    if facts.get("layout") != _LAYOUT:
        raise ValueError(
            f"{path} has layout {facts.get('layout', 1)} of model directories; this version reads layout {_LAYOUT}. "
            f"Read it with the version of dwiml_func that wrote it, or train the model again."
        )
    if missing := [name for name in (*_DATA_FACTS, *_BATCH_FACTS) if name not in facts]:
        raise CorruptError(f"{path} is corrupt: {MANIFEST} lacks {', '.join(missing)}.")
    recorded = {
        "hdf5_file": "",
        "model": facts["options"],
        "data": {name: facts[name] for name in _DATA_FACTS},
        "batches": {name: facts[name] for name in (*_BATCH_FACTS, _STEP_RULE) if name in facts},
    }
    try:
        config = config_from_json(json.dumps(recorded), source=str(path / MANIFEST))
        build = partial(
            build_model, config.model, nb_features=facts["nb_features"], neighborhood=config.data.neighborhood
        )
        expected = model_shapes(build)
    except (ValueError, TypeError, OverflowError) as error:
        raise CorruptError(
            f"{path} is corrupt: {MANIFEST} has no options of a model ({first_problem(error)})."
        ) from None
    if differences := leaf_differences(facts["leaves"], expected):
        raise CorruptError(f"{path} is corrupt: its tensors are not those of its options: {'; '.join(differences)}.")
    module = filled_model(build, load_leaves(path, facts), source=str(path))
    return LoadedModel(module=module, config=config, facts=facts)


def filled_model(build: Callable[[], Learn2Track], tensors: Mapping[str, Tensor], *, source: str) -> Learn2Track:
    """Build a model with given parameters, after all of them were found to fit.

    Args:
        build: makes the model. It is first called for its shapes alone, which takes no memory.
        tensors: by name, one for each parameter and buffer of the model's state.
        source: what to call the tensors in an error.

    Returns:
        The model, in evaluation mode. No random generator of the caller has moved.

    Raises:
        ValueError: names, shapes or types differ, or a value is not finite; one line says all of it.

    Example:
        >>> filled_model(lambda: Learn2Track(6), {"b": torch.ones(1)}, source="state")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: state does not fit the model: no rnn_model.rnn_0.weight_ih_l0; no ...; unexpected b.
    """
    try:
        expected = model_shapes(build)
    except OverflowError as error:
        raise ValueError(f"{source} does not fit the model: {error}") from None
    problems = [f"no {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    for name in [name for name in expected if name in tensors]:
        if tensors[name].shape != expected[name].shape:
            shapes = tuple(tensors[name].shape), tuple(expected[name].shape)
            problems.append(f"{name} of shape {shapes[0]}, expected {shapes[1]}")
        elif tensors[name].dtype != expected[name].dtype:
            problems.append(f"{name} of type {tensors[name].dtype}, expected {expected[name].dtype}")
        elif not tensors[name].isfinite().all():
            problems.append(f"{name} with values that are not finite")
    if problems:
        raise ValueError(f"{source} does not fit the model: {'; '.join(problems)}.")
    with torch_rng(Key(0)):  # the draws are overwritten
        module = build()
    module.load_state_dict(dict(tensors))
    return module.eval()


def find_model(path: str | Path) -> Path:
    """Find the model directory that a user means by a folder: the folder itself, or its best model.

    Args:
        path: a model directory, or an experiment.

    Returns:
        The model directory.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is neither; what it is instead, if that can be told.

    Example:
        >>> find_model("/no/such/model")
        Traceback (most recent call last):
        ...
        FileNotFoundError: '/no/such/model' is not a folder. Expected a model directory or an experiment.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{str(path)!r} is not a folder. Expected a model directory or an experiment.")
    for folder in (path, path / "best_model"):
        if (folder / MANIFEST).is_file():
            return folder
    for folder in (path, path / "best_model"):
        if (folder / "model_state.pkl").is_file():
            raise ValueError(f"{str(folder)!r} holds a model of dwi_ml. First run dwiml-func import-dwi-ml on it.")
    if (path / "config.json").is_file():
        raise ValueError(f"Experiment {str(path)!r} has no best model yet. Train it for an epoch.")
    if is_ensemble(path):
        raise ValueError(f"{str(path)!r} is an ensemble. Name one of its members, such as {path / '0'}.")
    raise ValueError(f"{str(path)!r} is neither a model directory (no {MANIFEST}) nor an experiment (no config.json).")
