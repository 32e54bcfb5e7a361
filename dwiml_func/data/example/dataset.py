"""The built-in example data: real streamlines of five people on a diffusion signal that is simulated along them.

Real: the streamlines (`minimal_bundles`). Simulated: the diffusion signal, and nothing else is known of the five heads.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

import h5py
import numpy as np

from dwiml_func.core.rng import Key, Stream, fold_in, numpy_rng
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.example.bundles import SUBJECTS, load_bundles
from dwiml_func.data.grid import Grid
from dwiml_func.data.hdf5.write import new_dataset, write_streamlines, write_volume
from dwiml_func.data.spherical_harmonics import half_sphere_directions, multi_tensor_signal, sh_matrix

__all__ = ["make_example_data"]

_STEP_MM = 1.0
_VOXEL_MM = 2.0
_SHELL = 3  # voxels around the streamlines that hold tissue; beyond it the signal is 0, as outside a brain mask
_KERNEL_MM = 1.5  # standard deviation of a point's share in the voxels around it
_TISSUE_POINTS = 6.0  # isotropic tissue counts as so many points at a voxel's centre: FA 0.6 along streamlines
_NUM_DIRECTIONS = 60
_NUM_B0 = 6
_B_VALUE = 1000.0  # s/mm^2
_SNR = 20.0  # of one unweighted image: S0 / sigma
_PARALLEL, _PERPENDICULAR = 1.5e-3, 3e-4  # mm^2/s, as in dipy.sims.voxel
_ISOTROPIC = 8e-4  # mm^2/s, grey matter
_SH_ORDER = 6
_KEY = fold_in(Key(0), Stream.EXAMPLE_DATA)


class _Fibres(NamedTuple):
    voxels: np.ndarray  # (V,) flat indices of the white-matter voxels, rising
    directions: np.ndarray  # (V, K, 3) unit vectors, one a bundle
    fractions: np.ndarray  # (V, K), the rest up to 1 is isotropic tissue


def make_example_data(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the example dataset: three training subjects, one validation and one testing subject; no network needed.

    Streamlines: three bundles of five people, 150 streamlines each, oriented alike inside each bundle, smoothed,
    resampled to 1 mm, on a 2 mm grid.

    Signal: within one voxel of a streamline (`wm_mask`), one diffusion tensor a bundle along the bundle's mean axis
    there, mixed with isotropic tissue by the number of its points nearby; two voxels further, isotropic tissue alone;
    0 elsewhere, as outside a brain mask. 60 directions at b = 1000 s/mm^2 and 6 unweighted images, Rician noise of
    SNR 20. `input` holds the SH of order 6 (28 features) of the signal divided by the unweighted one, standardised over
    all features. Its attributes say which SH they are and how to undo the standardisation.

    The file has the same bytes every time.
    """
    from tqdm import tqdm

    groups_config = {
        "input": {
            "type": "volume",
            "files": ["simulated_sh.nii.gz"],
            "standardization": "all",
            "std_mask": ["simulated_wm_mask.nii.gz"],
        },
        "streamlines": {"type": "streamlines", "files": ["*.trk"]},
        "wm_mask": {"type": "volume", "files": ["simulated_wm_mask.nii.gz"], "standardization": "none"},
    }
    dataset = new_dataset(
        path,
        training=SUBJECTS[:3],
        validation=SUBJECTS[3:4],
        testing=SUBJECTS[4:],
        groups_config=groups_config,
        date="Not recorded",  # the time would make each file another one
        step_size=_STEP_MM,
        overwrite=overwrite,
    )
    with dataset as file:
        progress = tqdm(SUBJECTS, desc="Example data", unit="subject", disable=not sys.stderr.isatty())
        for row, subject in enumerate(progress):
            _write_subject(file.create_group(subject), row)


def _write_subject(group: h5py.Group, row: int) -> None:
    bundles = load_bundles(SUBJECTS[row], step_size=_STEP_MM)
    grid = _grid(np.concatenate([s for streamlines in bundles.values() for s in streamlines]))
    voxel_bundles = [[_to_voxel(s, grid) for s in streamlines] for streamlines in bundles.values()]

    fibres = _paint(voxel_bundles, grid)
    mask = np.zeros(grid.shape, dtype=bool)
    mask.reshape(-1)[fibres.voxels] = True
    coefficients = _simulate(fibres, mask, numpy_rng(fold_in(_KEY, row)))
    # Over all features at once: a standardisation feature by feature would blow up the noise of the high orders.
    mean, std = float(coefficients[mask].mean()), float(coefficients[mask].std())

    write_volume(
        group,
        "input",
        (coefficients - mean) / std,
        grid.affine,
        attributes={
            "sh_order": _SH_ORDER,
            "sh_basis": "descoteaux07",
            "sh_legacy": False,
            "standardization_mean": mean,
            "standardization_std": std,
        },
        compression=1,
    )
    streamlines = [s for bundle in voxel_bundles for s in bundle]
    write_streamlines(
        group,
        "streamlines",
        np.concatenate(streamlines),
        np.concatenate([[0], np.cumsum([len(s) for s in streamlines])]),
        affine=grid.affine,
        dimensions=grid.shape,
        bundles=Bundles(tuple(bundles), np.repeat(np.arange(len(bundles)), [len(b) for b in voxel_bundles])),
    )
    write_volume(group, "wm_mask", mask[..., None], grid.affine, compression=1)


