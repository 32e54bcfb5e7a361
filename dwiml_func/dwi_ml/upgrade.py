"""Models of older versions of dwi_ml, brought to the names that its present version reads.

Source: dwi_ml, `l2t_update_deprecated_exp.py`, its own script for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["upgraded_parameters", "upgraded_state"]

_RENAMED = {
    "prev_dirs_embedding_size": "prev_dirs_embedded_size",
    "input_embedding_size": "input_embedded_size",
}
_DROPPED = ("input_embedding_size_ratio", "start_from_copy_prev")  # where they were not used
_DROPPED_FROM_GETTER = ("compress_loss", "weight_loss_with_angle")  # the same
_ADDED = ("nb_cnn_filters", "kernel_size")


def upgraded_parameters(parameters: Any) -> Any:
    """The parameters of a model as the present dwi_ml would have written them.

    An option that dwi_ml has no more is left out where it was off. Where it was on it stays, to be refused: the model
    would not be the one that was trained.

    Args:
        parameters: what a `parameters.json` holds.

    Returns:
        The same in today's names; equal to `parameters` where these were today's.

    Example:
        >>> upgraded_parameters({"input_embedding_size": 8, "neighborhood_radius": [0.5, 1.0]})  # doctest: +ELLIPSIS
        {'input_embedded_size': 8, 'neighborhood_radius': 2, 'neighborhood_resolution': 0.5, 'nb_cnn_filters': None...
    """
    if not isinstance(parameters, Mapping):
        return parameters
    upgraded = {_RENAMED.get(name, name): value for name, value in parameters.items()}
    upgraded = {name: value for name, value in upgraded.items() if value or name not in _DROPPED}
    if isinstance(upgraded.get("dg_args"), Mapping):
        upgraded["dg_args"] = {
            name: value
            for name, value in upgraded["dg_args"].items()
            if name != "compress_eps" and (value or name not in _DROPPED_FROM_GETTER)
        }
    upgraded |= _neighborhood(upgraded.get("neighborhood_radius"))
    return upgraded | {name: None for name in _ADDED if name not in upgraded}


def upgraded_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model under the names that they have in the present dwi_ml.

    Args:
        state: tensors by name, of a `model_state.pkl`.

    Returns:
        The same tensors, in the same order.

    Example:
        >>> import torch
        >>> list(upgraded_state({"input_embedding.linear.bias": torch.zeros(3)}))
        ['input_embedding_layer.linear.bias']
    """
    old, new = "input_embedding.", "input_embedding_layer."
    return {new + name.removeprefix(old) if name.startswith(old) else name: state[name] for name in state}


def _neighborhood(radius: Any) -> dict[str, Any]:
    """Radius and resolution of what was once a list of distances, which had to be 1, 2, 3, ... times the first."""
    if not isinstance(radius, list) or not radius or not all(isinstance(distance, int | float) for distance in radius):
        return {}
    if any(abs(distance - number * radius[0]) > 1e-9 for number, distance in enumerate(radius, start=1)):
        return {}
    return {"neighborhood_radius": len(radius), "neighborhood_resolution": radius[0]}
