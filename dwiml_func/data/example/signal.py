"""The simulated diffusion signal of the example data: fibres in voxels, their tensors, and noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dwiml_func.data.example.scanner import scan
from dwiml_func.data.example.settings import B_VALUE, NUM_B0, ExampleSettings
from dwiml_func.data.grid import Grid
from dwiml_func.data.spherical_harmonics import half_sphere_directions, multi_tensor_signal, sh_matrix

__all__ = ["ISOTROPIC", "SHELL", "Fibres", "acquire", "paint", "simulate"]


SHELL = 3
"""Voxels around the streamlines that hold tissue; beyond it the signal is 0, as outside a brain mask."""

ISOTROPIC = 8e-4
"""mm^2/s, grey matter."""

_KERNEL_MM = 1.5  # standard deviation of a point's share in the voxels around it
_TISSUE_POINTS = 6.0  # isotropic tissue counts as so many points at a voxel's centre: FA 0.6 along streamlines
_FIBRES_AT_ONCE = 100_000  # whose signals are in memory together; the default data are one part
_PARALLEL, _PERPENDICULAR = 1.5e-3, 3e-4  # mm^2/s, as in dipy.sims.voxel


class Fibres(NamedTuple):
    """What V voxels of white matter hold: (V,) flat indices, rising; (V, K, 3) unit vectors, one a bundle; (V, K)
    volume fractions, the rest up to 1 is isotropic tissue."""

    voxels: np.ndarray
    directions: np.ndarray
    fractions: np.ndarray


def paint(bundles: Sequence[list[np.ndarray]], grid: Grid) -> Fibres:
    """Spread the points' directions over the 27 voxels around each: density and axial mean direction of each bundle.

    Streamlines are in voxel space, corner origin; points that have not all 27 voxels in the grid are left out. The
    axial mean is the first eigenvector of the weighted sum of u u', which does not care about the sign of u (Mardia and
    Jupp, Directional Statistics, 2000, section 10.3).
    """
    num_voxels = int(np.prod(grid.shape))
    neighbours = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    sizes = np.linalg.norm(grid.affine[:3, :3], axis=0)
    density = np.zeros((num_voxels, len(bundles)))
    spread = []
    for k, streamlines in enumerate(bundles):
        points = np.concatenate(streamlines)
        tangents = np.concatenate([np.gradient(s, axis=0) for s in streamlines])
        tangents /= np.sqrt((tangents**2).sum(axis=1, keepdims=True))
        corner = np.floor(points).astype(int)
        inside = ((corner >= 1) & (corner < np.array(grid.shape) - 1)).all(axis=1)
        points, tangents, corner = points[inside], tangents[inside], corner[inside]
        voxels = corner + neighbours  # (27, P, 3)
        distance = (((voxels + 0.5 - points) * sizes) ** 2).sum(axis=-1)
        weights = np.exp(-distance / (2 * _KERNEL_MM**2)).reshape(-1)
        rows = np.ravel_multi_index(tuple(voxels.reshape(-1, 3).T), grid.shape)
        density[:, k] = np.bincount(rows, weights, num_voxels)
        spread.append((rows, weights, tangents))
    painted = np.flatnonzero(density.any(axis=1))
    place = np.zeros(num_voxels, dtype=np.int64)
    place[painted] = np.arange(len(painted))
    # A view, as of eigh's last vectors: einsum's rounding, and so that of the data, depends on the layout.
    directions = np.zeros((len(painted), len(bundles), 3, 3))[..., -1]
    for k, (rows, weights, tangents) in enumerate(spread):
        outer = np.zeros((len(painted), 3, 3))
        for i in range(3):
            for j in range(i + 1):
                product = np.tile(tangents[:, i] * tangents[:, j], len(neighbours))
                outer[:, i, j] = outer[:, j, i] = np.bincount(place[rows], weights * product, len(painted))
        holds = np.flatnonzero(density[painted, k])
        directions[holds, k] = np.linalg.eigh(outer[holds])[1][..., :, -1]
    filled = density[painted].sum(axis=1, keepdims=True) + _TISSUE_POINTS
    return Fibres(painted, directions, density[painted] / filled)


def acquire(
    fibres: Fibres, tissue: np.ndarray, settings: ExampleSettings, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes in the N voxels of a mask (X, Y, Z): six unweighted images (N, 6) and the weighted ones (N, G)."""
    directions = half_sphere_directions(settings.nb_directions)
    isotropic = np.exp(-B_VALUE * ISOTROPIC)
    signal = np.full((tissue.size, len(directions)), isotropic)
    size = _FIBRES_AT_ONCE // fibres.fractions.shape[1]
    for first in range(0, len(fibres.voxels), size):
        rows = slice(first, first + size)
        fractions = fibres.fractions[rows]
        along_fibres = multi_tensor_signal(
            fibres.directions[rows],
            fractions,
            directions,
            b_value=B_VALUE,
            parallel=_PARALLEL,
            perpendicular=_PERPENDICULAR,
        )
        signal[fibres.voxels[rows]] = along_fibres + isotropic * (1 - fractions.sum(axis=1, keepdims=True))
    signal = signal[tissue.reshape(-1)]
    unweighted = _rician(np.ones((len(signal), NUM_B0)), settings.snr, rng)
    return unweighted, _rician(signal, settings.snr, rng)


def simulate(fibres: Fibres, mask: np.ndarray, settings: ExampleSettings, rng: np.random.Generator) -> np.ndarray:
    """(X, Y, Z, F) float64 SH coefficients of S / S0 around the white matter's mask; 0 outside the tissue."""
    from scipy.ndimage import binary_dilation

    # The mask is one voxel around the streamlines already.
    tissue = np.asarray(binary_dilation(mask, np.ones((3, 3, 3)), iterations=SHELL - 1), dtype=bool)
    measure = scan if settings.simulator == "trxscan" else acquire
    unweighted, weighted = measure(fibres, tissue, settings, rng)
    matrix = sh_matrix(half_sphere_directions(settings.nb_directions), settings.sh_order)
    # Rounded: LAPACK's results differ by rounding between numbers of threads.
    fit = np.linalg.pinv(matrix).round(12)
    coefficients = np.zeros((*mask.shape, len(fit)))
    coefficients[tissue] = np.einsum("vg,fg->vf", weighted / unweighted.mean(axis=1, keepdims=True), fit)
    return coefficients


def _rician(signal: np.ndarray, snr: float, rng: np.random.Generator) -> np.ndarray:
    """Magnitude of the signal with Gaussian noise on its real and imaginary part (Gudbjartsson and Patz, 1995)."""
    noise = rng.standard_normal((2, *signal.shape)) / snr
    return np.sqrt((signal + noise[0]) ** 2 + noise[1] ** 2)
