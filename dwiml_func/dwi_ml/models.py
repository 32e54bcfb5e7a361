"""Models in dwi_ml's files: `parameters.json`, `model_state.pkl` and `model_type.txt`.

Source: dwi_ml, `main_abstract_model.py` (which files), and the `params_for_checkpoint` of `main_models.py` and
`learn2track_model.py` (which keys, in which order). The tensors are read with `weights_only=True`, which runs no
code in the file.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dwiml_func._checks import one_line
from dwiml_func.dwi_ml.autoencoder import autoencoder_config, autoencoder_parameters, raw_state
from dwiml_func.dwi_ml.parameters import check_whole_grid, config_of, parameters_of
from dwiml_func.dwi_ml.transformers import MODEL_TYPES, TRANSFORMERS, joined_state, split_state
from dwiml_func.dwi_ml.upgrade import upgraded_parameters, upgraded_state
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.model_store import LoadedModel, filled_model
from dwiml_func.experiment.training_facts import TRAINED_ON
from dwiml_func.files.archive import check_archive
from dwiml_func.files.atomic import atomic_directory
from dwiml_func.models.autoencoder.autoencoder import Autoencoder
from dwiml_func.models.config import build_model
from dwiml_func.models.learn2track import Learn2Track
from dwiml_func.models.tractography_model import TractographyModel
from dwiml_func.models.transformers.transformer import Transformer

__all__ = ["DwiMlModel", "read_dwi_ml_model", "shift_warning", "write_dwi_ml_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DwiMlModel:
    """A model read from dwi_ml's files.

    Args:
        module: the model, in evaluation mode.
        config: the options of the model and of its data, with the interpolation "trilinear-corner".
        parameters: the content of `parameters.json`, upgraded if an older dwi_ml wrote it.

    Example:
        >>> DwiMlModel.__slots__
        ('module', 'config', 'parameters')
    """

    module: TractographyModel | Autoencoder
    config: RunConfig
    parameters: Mapping[str, Any]


def read_dwi_ml_model(path: str | Path) -> DwiMlModel:
    """Read a model from a folder of dwi_ml: `best_model` or `checkpoint/model` of an experiment.

    Args:
        path: the folder.

    Returns:
        The model.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: it is another kind of model, or its parameters and tensors do not fit.

    Example:
        >>> read_dwi_ml_model("/no/such/model")
        Traceback (most recent call last):
        ...
        FileNotFoundError: '/no/such/model' is not a folder. Expected dwi_ml's folder best_model of an experiment.
    """
    path = Path(path)
    expected = "Expected dwi_ml's folder best_model of an experiment."
    if not path.is_dir():
        raise FileNotFoundError(f"{str(path)!r} is not a folder. {expected}")
    missing = [name for name in ("parameters.json", "model_state.pkl") if not (path / name).is_file()]
    if missing:
        hint = " Did you mean its folder best_model?" if (path / "best_model").is_dir() else ""
        raise FileNotFoundError(f"{str(path)!r} has no {' and no '.join(missing)}. {expected}{hint}")
    kind = _kind(path)
    source = str(path / "parameters.json")
    try:
        parameters = json.loads((path / "parameters.json").read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    if kind == "autoencoder":
        config, nb_features = autoencoder_config(parameters, source=source), 0
    else:
        parameters = upgraded_parameters(parameters)
        config, nb_features = config_of(parameters, model=kind, source=source)
    state = upgraded_state(_read_state(path / "model_state.pkl"))
    if kind in TRANSFORMERS:
        state = joined_state(state, source=str(path / "model_state.pkl"))

    def build() -> Learn2Track | Transformer | Autoencoder:
        try:
            return build_model(config.model, nb_features=nb_features, neighborhood=config.data.neighborhood)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    module = filled_model(build, state, source=str(path / "model_state.pkl"))
    if kind != "autoencoder":
        check_whole_grid(config, source=source)
    return DwiMlModel(module=module, config=config, parameters=parameters)


def write_dwi_ml_model(path: str | Path, model: LoadedModel, *, experiment_name: str) -> None:
    """Write a model in dwi_ml's files, for its tracking and visualisation scripts.

    Args:
        path: the folder, which must not exist; it appears by one rename.
        model: the model. If it came from dwi_ml, its `parameters.json` is written unchanged.
        experiment_name: the name to record otherwise.

    Raises:
        ValueError: dwi_ml cannot run such a model.

    Example:
        >>> write_dwi_ml_model("exported/best_model", load_model("best_model"), experiment_name="a")  # doctest: +SKIP
    """
    # Models imported by older versions have the second name.
    parameters = model.facts.get("dwi_ml_parameters") or model.facts.get("reference_parameters")
    kind, state = model.config.model.model, model.module.state_dict()
    if parameters is None and kind == "autoencoder":
        parameters = autoencoder_parameters(model.config, experiment_name=experiment_name)
    elif parameters is None:
        nb_features = model.module.nb_features
        parameters = parameters_of(model.config, nb_features=nb_features, experiment_name=experiment_name)
        if not any(parameters.get(name) for name in ("step_size", "nb_points", "compress_lines")):
            # The streamlines were not resampled: dwi_ml's tracker then needs the step that the dataset has.
            parameters["step_size"] = model.facts.get(TRAINED_ON, {}).get("step_size")
    if kind == "autoencoder":
        state = raw_state(state)
    elif kind in TRANSFORMERS:
        state = split_state(state, max_len=parameters["max_len"])
    state = OrderedDict((name, tensor.contiguous()) for name, tensor in state.items())
    with atomic_directory(path, replace=False) as folder:
        (folder / "parameters.json").write_text(json.dumps(parameters, indent=4, separators=(",", ": ")))
        (folder / "model_type.txt").write_text(MODEL_TYPES[kind])
        torch.save(state, folder / "model_state.pkl")


def shift_warning(config: RunConfig) -> str | None:
    """A warning for the export of a model trained with another interpolation than "trilinear-corner", or None."""
    if config.data.interpolation == "trilinear-corner" or config.model.model == "autoencoder":
        return None
    return (
        "dwi_ml's scripts will give this model inputs shifted by (0.5, 0.5, 0.5) voxel: dwi_ml interpolates volumes "
        f"half a voxel off, and this model was trained with the interpolation {config.data.interpolation!r}. "
        "Train models to export with --for-dwi-ml (or --interpolation trilinear-corner)."
    )


def _kind(path: Path) -> str:
    """Which model a folder has, by its model_type.txt, which older versions of dwi_ml do not write."""
    if not (path / "model_type.txt").is_file():
        return "learn2track"
    model_type = (path / "model_type.txt").read_text(errors="replace").strip()
    for kind, name in MODEL_TYPES.items():
        if name == model_type:
            return kind
    expected = ", ".join(MODEL_TYPES.values())
    raise ValueError(f"{str(path)!r}: expected a model of type {expected}, received {model_type[:60]!r}.")


def _read_state(path: Path) -> Mapping[str, torch.Tensor]:
    check_archive(path)
    _check_checksums(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns before it raises
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        reason = one_line(error, max_length=200)
        raise ValueError(f"{path} cannot be read as named tensors: {reason}") from None
    if not isinstance(state, Mapping) or not all(isinstance(n, str) and _is_dense(t) for n, t in state.items()):
        raise ValueError(f"{path} has no named tensors. Expected a model_state.pkl that dwi_ml wrote.")
    return state


def _check_checksums(path: Path) -> None:
    """Raise ValueError for a file with wrong checksums, which torch would read with other values."""
    if not zipfile.is_zipfile(path):
        return  # written by torch before 1.6, or no file of tensors: torch.load decides
    try:
        with zipfile.ZipFile(path) as file:
            corrupt = file.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        corrupt = str(error)
    if corrupt is not None:
        raise ValueError(f"{path} is corrupt: wrong checksum ({corrupt}). Copy it again.")


def _is_dense(value: Any) -> bool:
    """Whether it is a dense tensor with values in memory."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )
