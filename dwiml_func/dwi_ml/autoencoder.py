"""The autoencoder in dwi_ml's files, where it has one size and reads coordinates that are not standardised.

Source: dwi_ml, `ae_models.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dwiml_func._checks import truncated_repr
from dwiml_func.experiment.config import RunConfig
from dwiml_func.models.autoencoder.config import DEFAULT_NB_POINTS, AutoencoderOptions
from dwiml_func.models.config import ModelConfig

__all__ = ["autoencoder_config", "autoencoder_parameters", "raw_state"]

_NAMES = ("experiment_name", "step_size", "compress_lines", "nb_points")
_FIRST, _LAST = "encod_conv1.1.", "decod_conv6.1."


def autoencoder_config(parameters: Any, *, source: str) -> RunConfig:
    """The config of a `ModelAE`; ValueError, which begins with `source`, for parameters of another model."""
    if not isinstance(parameters, Mapping) or not {*_NAMES[:3]} <= {*parameters} <= {*_NAMES}:
        raise ValueError(
            f"{source}: expected the parameters of dwi_ml's ModelAE: {', '.join(_NAMES)}. "
            f"Received: {truncated_repr(parameters)}."
        )
    num = parameters.get("nb_points") or DEFAULT_NB_POINTS
    if num != DEFAULT_NB_POINTS:
        raise ValueError(f"{source}: nb_points: expected {DEFAULT_NB_POINTS} or null, received {truncated_repr(num)}.")
    return RunConfig(
        hdf5_file="",
        model=ModelConfig(model="autoencoder", raw_coordinates=True, reconstruction_loss="sum"),
    )


def autoencoder_parameters(config: RunConfig, *, experiment_name: str) -> dict[str, Any]:
    """The parameters of a model as dwi_ml writes them; ValueError for sizes that it does not have."""
    sizes = {"nb_points": config.batches.nb_points}
    sizes |= {name: getattr(config.model, name) for name in ("latent_space_dims", "first_channels")}
    own = AutoencoderOptions()
    needed = {"nb_points": DEFAULT_NB_POINTS}
    needed |= {name: getattr(own, name) for name in ("latent_space_dims", "first_channels")}
    if others := [f"{name} {value}" for name, value in sizes.items() if value != needed[name]]:
        expected = ", ".join(f"{name} {value}" for name, value in needed.items())
        raise ValueError(f"dwi_ml's autoencoder has one size. Expected {expected}. Received: {', '.join(others)}.")
    return {"experiment_name": experiment_name, "step_size": None, "compress_lines": None, "nb_points": None}


def raw_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model that gives the same for coordinates that are not standardised.

    Center and scale are multiplied into the first and the last convolution. Reflection at the ends changes nothing, as
    it repeats points.
    """
    raw = {name: tensor for name, tensor in state.items() if name not in ("center", "scale")}
    if len(raw) == len(state):
        return raw
    center, scale = state["center"].double(), state["scale"].double()
    weight = raw[f"{_FIRST}weight"].double() / scale
    raw[f"{_FIRST}bias"] = (raw[f"{_FIRST}bias"].double() - torch.einsum("fck,c->f", weight, center)).float()
    raw[f"{_FIRST}weight"] = weight.float()
    raw[f"{_LAST}weight"] = (raw[f"{_LAST}weight"].double() * scale).float()
    raw[f"{_LAST}bias"] = (raw[f"{_LAST}bias"].double() * scale + center).float()
    return raw
