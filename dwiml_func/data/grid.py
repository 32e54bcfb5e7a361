"""The grid on which a subject's volumes and streamlines lie, and when two grids are the same."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Grid", "grid_difference", "grid_of", "orientation_difference", "orientation_of", "shear_of", "to_voxel"]

_TOLERANCE = 1e-3  # of an affine's elements: what `open_dataset`, and dipy's is_header_compatible, let pass

_SHEAR = 0.01  # cosine between two axes of a grid: half a degree, and less than a percent of a length

_SAME_AXIS = 0.5  # cosine between two subjects' axes; scans are tilted by less


class Grid(NamedTuple):
    """The (X, Y, Z) voxels of a volume, and the (4, 4) affine from voxel centres to RAS mm."""

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]


def grid_of(affine: ArrayLike, shape: ArrayLike) -> Grid:
    """The grid of a file's header: an affine and at least (X, Y, Z). ValueError where it is not one of space."""
    stored = np.asarray(affine)
    matrix = stored.astype(np.float64) if stored.dtype.kind in "iuf" else np.empty(0)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:3, :3])) < 1e-12:
        raise ValueError("the header's affine does not turn voxels into mm")
    if not np.allclose(matrix[3], (0, 0, 0, 1)):
        raise ValueError(f"the header's affine has the last row {matrix[3].tolist()}, expected 0 0 0 1")
    sizes = np.asarray(shape).reshape(-1)[:3]
    if sizes.dtype.kind not in "iuf" or len(sizes) < 3 or not ((sizes >= 1) & (sizes == np.rint(sizes))).all():
        raise ValueError(f"the header's grid has {' x '.join(map(str, sizes.tolist()))} voxels, expected three sizes")
    x, y, z = map(int, sizes)
    return Grid(matrix, (x, y, z))


def grid_difference(received: Grid, expected: Grid) -> str | None:
    """How one grid differs from the expected one, in words; None where they are the same."""
    if received.shape != expected.shape:
        sizes = (" x ".join(map(str, grid.shape)) for grid in (received, expected))
        return "a grid of {} voxels, expected {}".format(*sizes)
    difference = float(np.abs(received.affine - expected.affine).max())
    if difference > _TOLERANCE:
        rows = (str(grid.affine[:3].round(4).tolist()) for grid in (received, expected))
        return "the affine {}, expected {}".format(*rows)
    return None


def orientation_difference(received: Grid, expected: Grid) -> str | None:
    """How the voxel axes of two grids point differently, in words; None where all are within 60 degrees."""
    first, second = (grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0) for grid in (received, expected))
    if (np.einsum("ij,ij->j", first, second) > _SAME_AXIS).all():
        return None
    codes = (orientation_of(grid.affine) for grid in (received, expected))
    return "the orientation {} of the voxel axes, expected {}".format(*codes)


def shear_of(grid: Grid) -> str | None:
    """How the voxel axes of a grid are not at right angles, in words; None where they are."""
    axes = grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0)
    cosine = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if cosine <= _SHEAR:
        return None
    angle = np.degrees(np.arccos(min(cosine, 1.0)))
    return f"voxel axes at {angle:.1f} degrees, but lengths and angles are taken as if at 90. Resample to a grid of 90"


def orientation_of(affine: ArrayLike) -> str:
    """Where the voxel axes of an affine point, such as "RAS", as nibabel's `aff2axcodes` tells it."""
    from nibabel.orientations import aff2axcodes

    return "".join(map(str, aff2axcodes(np.asarray(affine))))


def to_voxel(points: NDArray[np.float64], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """RAS mm to voxel space with corner origin, (P, 3): half a voxel more than the affine's inverse gives."""
    inverse = np.linalg.inv(affine)
    return np.einsum("pj,ij->pi", points, inverse[:3, :3]) + (inverse[:3, 3] + 0.5)
