"""Models of older versions of dwi_ml, upgraded to the names that its current version reads.

Source: dwi_ml, `l2t_update_deprecated_exp.py`.
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
_DROPPED = ("input_embedding_size_ratio", "start_from_copy_prev")  # if they were not used
_DROPPED_FROM_GETTER = ("compress_loss", "weight_loss_with_angle")  # if they were not used
_ADDED = ("nb_cnn_filters", "kernel_size")


def upgraded_parameters(parameters: Any) -> Any:
    """The parameters of a model as the current dwi_ml would have written them; those of today are unchanged.

    An option that dwi_ml no longer has is removed if it was off. If it was on it stays and is rejected later, because
    the model would not be the one that was trained.
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
    """The tensors of a `model_state.pkl` under the names of the current dwi_ml, in the same order."""
    old, new = "input_embedding.", "input_embedding_layer."
    return {new + name.removeprefix(old) if name.startswith(old) else name: state[name] for name in state}


def _neighborhood(radius: Any) -> dict[str, Any]:
    """Radius and resolution of a former list of distances, which had to be 1, 2, 3, ... times the first."""
    if not isinstance(radius, list) or not radius or not all(isinstance(distance, int | float) for distance in radius):
        return {}
    if any(abs(distance - number * radius[0]) > 1e-9 for number, distance in enumerate(radius, start=1)):
        return {}
    return {"neighborhood_radius": len(radius), "neighborhood_resolution": radius[0]}
