"""Learn2Track models in the files of dwi_ml: `parameters.json`, `model_state.pkl` and `model_type.txt`.

Source: dwi_ml, `main_abstract_model.py` (which files), and the `params_for_checkpoint` of `main_models.py` and
`learn2track_model.py` (which keys, in which order). The tensors are read with `weights_only=True`: no code in the file
is run.
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

from dwiml_func.dwi_ml.parameters import check_whole_grid, config_of, parameters_of
from dwiml_func.dwi_ml.upgrade import upgraded_parameters, upgraded_state
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.model_store import LoadedModel, build_model, filled_model
from dwiml_func.files.atomic import atomic_directory
from dwiml_func.models.learn2track import Learn2Track

__all__ = ["DwiMlModel", "read_dwi_ml_model", "shift_warning", "write_dwi_ml_model"]

MODEL_TYPE = "Learn2TrackModel"


@dataclass(frozen=True, slots=True, kw_only=True)
class DwiMlModel:
    """A model that was read from dwi_ml's files.

    Args:
        module: the model, in evaluation mode.
        config: what the model is and what data it is for, with the interpolation "trilinear-corner".
        parameters: `parameters.json` as it stands there or, if an older dwi_ml wrote it, in today's names.

    Example:
        >>> DwiMlModel.__slots__
        ('module', 'config', 'parameters')
    """

    module: Learn2Track
    config: RunConfig
    parameters: Mapping[str, Any]


def read_dwi_ml_model(path: str | Path) -> DwiMlModel:
    """Read a folder of dwi_ml with a Learn2Track model: `best_model` or `checkpoint/model` of an experiment.

    Args:
        path: the folder.

    Returns:
        The model.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        ValueError: it holds another kind of model, or one that does not fit together; one line says all that is wrong.

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
        hint = " Its folder best_model may be meant." if (path / "best_model").is_dir() else ""
        raise FileNotFoundError(f"{str(path)!r} has no {' and no '.join(missing)}. {expected}{hint}")
    if (path / "model_type.txt").is_file():  # older versions of dwi_ml do not write it
        model_type = (path / "model_type.txt").read_text(errors="replace").strip()
        if model_type != MODEL_TYPE:
            raise ValueError(f"{str(path)!r} holds a model of type {model_type[:60]!r}; expected {MODEL_TYPE!r}.")
    source = str(path / "parameters.json")
    try:
        parameters = upgraded_parameters(json.loads((path / "parameters.json").read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no JSON: {error}") from None
    config, nb_features = config_of(parameters, source=source)
    state = upgraded_state(_read_state(path / "model_state.pkl"))

    def build() -> Learn2Track:
        try:
            return build_model(config.model, nb_features=nb_features, neighborhood=config.data.neighborhood)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    module = filled_model(build, state, source=str(path / "model_state.pkl"))
    check_whole_grid(config, source=source)
    return DwiMlModel(module=module, config=config, parameters=parameters)


def write_dwi_ml_model(path: str | Path, model: LoadedModel, *, experiment_name: str) -> None:
    """Write a model as dwi_ml does, for its scripts to track with and to look at.

    Args:
        path: the folder; it appears by one rename, and does not exist yet.
        model: the model. If it came from dwi_ml, its `parameters.json` is given back as it was.
        experiment_name: what to call it otherwise.

    Raises:
        ValueError: dwi_ml cannot run such a model.

    Example:
        >>> write_dwi_ml_model("exported/best_model", load_model("best_model"), experiment_name="a")  # doctest: +SKIP
    """
    parameters = model.facts.get("reference_parameters")
    if parameters is None:
        nb_features = model.module.nb_features
        parameters = parameters_of(model.config, nb_features=nb_features, experiment_name=experiment_name)
    state = OrderedDict((name, tensor.contiguous()) for name, tensor in model.module.state_dict().items())
    with atomic_directory(path, replace=False) as folder:
        (folder / "parameters.json").write_text(json.dumps(parameters, indent=4, separators=(",", ": ")))
        (folder / "model_type.txt").write_text(MODEL_TYPE)
        torch.save(state, folder / "model_state.pkl")


def shift_warning(config: RunConfig) -> str | None:
    """What dwi_ml's scripts will do to a model that was trained with another interpolation than theirs.

    Args:
        config: the model's.

    Returns:
        A sentence; None for "trilinear-corner", which is theirs.

    Example:
        >>> (shift_warning(RunConfig(hdf5_file="")) or "")[:37]
        'dwi_ml reads volumes half a voxel off'
    """
    if config.data.interpolation == "trilinear-corner":
        return None
    return (
        "dwi_ml reads volumes half a voxel off: at a point it takes the value that lies half a voxel further along x, "
        f"y and z. This model was trained with the interpolation {config.data.interpolation!r}, without that shift, so "
        "dwi_ml's scripts will show it each point's surroundings shifted by (0.5, 0.5, 0.5) voxel. "
        "Train with --interpolation trilinear-corner for models to export."
    )


def _read_state(path: Path) -> Mapping[str, torch.Tensor]:
    _check_whole(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of some of what it then refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as tensors by name: {reason}") from None
    if not isinstance(state, Mapping) or not all(isinstance(n, str) and _is_plain(t) for n, t in state.items()):
        raise ValueError(f"{path} does not hold tensors by name. Expected what dwi_ml writes as model_state.pkl.")
    return state


def _check_whole(path: Path) -> None:
    """Refuse a file whose checksums do not hold: torch reads it all the same, with other values."""
    if not zipfile.is_zipfile(path):
        return  # written by torch before 1.6, or no file of tensors at all: torch.load tells
    try:
        with zipfile.ZipFile(path) as file:
            corrupt = file.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        corrupt = str(error)
    if corrupt is not None:
        raise ValueError(f"{path} is corrupt: the checksum of a part does not hold ({corrupt}). Copy it anew.")


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with a number in memory for each element, which sparse ones and others are not."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )
