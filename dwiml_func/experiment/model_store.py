"""A trained model on disk: `best_model/`, which loads without optimizer, trainer or dataset."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dwiml_func._checks import at_most_three, error_text, truncated_repr
from dwiml_func.checkpoint.arrays import load_leaves, save_leaves
from dwiml_func.checkpoint.digest import leaf_differences
from dwiml_func.checkpoint.manifest import CorruptError, read_manifest
from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.core.state import TrainState
from dwiml_func.data.neighborhood import Neighborhood
from dwiml_func.experiment.config import RunConfig, config_from_json
from dwiml_func.experiment.folder import is_ensemble
from dwiml_func.models.autoencoder.autoencoder import Autoencoder
from dwiml_func.models.config import ModelConfig, build_model, model_shapes
from dwiml_func.models.tractography_model import TractographyModel

__all__ = ["MANIFEST", "LoadedModel", "check_memory", "filled_model", "find_model", "load_model", "save_model"]

MANIFEST = "model.json"
"""The file that makes a folder a model directory."""

_CLASSES = ("Learn2Track", "Transformer", "Autoencoder")
_LAYOUT = 2  # of the facts in the manifest
_DATA_FACTS = (
    *("input_group_name", "streamline_group_name", "interpolation"),
    *("neighborhood_type", "neighborhood_radius", "neighborhood_resolution"),
)
_BATCH_FACTS = ("step_size", "nb_points", "compress")
_STEP_RULE = "step_rule"  # older directories do not have it
_BYTES = 4 * 4  # a parameter, its gradient and two tensors of optimizer state, float32


_Model = TypeVar("_Model", bound=torch.nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model read from disk, in evaluation mode.

    `config` has the recorded options: of the model, the data and the resampling. Others have their defaults, and the
    dataset has no name. `facts` has all that was recorded: `class`, `nb_features`, `options`, `epoch`, ...
    """

    module: TractographyModel | Autoencoder
    config: RunConfig
    facts: Mapping[str, Any]

    @property
    def tracker(self) -> TractographyModel:
        """The module, where it tracks; ValueError for an autoencoder."""
        if isinstance(self.module, Autoencoder):
            raise ValueError("Expected a model that tracks. Received: an autoencoder, which does not.")
        return self.module


def save_model(
    path: str | Path, state: TrainState, config: RunConfig, *, nb_features: int, facts: Mapping[str, Any]
) -> None:
    """Write a state's parameters and buffers, and what building and feeding the module requires, to a directory.

    It appears by one rename, replacing an older one. `facts` are further JSON data, e.g. the loss.
    """
    kind = _CLASSES[{"learn2track": 0, "autoencoder": 2}.get(config.model.model, 1)]
    described = {"class": kind, "layout": _LAYOUT, "nb_features": nb_features, "options": asdict(config.model)}
    described |= {name: getattr(config.data, name) for name in _DATA_FACTS}
    described |= {name: getattr(config.batches, name) for name in (*_BATCH_FACTS, _STEP_RULE)}
    leaves = {**state.params, **state.buffers}
    save_leaves(Path(path), leaves, described | {"epoch": state.epoch, **facts}, manifest_name=MANIFEST)


def load_model(path: str | Path) -> LoadedModel:
    """Read a model directory.

    Args:
        path: a directory that `save_model` wrote, such as an experiment's `best_model`.

    Returns:
        The module in evaluation mode (`module`), its config (`config`) and the recorded facts (`facts`).

    Raises:
        FileNotFoundError: there is no model at that path.
        CorruptError: the model is corrupt.
        ValueError: it is a model of another class or of an older layout.

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
    if facts["class"] not in _CLASSES:
        received = truncated_repr(facts["class"])
        raise ValueError(f"{path}: expected a model of class {', '.join(_CLASSES)}, received {received}.")
    if facts.get("layout") != _LAYOUT:
        raise ValueError(
            f"{path}: expected layout {_LAYOUT} of model directories, received {facts.get('layout', 1)}. "
            "Read it with the version of dwiml_func that wrote it, or train the model again."
        )
    if missing := [name for name in (*_DATA_FACTS, *_BATCH_FACTS) if name not in facts]:
        raise CorruptError(f"{path} is corrupt: {MANIFEST} lacks {at_most_three(missing, ', ')}.")
    recorded = {
        "hdf5_file": "",
        "model": facts["options"],
        "data": {name: facts[name] for name in _DATA_FACTS},
        "batches": {name: facts[name] for name in (*_BATCH_FACTS, _STEP_RULE) if name in facts},
    }
    try:
        config = config_from_json(json.dumps(recorded), source=str(path / MANIFEST))
        shape: dict[str, Any] = {"neighborhood": config.data.neighborhood, "nb_points": config.batches.nb_points}
        build: Any = partial(build_model, config.model, nb_features=facts["nb_features"], **shape)
        expected = model_shapes(build)
    except (ValueError, TypeError, OverflowError) as error:
        raise CorruptError(
            f"{path} is corrupt: the options in {MANIFEST} make no model ({error_text(error)})."
        ) from None
    if differences := leaf_differences(facts["leaves"], expected):
        raise CorruptError(f"{path} is corrupt: its tensors do not fit its options: {at_most_three(differences)}.")
    module = filled_model(build, load_leaves(path, facts), source=str(path))
    return LoadedModel(module=module, config=config, facts=facts)


def filled_model(build: Callable[[], _Model], tensors: Mapping[str, Tensor], *, source: str) -> _Model:
    """Build a model in evaluation mode with given parameters and buffers, if all of them fit.

    `build` is called first for the shapes alone, which takes no memory. The caller's random generators do not move.
    Raises ValueError, which begins with `source`, if names, shapes or types differ, or a value is not finite.
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
        raise ValueError(f"{source} does not fit the model: {at_most_three(problems)}.")
    with torch_rng(Key(0)):  # the random parameters are overwritten
        module = build()
    module.load_state_dict(dict(tensors))
    return module.eval()


def find_model(path: str | Path) -> Path:
    """The model directory that a user means by a folder: the folder itself, or an experiment's best model."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{str(path)!r} is not a folder. Expected a model directory or an experiment.")
    for folder in (path, path / "best_model"):
        if (folder / MANIFEST).is_file():
            return folder
    for folder in (path, path / "best_model"):
        if (folder / "model_state.pkl").is_file():
            raise ValueError(f"{str(folder)!r} is a model of dwi_ml. First run dwiml-func import-dwi-ml on it.")
    if (path / "config.json").is_file():
        raise ValueError(f"Experiment {str(path)!r} has no best model yet. Train it for an epoch.")
    if is_ensemble(path):
        raise ValueError(f"{str(path)!r} is an ensemble. Name one of its members, such as {path / '0'}.")
    raise ValueError(f"{str(path)!r} is neither a model directory (no {MANIFEST}) nor an experiment (no config.json).")


def check_memory(
    config: ModelConfig, *, nb_features: int, neighborhood: Neighborhood | None = None, nb_points: int | None = None
) -> None:
    """Raise ValueError for a model whose parameters, gradients and optimizer state exceed this machine's memory."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    build = partial(build_model, config, nb_features=nb_features, neighborhood=neighborhood, nb_points=nb_points)
    try:
        num_parameters: float = sum(tensor.numel() for tensor in model_shapes(build).values())
    except OverflowError:
        num_parameters = math.inf
    if _BYTES * num_parameters > available:
        sizes = f" (rnn_layer_sizes {config.rnn_layer_sizes})" if config.model == "learn2track" else ""
        count = f"{num_parameters:.3g}" if math.isfinite(num_parameters) else "more than 1e18"
        raise ValueError(
            f"The layers of this model are too large{sizes}: it has {count} "
            f"parameters, training takes {_BYTES} bytes for each, and this machine has {available / 1e9:.3g} GB of "
            "memory. Choose smaller layers."
        )