def _grid(points: np.ndarray) -> Grid:
    """The smallest grid of whole voxels that holds the points and the shell around them, its corner on even mm."""
    first = np.floor(points.min(axis=0) / _VOXEL_MM).astype(int) - _SHELL
    last = np.floor(points.max(axis=0) / _VOXEL_MM).astype(int) + _SHELL
    affine = np.diag([_VOXEL_MM, _VOXEL_MM, _VOXEL_MM, 1.0])
    affine[:3, 3] = (first + 0.5) * _VOXEL_MM  # the centre of voxel 0
    x, y, z = (last - first + 1).tolist()
    return Grid(affine, (x, y, z))


def _to_voxel(points: np.ndarray, grid: Grid) -> np.ndarray:
    """RAS mm -> voxel space, corner origin: half a voxel more than the affine's inverse, whose integers are centres."""
    return (points - grid.affine[:3, 3]) / _VOXEL_MM + 0.5


def _paint(bundles: list[list[np.ndarray]], grid: Grid) -> _Fibres:
    """Spread the points' directions over the 27 voxels around each: density and axial mean direction of each bundle.

    The axial mean is the first eigenvector of the weighted sum of u u', which does not care about the sign of u
    (Mardia and Jupp, Directional Statistics, 2000, section 10.3).
    """
    num_voxels = int(np.prod(grid.shape))
    neighbours = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    density = np.zeros((num_voxels, len(bundles)))
    outer = np.zeros((num_voxels, len(bundles), 3, 3))
    for k, streamlines in enumerate(bundles):
        points = np.concatenate(streamlines)
        tangents = np.concatenate([np.gradient(s, axis=0) for s in streamlines])
        tangents /= np.sqrt((tangents**2).sum(axis=1, keepdims=True))
        voxels = np.floor(points).astype(int) + neighbours  # (27, P, 3)
        distance = (((voxels + 0.5 - points) * _VOXEL_MM) ** 2).sum(axis=-1)
        weights = np.exp(-distance / (2 * _KERNEL_MM**2)).reshape(-1)
        rows = np.ravel_multi_index(tuple(voxels.reshape(-1, 3).T), grid.shape)
        density[:, k] = np.bincount(rows, weights, num_voxels)
        for i in range(3):
            for j in range(3):
                product = np.tile(tangents[:, i] * tangents[:, j], len(neighbours))
                outer[:, k, i, j] = np.bincount(rows, weights * product, num_voxels)
    painted = np.flatnonzero(density.any(axis=1))
    directions = np.linalg.eigh(outer[painted])[1][..., :, -1]
    filled = density[painted].sum(axis=1, keepdims=True) + _TISSUE_POINTS
    return _Fibres(painted, directions, density[painted] / filled)


def _simulate(fibres: _Fibres, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(X, Y, Z, 28) float64 SH coefficients of S / S0; 0 outside the tissue."""
    from scipy.ndimage import binary_dilation

    # The mask is one voxel around the streamlines already.
    tissue = np.asarray(binary_dilation(mask, np.ones((3, 3, 3)), iterations=_SHELL - 1), dtype=bool)
    directions = half_sphere_directions(_NUM_DIRECTIONS)
    fibre_signal = multi_tensor_signal(
        fibres.directions,
        fibres.fractions,
        directions,
        b_value=_B_VALUE,
        parallel=_PARALLEL,
        perpendicular=_PERPENDICULAR,
    )
    isotropic = np.exp(-_B_VALUE * _ISOTROPIC)
    signal = np.full((mask.size, _NUM_DIRECTIONS), isotropic)
    signal[fibres.voxels] = fibre_signal + isotropic * (1 - fibres.fractions.sum(axis=1, keepdims=True))
    signal = signal[tissue.reshape(-1)]
    unweighted = _rician(np.ones((len(signal), _NUM_B0)), rng).mean(axis=1, keepdims=True)
    # Rounded: LAPACK's results differ by rounding between numbers of threads.
    fit = np.linalg.pinv(sh_matrix(directions, _SH_ORDER)).round(12)
    coefficients = np.zeros((*mask.shape, len(fit)))
    coefficients[tissue] = np.einsum("vg,fg->vf", _rician(signal, rng) / unweighted, fit)
    return coefficients


def _rician(signal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Magnitude of the signal with Gaussian noise on its real and imaginary part (Gudbjartsson and Patz, 1995)."""
    noise = rng.standard_normal((2, *signal.shape)) / _SNR
    return np.sqrt((signal + noise[0]) ** 2 + noise[1] ** 2)
