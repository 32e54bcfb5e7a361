"""The grid on which a subject's volumes and streamlines lie, and when two grids are the same."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Grid", "grid_difference", "grid_of", "to_voxel"]

_TOLERANCE = 1e-3  # of an affine's elements: what `open_dataset`, and dipy's is_header_compatible, let pass


class Grid(NamedTuple):
    """Voxels in space.

    Args:
        affine: (4, 4) from voxel indices (a voxel's centre at integers) to RAS mm.
        shape: (X, Y, Z) voxels.

    Example:
        >>> Grid(np.eye(4), (9, 9, 9)).shape
        (9, 9, 9)
    """

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]


def grid_of(affine: ArrayLike, shape: ArrayLike) -> Grid:
    """Check and convert what a file's header says.

    Args:
        affine: (4, 4).
        shape: at least (X, Y, Z).

    Returns:
        The grid.

    Raises:
        ValueError: the affine is not one of space, or a dimension is not above 0.

    Example:
        >>> grid_of(np.zeros((4, 4)), (9, 9, 9))
        Traceback (most recent call last):
        ValueError: the header's affine does not turn voxels into mm
    """
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:3, :3])) < 1e-12:
        raise ValueError("the header's affine does not turn voxels into mm")
    x, y, z = (int(size) for size in np.asarray(shape).reshape(-1)[:3])
    if min(x, y, z) < 1:
        raise ValueError(f"the header's grid has {x} x {y} x {z} voxels")
    return Grid(matrix, (x, y, z))


def grid_difference(received: Grid, expected: Grid) -> str | None:
    """Say in what two grids differ.

    Args:
        received: one.
        expected: the other.

    Returns:
        Words for an error, None when they are the same.

    Example:
        >>> grid_difference(Grid(np.eye(4), (9, 9, 9)), Grid(np.eye(4), (9, 9, 8)))
        'a grid of 9 x 9 x 9 voxels, expected 9 x 9 x 8'
    """
    if received.shape != expected.shape:
        sizes = (" x ".join(map(str, grid.shape)) for grid in (received, expected))
        return "a grid of {} voxels, expected {}".format(*sizes)
    difference = float(np.abs(received.affine - expected.affine).max())
    if difference > _TOLERANCE:
        rows = (str(grid.affine[:3].round(4).tolist()) for grid in (received, expected))
        return "the affine {}, expected {}".format(*rows)
    return None


def to_voxel(points: NDArray[np.float64], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn mm into voxels.

    Args:
        points: (P, 3), RAS mm.
        affine: (4, 4) from voxel indices (a voxel's centre at integers) to RAS mm.

    Returns:
        (P, 3), voxel space, corner origin: half a voxel more than the affine's inverse, whose integers are centres.

    Example:
        >>> to_voxel(np.array([[2.0, 0, 0]]), np.diag([2.0, 2, 2, 1])).tolist()
        [[1.5, 0.5, 0.5]]
    """
    inverse = np.linalg.inv(affine)
    return np.einsum("pj,ij->pi", points, inverse[:3, :3]) + (inverse[:3, 3] + 0.5)
