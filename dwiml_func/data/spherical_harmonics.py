"""The diffusion signal of fibres, and its real symmetric spherical harmonics (SH)."""

from __future__ import annotations

import warnings
from typing import cast

import numpy as np

__all__ = ["half_sphere_directions", "multi_tensor_signal", "sh_matrix"]

_SH_BASES = ("descoteaux07", "tournier07")


def half_sphere_directions(num: int) -> np.ndarray:
    """Spread directions evenly over half a sphere, for functions with f(-u) = f(u), by a golden-angle spiral.

    Args:
        num: number of directions.

    Returns:
        (num, 3) float64 unit vectors with z > 0.

    Raises:
        ValueError: fewer than one direction.

    Source: Swinbank and Purser, "Fibonacci grids: a novel approach to global modelling", 2006.

    Example:
        >>> half_sphere_directions(60).shape
        (60, 3)
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
    """Signal of voxels that mix axially symmetric diffusion tensors, without noise, relative to the unweighted signal.

    It is `dipy.sims.voxel.multi_tensor` for many voxels at once: S(g) = sum_k f_k exp(-b g' D_k g), where D_k has the
    eigenvalue `parallel` along fibre k and `perpendicular` across it.

    Args:
        fibres: (V, K, 3) unit vectors.
        fractions: (V, K) shares of the fibres in the voxel.
        directions: (G, 3) unit vectors of the gradients.
        b_value: s/mm^2.
        parallel: diffusivity along a fibre, mm^2/s.
        perpendicular: diffusivity across a fibre, mm^2/s.

    Returns:
        (V, G) float64, between 0 and 1.

    Example:
        >>> along_z, g = np.array([[[0.0, 0, 1]]]), np.eye(3)
        >>> s = multi_tensor_signal(along_z, np.ones((1, 1)), g, b_value=1000, parallel=1.7e-3, perpendicular=3e-4)
        >>> s.round(3).tolist()
        [[0.741, 0.741, 0.183]]
    """
    # einsum without `optimize` sums in a fixed order, whatever the number of threads of the BLAS library.
    cosines = np.einsum("vkd,gd->vkg", fibres, directions)
    diffusivities = perpendicular + (parallel - perpendicular) * cosines**2
    return np.einsum("vk,vkg->vg", fractions, np.exp(-b_value * diffusivities))


def sh_matrix(directions: np.ndarray, order: int, *, basis: str = "descoteaux07", legacy: bool = False) -> np.ndarray:
    """Values of the real symmetric SH: `sh_matrix(directions, order) @ coefficients` is the function at the directions.

    Args:
        directions: (G, 3) unit vectors.
        order: highest order, even.
        basis: "descoteaux07" or "tournier07", as dipy names and defines them.
        legacy: dipy's older definition of that basis. dipy's own functions default to it.

    Returns:
        (G, F) float64, F = (order + 1) (order + 2) / 2, in dipy's order of coefficients.

    Raises:
        ValueError: an odd or negative order, or an unknown basis.

    Example:
        >>> sh_matrix(half_sphere_directions(60), 6).shape
        (60, 28)
    """
    if order < 0 or order % 2:
        raise ValueError(f"Expected an even order of spherical harmonics. Received: {order}")
    if basis not in _SH_BASES:
        raise ValueError(f"Expected a basis of spherical harmonics among {_SH_BASES}. Received: {basis!r}")
    from dipy.reconst.shm import sph_harm_lookup  # half a second to import

    polar = np.arccos(np.clip(directions[:, 2], -1, 1))
    azimuth = np.arctan2(directions[:, 1], directions[:, 0])
    with warnings.catch_warnings():
        # dipy advises against its legacy bases; which one the coefficients were fitted in is no longer a choice.
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        values, _, _ = sph_harm_lookup[basis](order, polar, azimuth, legacy=legacy)
    return cast(np.ndarray, values)
