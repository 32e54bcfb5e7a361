"""The diffusion signal of fibres, and its real symmetric spherical harmonics (SH)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from dwiml_func._checks import check_choice

__all__ = [
    "DEFAULT_BASIS",
    "HARMONICS",
    "assumed_signal",
    "half_sphere_directions",
    "harmonics_fault",
    "multi_tensor_signal",
    "sh_matrix",
]

HARMONICS = ("sh_order", "sh_basis", "sh_legacy", "sh_of")
"""The attributes of a volume that say which spherical harmonics its features are."""

DEFAULT_BASIS = "descoteaux07"
"""The basis of harmonics whose attributes name none."""
_SH_BASES = (DEFAULT_BASIS, "tournier07")
_SH_OF = ("signal", "fodf")


def harmonics_fault(attributes: Mapping[str, Any], num_features: int) -> str | None:
    """Why a volume's attributes do not fit its features, in words; None where they fit, or there are none.

    Those are of spherical harmonics, and the mean and standard deviation of the standardisation.
    """
    for name in ("standardization_mean", "standardization_std"):
        values = np.asarray(attributes.get(name, 1.0))
        is_right = values.dtype.kind in "fiu" and values.shape in ((), (1,), (num_features,))
        if not is_right or not np.isfinite(values).all() or (name.endswith("std") and not (values > 0).all()):
            return f"attribute {name!r} of shape {values.shape}. Expected one finite number, or {num_features}"
    if "sh_order" not in attributes:
        return None
    order = np.asarray(attributes["sh_order"])
    if order.dtype.kind not in "fiu" or order.size != 1 or order.item() % 2 or order.item() < 0:
        return f"attribute 'sh_order' is {attributes['sh_order']}. Expected an even number of at least 0"
    expected = (int(order.item()) + 1) * (int(order.item()) + 2) // 2
    if num_features != expected:
        return (
            f"Expected {expected} features for spherical harmonics of order {int(order.item())}. "
            f"Received: {num_features}. Correct the attribute sh_order of the input group"
        )
    basis = str(attributes.get("sh_basis", DEFAULT_BASIS))
    if basis not in _SH_BASES:
        return f"attribute 'sh_basis' is {basis!r}. Expected one of {', '.join(_SH_BASES)}"
    of = str(attributes.get("sh_of", "signal"))
    if of not in _SH_OF:
        return f"attribute 'sh_of' is {of!r}. Expected one of {', '.join(_SH_OF)}"
    return None


def assumed_signal(attributes: Mapping[str, Any]) -> str:
    """Words on harmonics whose attributes do not say what they describe; "" for others."""
    return ", taken for the signal's (no 'sh_of')" if "sh_order" in attributes and "sh_of" not in attributes else ""


def half_sphere_directions(num: int) -> np.ndarray:
    """(num, 3) unit vectors with z > 0, spread evenly over half a sphere by a golden-angle spiral.

    Source: Swinbank and Purser, "Fibonacci grids: a novel approach to global modelling", 2006.
    """
    if num < 1:
        raise ValueError(f"Expected at least one direction. Received: {num}")
    index = np.arange(num)
    height = 1 - (index + 0.5) / num  # equal areas between heights
    angle = index * np.pi * (3 - np.sqrt(5))
    radius = np.sqrt(1 - height**2)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=1)


def multi_tensor_signal(
    fibres: np.ndarray,
    fractions: np.ndarray,
    directions: np.ndarray,
    *,
    b_value: float,
    parallel: float,
    perpendicular: float,
) -> np.ndarray:
    """(V, G) signal of voxels that mix axially symmetric diffusion tensors, relative to the unweighted signal.

    `dipy.sims.voxel.multi_tensor` for many voxels at once: S(g) = sum_k f_k exp(-b g' D_k g), where D_k has the
    eigenvalue `parallel` along fibre k and `perpendicular` across it (mm^2/s). `fibres` (V, K, 3) and `directions` (G,
    3) are unit vectors, `fractions` is (V, K), `b_value` in s/mm^2.
    """
    # einsum without `optimize` sums in a fixed order, whatever the number of threads of the BLAS library.
    cosines = np.einsum("vkd,gd->vkg", fibres, directions)
    diffusivities = perpendicular + (parallel - perpendicular) * cosines**2
    return np.einsum("vk,vkg->vg", fractions, np.exp(-b_value * diffusivities))


def sh_matrix(directions: np.ndarray, order: int, *, basis: str = "descoteaux07", legacy: bool = False) -> np.ndarray:
    """(G, F) values of the real symmetric SH: `sh_matrix(directions, order) @ coefficients` is the function.

    F = (order + 1) (order + 2) / 2, in dipy's order of coefficients. Bases and their legacy definitions are dipy's,
    whose own functions default to legacy.
    """
    if order < 0 or order % 2:
        raise ValueError(f"Expected an even order of spherical harmonics. Received: {order}")
    check_choice("sh_basis", basis, _SH_BASES)
    from dipy.reconst.shm import sph_harm_lookup  # half a second to import

    polar = np.arccos(np.clip(directions[:, 2], -1, 1))
    azimuth = np.arctan2(directions[:, 1], directions[:, 0])
    with warnings.catch_warnings():
        # dipy advises against its legacy bases; which one the coefficients were fitted in is no longer a choice.
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        values, _, _ = sph_harm_lookup[basis](order, polar, azimuth, legacy=legacy)
    return cast(np.ndarray, values)
