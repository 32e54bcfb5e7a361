"""How far two sets of streamlines cover the same space: by the voxels that they cross, and within a distance."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwiml_func.data.resampling import Resampling, resample_points
from dwiml_func.data.streamlines import Streamlines

__all__ = ["Overlap", "crossed_voxels", "overlap_within", "voxel_overlap", "voxels_along"]

_DENSE_MM = 0.5  # distances between points of which the nearest counts
_ROUNDING = 1e-12  # shares of a segment that differ by rounding alone
_AXIS_BITS = 21  # three coordinates in one int64


class Overlap(NamedTuple):
    """How far lines cover their reference; NaN where a share of nothing is asked for.

    overlap: share of the reference that the lines cover.
    overreach: share of the lines that lies outside the reference.
    f1: harmonic mean of the overlap and of what is not overreach; with voxels, Dice's coefficient.

    Source: the overlap, `OR_pct_vs` and f1 of scilpy's `scilpy/tractanalysis/scoring.py`.

    Example:
        >>> Overlap(0.5, 0.0, 2 / 3).overlap
        0.5
    """

    overlap: float
    overreach: float
    f1: float


def voxel_overlap(lines: Streamlines, reference: Streamlines, voxel_sizes: tuple[float, float, float]) -> Overlap:
    """Overlap by voxels that at least one streamline crosses.

    Args:
        lines: S streamlines in mm, from the corner of the grid on.
        reference: others in the same space.
        voxel_sizes: of the grid, mm.

    Returns:
        Shares of voxels.

    Example:
        >>> lines = Streamlines.from_list([[[0.5, 0.5, 0.5], [3.5, 0.5, 0.5]]])
        >>> reference = Streamlines.from_list([[[0.5, 0.5, 0.5], [1.5, 0.5, 0.5]]])
        >>> voxel_overlap(lines, reference, (1.0, 1.0, 1.0))
        Overlap(overlap=1.0, overreach=0.5, f1=0.6666666666666666)
    """
    found, expected = crossed_voxels(lines, voxel_sizes), crossed_voxels(reference, voxel_sizes)
    both = len(np.intersect1d(found, expected, assume_unique=True))
    return _overlap(_share(both, len(expected)), 1.0 - _share(both, len(found)))


def overlap_within(lines: Streamlines, reference: Streamlines, distance: float = 2.0) -> Overlap:
    """Overlap by points that have a point of the other set within a distance.

    Args:
        lines: S streamlines of two points or more, in mm.
        reference: others in the same space.
        distance: mm.

    Returns:
        Shares of points, half a mm apart on the streamlines.

    Example:
        >>> lines = Streamlines.from_list([[[0, 0, 0], [10, 0, 0]]])
        >>> overlap_within(lines, Streamlines.from_list([[[0, 1, 0], [10, 1, 0]]])).f1
        1.0
    """
    from scipy.spatial import KDTree

    found, expected = _dense_points(lines), _dense_points(reference)
    if len(found) == 0 or len(expected) == 0:
        return _overlap(0.0 if len(expected) else float("nan"), 1.0 if len(found) else float("nan"))
    near = [
        np.isfinite(KDTree(other).query(points, distance_upper_bound=distance * (1 + 1e-9))[0])
        for points, other in ((expected, found), (found, expected))
    ]
    return _overlap(float(near[0].mean()), 1.0 - float(near[1].mean()))


def crossed_voxels(lines: Streamlines, voxel_sizes: tuple[float, float, float]) -> NDArray[np.int64]:
    """Numbers of the voxels that streamlines cross, each once, ascending; see `voxels_along`."""
    voxels = voxels_along(lines, voxel_sizes)[0] + (1 << (_AXIS_BITS - 1))
    return np.unique((voxels[:, 0] << 2 * _AXIS_BITS) + (voxels[:, 1] << _AXIS_BITS) + voxels[:, 2])


def voxels_along(
    lines: Streamlines, voxel_sizes: tuple[float, float, float]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The voxels that streamlines cross, (M, 3), in their order, and the streamline of each, (M,), ascending.

    A segment is cut where it crosses a face of a voxel; the middle of each piece tells in which voxel it lies. A voxel
    that is touched in an edge alone is not crossed. One follows itself where a point lies in it.
    """
    points = lines.points.double().numpy() / np.array(voxel_sizes)
    starts = np.delete(np.arange(len(points)), lines.offsets.numpy()[1:] - 1)
    first, step = points[starts], points[starts + 1] - points[starts]
    rows, cuts = [np.arange(len(starts))] * 2, [np.zeros(len(starts)), np.ones(len(starts))]
    for axis in range(3):
        low, high = (pick(first[:, axis], first[:, axis] + step[:, axis]) for pick in (np.minimum, np.maximum))
        num_faces = np.maximum(0, np.ceil(high) - np.floor(low) - 1).astype(np.int64)
        row = np.repeat(np.arange(len(starts)), num_faces)
        number = np.arange(len(row)) - np.repeat(np.cumsum(num_faces) - num_faces, num_faces)
        rows.append(row)
        cuts.append((np.floor(low)[row] + 1 + number - first[row, axis]) / step[row, axis])
    row, cut = np.concatenate(rows), np.concatenate(cuts)
    order = np.lexsort([cut, row])
    row, cut = row[order], cut[order]
    is_piece = (row[1:] == row[:-1]) & (cut[1:] > cut[:-1] + _ROUNDING)
    middle = ((cut[1:] + cut[:-1]) / 2)[is_piece, None]
    row = row[:-1][is_piece]
    line = np.searchsorted(lines.offsets.numpy(), starts[row], side="right") - 1
    return np.floor(first[row] + middle * step[row]).astype(np.int64), line


def _dense_points(lines: Streamlines) -> NDArray[np.float64]:
    points, offsets = lines.points.double().numpy(), lines.offsets.numpy()
    return points if len(lines) == 0 else resample_points(points, offsets, Resampling(step_size=_DENSE_MM))[0]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _overlap(overlap: float, overreach: float) -> Overlap:
    precision = 1.0 - overreach
    total = overlap + precision
    return Overlap(overlap, overreach, 2 * overlap * precision / total if total != 0 else 0.0)
