"""From dwi_ml's `parameters.json` to our config, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from dwiml_func._checks import check_number, truncated_repr
from dwiml_func.dwi_ml.transformers import DEFAULT_MAX_LEN, MODEL_TYPES
from dwiml_func.experiment.config import RunConfig, config_from_json
from dwiml_func.models.config import GETTER_OPTIONS, ModelConfig
from dwiml_func.models.direction_getters import DIRECTION_GETTERS

__all__ = ["check_whole_grid", "config_of", "parameters_of"]

_SAME = ("input_embedding_key", "kernel_size", "nb_cnn_filters", "dg_key")  # options that mean the same in both
_COMMON = (*_SAME, *("experiment_name", "step_size", "compress_lines", "nb_features", "input_embedded_size", "dg_args"))
_LEARN2TRACK = (
    *("nb_previous_dirs", "rnn_key", "rnn_layer_sizes", "use_skip_connection", "use_layer_normalization", "dropout"),
)
_PREVIOUS_DIRS = ("prev_dirs_embedding_key", "prev_dirs_embedded_size", "normalize_prev_dirs")
_ENCODER = (*("max_len", "n_layers_e", "dropout_rate", "activation", "nheads", "ffnn_hidden_size", "norm_first"),)
_TARGET = ("sos_token_type", "target_embedding_key")
_OWN = {  # further options that mean the same in both, by model
    "learn2track": _LEARN2TRACK,
    "tts": _ENCODER,
    "ttst": (*_ENCODER, *_TARGET),
    "tto": (*_ENCODER, *_TARGET, "n_layers_d"),
}
_CONVERTED = {  # and those that do not
    "learn2track": _PREVIOUS_DIRS,
    "tts": ("positional_encoding_key",),
    "ttst": ("positional_encoding_key", "target_embedded_size"),
    "tto": ("positional_encoding_key",),
}
_OPTIONAL = ("nb_points", "neighborhood_type", "neighborhood_radius", "neighborhood_resolution")
_OPTIONS_OF_ARGUMENTS = {argument: option for option, argument in GETTER_OPTIONS.items()}
_CANNOT_RUN = ("gaussian-mixture", "fisher-von-mises-mixture")  # the forward pass fails, or is not implemented


def config_of(parameters: Any, *, model: str = "learn2track", source: str) -> tuple[RunConfig, int]:
    """The config of a model, without a dataset, and the number of features of its input volume at a point.

    It has dwi_ml's conventions: the interpolation "trilinear-corner" and its step rule. Parameters without effect are
    left out: options of previous directions where there are none, a neighbourhood's radius where there is no
    neighbourhood, a weight of EOS without EOS. Raises ValueError, which begins with `source`.
    """
    _check_keys(parameters, model, source)
    options = {"model": model} | {name: parameters[name] for name in (*_SAME, *_OWN[model])}
    if parameters["input_embedding_key"] != "no_embedding":
        options["input_embedded_size"] = parameters["input_embedded_size"]
    options |= _getter_options(parameters)
    if model == "learn2track":
        options |= _previous_directions(parameters, source)
    else:
        options["position_encoding"] = parameters["positional_encoding_key"]
        if parameters.get("target_embedding_key") == "nn_embedding":
            options["target_embedded_size"] = parameters.get("target_embedded_size")
    neighborhood = {}
    if parameters.get("neighborhood_type") is not None:
        neighborhood = {name: parameters.get(name) for name in _OPTIONAL if name.startswith("neighborhood")}
    described = {
        "hdf5_file": "",
        "model": options,
        "data": {"interpolation": "trilinear-corner", **neighborhood},
        "batches": {  # in dwi_ml, 0 and false mean not given
            "step_size": parameters["step_size"] or None,
            "compress": parameters["compress_lines"] or None,
            "nb_points": parameters.get("nb_points") or None,
            "step_rule": "dwi_ml",
        },
    }
    config = config_from_json(json.dumps(described), source=source)
    nb_features = parameters["nb_features"]
    if not isinstance(nb_features, int):
        raise ValueError(f"{source}: nb_features: expected a whole number, received {truncated_repr(nb_features)}.")
    check_number(f"{source}: nb_features", nb_features, at_least=1)
    return config, nb_features


def parameters_of(config: RunConfig, *, nb_features: int, experiment_name: str) -> dict[str, Any]:
    """The parameters of a model as dwi_ml writes them, in its order; ValueError for a getter that dwi_ml cannot run."""
    model, data, batches = config.model, config.data, config.batches
    if model.dg_key in _CANNOT_RUN:
        raise ValueError(f"dwi_ml has {model.dg_key}, but cannot run it. Export a model with another direction getter.")
    options = DIRECTION_GETTERS[model.dg_key].option_names
    dg_args = {name: model.dg_args.get(name, 1.0) for name in ("dropout", "add_eos", "eos_weight")}
    for name in ("sphere", "entropy_weight"):  # dwi_ml leaves them out when they have their defaults
        if name in model.dg_args:
            dg_args[name] = model.dg_args[name]
    for name in ("normalize_targets", "normalize_outputs"):
        if name in options:
            dg_args[name] = getattr(model, name)
    neighborhood = {name: getattr(data, name) for name in _OPTIONAL if name.startswith("neighborhood")}
    getter = {"dg_key": model.dg_key, "dg_args": dg_args}
    parameters = {
        "experiment_name": experiment_name,
        "step_size": batches.step_size,
        "compress_lines": batches.compress,
        "nb_points": batches.nb_points,
        "input_embedding_key": model.embedding_key,
        "input_embedded_size": model.input_embedded_size,
        "kernel_size": _listed(model.kernel_size),
        "nb_cnn_filters": _listed(model.nb_cnn_filters),
    }
    if model.model != "learn2track":
        return {**parameters, **getter, **neighborhood, "nb_features": nb_features, **_transformer_parameters(model)}
    embedded_size = model.prev_dirs_embedded_size
    if model.nb_previous_dirs > 0 and model.prev_dirs_embedding_key == "no_embedding":
        embedded_size = 3 * model.nb_previous_dirs
    return {
        **parameters,
        **neighborhood,
        **getter,
        "nb_previous_dirs": model.nb_previous_dirs,
        "prev_dirs_embedding_key": model.prev_dirs_embedding_key,
        "prev_dirs_embedded_size": embedded_size,
        "normalize_prev_dirs": model.normalize_prev_dirs,
        "nb_features": nb_features,
        "rnn_key": model.rnn_key,
        "rnn_layer_sizes": _listed(model.rnn_layer_sizes),
        "use_skip_connection": model.use_skip_connection,
        "use_layer_normalization": model.use_layer_normalization,
        "dropout": float(model.dropout),  # dwi_ml rejects an integer
    }


def _transformer_parameters(model: ModelConfig) -> dict[str, Any]:
    own: dict[str, Any] = {
        "max_len": model.max_len or DEFAULT_MAX_LEN,
        "n_layers_e": model.n_layers_e,
        "positional_encoding_key": model.position_encoding,
        "dropout_rate": float(model.dropout_rate),
        "activation": model.activation,
        "nheads": model.nheads,
        "ffnn_hidden_size": model.ffnn_hidden_size,
        "norm_first": model.norm_first,
    }
    own |= {name: getattr(model, name) for name in _TARGET if name in _OWN[model.model]}
    if model.model == "ttst":
        own["target_embedded_size"] = model.target_embedded_size
    if model.model == "tto":
        own["n_layers_d"] = model.n_layers_d or model.n_layers_e
    return own


def check_whole_grid(config: RunConfig, *, source: str) -> None:
    """Raise ValueError for convolutions over a grid with points that dwi_ml, which truncates float32, leaves empty."""
    if config.model.embedding_key != "cnn_embedding":
        return
    radius, resolution = config.data.neighborhood_radius or 0, config.data.neighborhood_resolution or 1.0
    steps = torch.arange(-radius, radius + 1)
    if not torch.equal(((steps.double() * resolution).float() / resolution).long(), steps):
        raise ValueError(
            f"{source}: with a resolution of {resolution} and a radius of {radius}, dwi_ml's rounding leaves points of "
            "the grid empty. Such a model cannot be imported."
        )


def _check_keys(parameters: Any, model: str, source: str) -> None:
    if not isinstance(parameters, Mapping):
        raise ValueError(f"{source}: expected names and values, received {truncated_repr(parameters)}.")
    dg_args = parameters.get("dg_args")
    if not isinstance(dg_args, Mapping | None):
        raise ValueError(f"{source}: dg_args: expected names and values, received {truncated_repr(dg_args)}.")
    required = (*_COMMON, *_OWN[model], *_CONVERTED[model])
    missing = [name for name in required if name not in parameters]
    unknown = [name for name in parameters if name not in (*required, *_OPTIONAL)]
    unknown += [f"dg_args.{name}" for name in dg_args or () if name not in _OPTIONS_OF_ARGUMENTS]
    if missing or unknown:
        parts = [f"{kind}: {', '.join(names)}" for kind, names in (("missing", missing), ("unknown", unknown)) if names]
        raise ValueError(f"{source}: {'; '.join(parts)}. Expected the parameters of dwi_ml's {MODEL_TYPES[model]}.")


def _previous_directions(parameters: Mapping[str, Any], source: str) -> dict[str, Any]:
    num, size = parameters["nb_previous_dirs"], parameters["prev_dirs_embedded_size"]
    if num == 0:
        return {}
    key = parameters["prev_dirs_embedding_key"] or "no_embedding"
    if key == "no_embedding":
        if isinstance(num, int) and size not in (None, 3 * num):
            raise ValueError(
                f"{source}: prev_dirs_embedded_size: expected {3 * num} for {num} previous directions without "
                f"embedding, received {truncated_repr(size)}."
            )
        size = None
    return {
        "prev_dirs_embedding_key": key,
        "prev_dirs_embedded_size": size,
        "normalize_prev_dirs": parameters["normalize_prev_dirs"],
    }


def _getter_options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    options = {_OPTIONS_OF_ARGUMENTS[name]: value for name, value in (parameters["dg_args"] or {}).items()}
    options = {name: value for name, value in options.items() if value is not None}
    for name in ("normalize_outputs", "add_entropy_to_gauss"):  # 0 and false mean no
        if not options.get(name, True):
            del options[name]
    if not options.get("add_eos"):
        options.pop("eos_weight", None)
    return options


def _listed(sizes: tuple[int, ...] | None) -> list[int] | None:
    return None if sizes is None else list(sizes)
