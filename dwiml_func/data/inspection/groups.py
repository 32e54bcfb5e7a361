"""Measure one group of one subject. Each function yields what is wrong with the group, see `hdf5.problems`.

What stops a training is checked by `hdf5.layout`; here are added the problems that a training tolerates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwiml_func.data.grid import Grid
from dwiml_func.data.hdf5.consistency import connectivity_fits, volume_attributes
from dwiml_func.data.hdf5.grid import read_grid, streamline_grid, voxel_sizes_of
from dwiml_func.data.hdf5.layout import (
    per_streamline,
    read_bundles,
    read_lengths_mm,
    read_points,
    read_table,
    read_volume,
    streamlines_that,
    volume_shape,
)
from dwiml_func.data.hdf5.problems import Checked, Problem, location, scalar
from dwiml_func.data.resampling import lengths_mm

if TYPE_CHECKING:
    import h5py

__all__ = ["Steps", "StreamlineSummary", "VolumeSummary", "inspect_streamlines", "inspect_volume"]

_EDGE = 1e-3  # voxels: float32 cannot place a point on a voxel's face any better


class VolumeSummary(NamedTuple):
    """A volume group; None where its header cannot be read."""

    shape: tuple[int, int, int, int] | None
    grid: Grid | None
    attributes: Mapping[str, Any] = {}


class Steps(NamedTuple):
    """The distances between a group's neighbouring points in mm, measured and not kept."""

    number: int
    total: float
    median: float
    least: float
    greatest: float


class StreamlineSummary(NamedTuple):
    """A streamline group; None where a problem made a measure impossible."""

    num_streamlines: int
    num_points: int
    lengths: NDArray[np.float64] | None
    """(S,) in mm."""
    steps: Steps | None
    grid: Grid | None
    extras: tuple[str, ...]
    """Names of data per streamline, and of the connectivity matrix."""
    bundles: tuple[str, ...] = ()


def inspect_volume(group: h5py.Group) -> Checked[VolumeSummary]:
    """Read a volume and measure it."""
    shape = yield from volume_shape(group)
    if shape is None:
        return VolumeSummary(None, None)
    yield from read_volume(group)
    named = scalar(group.attrs.get("nb_features", shape[3]))
    if named != shape[3]:
        yield Problem(location(group), f"attribute nb_features is {named}, but the data has {shape[3]} features")
    attributes = (yield from volume_attributes(group, shape[3])) or {}
    return VolumeSummary(shape, (yield from read_grid(group, shape[:3])), attributes)


def inspect_streamlines(group: h5py.Group) -> Checked[StreamlineSummary]:
    """Read a subject's streamlines and measure them."""
    grid = yield from streamline_grid(group)
    yield from voxel_sizes_of(group, grid)
    yield from connectivity_fits(group, None if grid is None else grid.shape)
    extras = _extras(group)
    table = yield from read_table(group)
    if table is None:
        return StreamlineSummary(0, 0, None, None, grid, extras)
    num = len(table.lengths)
    unknown = StreamlineSummary(num, int(table.lengths.sum()), None, None, grid, extras)
    if num == 0:
        yield Problem(location(group), "no streamlines")
        return unknown
    for key, values in per_streamline(group).items():
        if getattr(values, "ndim", 0) != 2 or len(values) != num:
            shape = getattr(values, "shape", "()")
            yield Problem(location(group), f"data per streamline {key!r} of shape {shape}. Expected ({num}, values)")
    bundles = yield from read_bundles(group, num)
    unknown = unknown._replace(bundles=() if bundles is None else bundles.names)
    stored_lengths = yield from read_lengths_mm(group, num)
    points = yield from read_points(group, table)
    if points is None or grid is None:
        return unknown
    points, offsets = points.astype(np.float64), np.concatenate([[0], np.cumsum(table.lengths)])
    outside = ((points < -_EDGE) | (points > np.array(grid.shape) + _EDGE)).any(axis=1)
    size = " x ".join(map(str, grid.shape))
    leave = np.logical_or.reduceat(outside, offsets[:-1])
    yield from streamlines_that(group, leave, f"leave the grid of {size} voxels")
    in_mm = np.einsum("pj,ij->pi", points, grid.affine[:3, :3])
    lengths = lengths_mm(in_mm, offsets)
    yield from streamlines_that(group, lengths == 0, "have no length: all points in one place")
    if stored_lengths is not None:
        differ = ~np.isclose(stored_lengths, lengths, rtol=1e-3, atol=1e-2)
        yield from streamlines_that(group, differ, "have another length in mm than euclidean_lengths says")
    elif "euclidean_lengths" not in group:
        yield Problem(location(group), "no dataset 'euclidean_lengths', which batches in length_mm need")
    elif (shape := getattr(group["euclidean_lengths"], "shape", ())) != (num,):
        yield Problem(location(group), f"euclidean_lengths of shape {shape}. Expected ({num},)")
    steps = np.delete(np.sqrt((np.diff(in_mm, axis=0) ** 2).sum(axis=1)), offsets[1:-1] - 1)
    measured = Steps(len(steps), *(float(f(steps)) for f in (np.sum, np.median, np.min, np.max)))
    return unknown._replace(lengths=lengths, steps=measured)


def _extras(group: Any) -> tuple[str, ...]:
    names = [f"data per streamline {key!r}" for key in per_streamline(group)]
    if "connectivity_matrix" in group:
        kind = str(group.attrs.get("connectivity_matrix_type", "of no type")).replace("_", " ")
        names.append(f"connectivity matrix {kind}")
    return tuple(names)
