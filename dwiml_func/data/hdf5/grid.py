"""The grids on which the groups of an HDF5 dataset lie, read and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dwiml_func.data.grid import Grid, grid_difference, grid_of
from dwiml_func.data.hdf5.problems import Checked, Problem, attribute_of, location, scalar

if TYPE_CHECKING:
    import h5py

__all__ = ["read_grid", "same_grid", "streamline_grid", "voxel_sizes_of"]

_SPACES = {
    "space": ("Space.VOX", ("space.vox", "vox")),  # as dipy's Space.VOX prints, and its value
    "origin": ("Origin.TRACKVIS (the corner)", ("origin.trackvis", "trackvis", "corner")),  # and its name
}


def read_grid(group: h5py.Group, shape: object) -> Checked[Grid]:
    """The grid of a group whose voxels have this shape."""
    affine = yield from attribute_of(group, "affine")
    if affine is None:
        return None
    try:
        return grid_of(np.asarray(affine), np.asarray(shape))
    except (ValueError, TypeError) as error:
        yield Problem(location(group), f"the affine or the shape of the grid is wrong: {error}")


def streamline_grid(group: h5py.Group) -> Checked[Grid]:
    """The grid of streamlines, which are in voxel space with corner origin."""
    for name, (expected, accepted) in _SPACES.items():
        received = yield from attribute_of(group, name)
        received = None if received is None else scalar(received)
        if received is not None and str(received).lower() not in accepted:
            yield Problem(location(group), f"attribute {name!r} is {received}. Expected {expected}")
    dimensions = yield from attribute_of(group, "dimensions")
    return None if dimensions is None else (yield from read_grid(group, dimensions))


def same_grid(group: h5py.Group, grid: Grid, first: str, expected: Grid) -> Checked[None]:
    """A group lies on the grid of the subject's group `first`."""
    difference = grid_difference(grid, expected)
    if difference is not None:
        yield Problem(location(group), f"{difference}, as group {first!r} has")


def voxel_sizes_of(group: h5py.Group, grid: Grid | None) -> Checked[NDArray[np.float32]]:
    """(3,) mm, those of the grid's affine."""
    received = yield from attribute_of(group, "voxel_sizes")
    if received is None:
        return None
    sizes = np.asarray(received)
    if sizes.dtype.kind not in "fiu" or sizes.shape != (3,) or not (np.isfinite(sizes) & (sizes > 0)).all():
        yield Problem(location(group), f"attribute 'voxel_sizes' is {sizes.tolist()}. Expected three lengths in mm")
        return None
    of_affine = sizes if grid is None else np.sqrt((grid.affine[:3, :3] ** 2).sum(axis=0))
    if np.allclose(sizes, of_affine, rtol=1e-2):
        return sizes.astype(np.float32)
    sentence = (
        f"attribute 'voxel_sizes' is {sizes.tolist()}, but the affine has voxels of {of_affine.round(3).tolist()} mm"
    )
    yield Problem(location(group), sentence)
