"""Which regions streamlines connect: count matrices by blocs or labels, and how they compare with real ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwiml_func.data.streamlines import Streamlines
from dwiml_func.tracking.overlap import voxels_along

__all__ = [
    "ConnectivityScores",
    "connection_counts",
    "connectivity_scores",
    "end_points",
    "mean_square_differences",
    "regions_of_blocs",
    "regions_of_labels",
    "regions_of_longest_segments",
]


class ConnectivityScores(NamedTuple):
    """How the connections of a tractogram compare with real ones; 0 is best.

    false_connections: share of the streamlines that join regions that no real streamline joins.
    missing_connections: share of the real connections that no streamline makes.

    Example:
        >>> ConnectivityScores(0.0, 0.5).missing_connections
        0.5
    """

    false_connections: float
    missing_connections: float


def regions_of_blocs(
    points: NDArray[np.float64], shape: tuple[int, int, int], nb_blocs: tuple[int, int, int]
) -> NDArray[np.int64]:
    """The bloc around each point, where each axis of a volume is cut into blocs of equal size.

    Args:
        points: (..., 3), voxel space, corner origin; points outside count to the nearest bloc.
        shape: (X, Y, Z) voxels.
        nb_blocs: blocs along each axis.

    Returns:
        (...) int64, 0 to the number of blocs - 1; the last axis varies fastest.

    Example:
        >>> regions_of_blocs(np.array([[0.5, 0.5, 0.5], [9.9, 9.9, 9.9]]), (10, 10, 10), (2, 2, 2)).tolist()
        [0, 7]
    """
    blocs = np.floor(points * np.array(nb_blocs) / np.array(shape)).astype(np.int64)
    blocs = np.clip(blocs, 0, np.array(nb_blocs) - 1)
    return (blocs[..., 0] * nb_blocs[1] + blocs[..., 1]) * nb_blocs[2] + blocs[..., 2]


def regions_of_labels(points: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row of the label of the voxel around each point, among the volume's labels in ascending order.

    Args:
        points: (..., 3), voxel space, corner origin; points outside count to the nearest voxel.
        labels: (X, Y, Z) integers; 0, the background, is a label as the others.

    Returns:
        (...) int64, rows of a connectivity matrix.

    Example:
        >>> regions_of_labels(np.array([[0.5, 0.5, 0.5], [1.5, 0.5, 0.5]]), np.array([[[7]], [[0]]])).tolist()
        [1, 0]
    """
    voxels = np.clip(np.floor(points).astype(np.int64), 0, np.array(labels.shape) - 1)
    rows = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    return rows[tuple(np.moveaxis(voxels, -1, 0))].astype(np.int64)


def regions_of_longest_segments(lines: Streamlines, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of the first and the last region that each streamline crosses, with the background, label 0, between.

    Ends beside a region count to it then, and regions that are crossed on the way do not count.

    Args:
        lines: S streamlines, voxel space, corner origin; points outside count to the nearest voxel.
        labels: (X, Y, Z) integers, N different ones, above 0 in regions.

    Returns:
        (S, 2) int64, rows of a connectivity matrix; (N, N) where there is no such segment: a streamline that crosses no
        region, never leaves them, or ends in the first voxel that it reaches after them.

    Source: scilpy, `scilpy/tractanalysis/connectivity_segmentation.py`, `extract_longest_segments_from_profile`.

    Example:
        >>> labels = np.array([0, 7, 0, 8, 0, 9])[:, None, None]
        >>> line = Streamlines.from_list([[[0.5, 0.5, 0.5], [5.5, 0.5, 0.5]]])
        >>> regions_of_longest_segments(line, labels).tolist()
        [[1, 3]]
    """
    voxels, line = voxels_along(lines, (1.0, 1.0, 1.0))
    voxels = np.clip(voxels, 0, np.array(labels.shape) - 1)
    is_other = np.ones(len(line), dtype=bool)  # than the one before it
    is_other[1:] = (line[1:] != line[:-1]) | (voxels[1:] != voxels[:-1]).any(axis=1)
    voxels, line = voxels[is_other], line[is_other]
    found = labels[tuple(voxels.T)]
    place, regions = np.arange(len(line)), np.flatnonzero(found > 0)
    first, last, background = (np.full(len(lines), -1) for _ in range(3))
    first[line[regions[::-1]]] = place[regions[::-1]]  # of equal rows the last is kept
    last[line[regions]] = place[regions]
    is_inner = np.zeros(len(line), dtype=bool)
    is_inner[:-1] = line[1:] == line[:-1]
    between = np.flatnonzero((found == 0) & is_inner)
    background[line[between]] = place[between]
    names = np.unique(labels)
    rows = np.full((len(lines), 2), len(names))
    is_joined = (first >= 0) & (background > first) & (last > first + 1)
    ends = np.stack([first, last], axis=1)[is_joined]
    rows[is_joined] = np.searchsorted(names, found[ends])
    return rows


def connection_counts(regions: NDArray[np.int64], num_regions: int) -> NDArray[np.int64]:
    """How many streamlines join each pair of regions.

    Args:
        regions: (S, 2), the regions of each streamline's ends.
        num_regions: N.

    Returns:
        (N, N) int64; the smaller region is the row, so that the lower triangle is empty.

    Example:
        >>> connection_counts(np.array([[2, 0], [0, 2], [1, 1]]), 3).tolist()
        [[0, 0, 2], [0, 1, 0], [0, 0, 0]]
    """
    low, high = regions.min(axis=1), regions.max(axis=1)
    return np.bincount(low * num_regions + high, minlength=num_regions**2).reshape(num_regions, num_regions)


def connectivity_scores(counts: NDArray[np.int64], real: NDArray) -> ConnectivityScores:
    """Compare the connections of a tractogram with a subject's own.

    Args:
        counts: (N, N), see `connection_counts`.
        real: (N, N), above 0 where regions are connected; either triangle, or both.

    Returns:
        False and missing connections; NaN without streamlines, or without real connections.

    Source: the share of false connections is dwi_ml's `tracking_connectivity_score_monitor`, in which missing
    connections do not count.

    Example:
        >>> connectivity_scores(np.array([[0, 3], [0, 1]]), np.array([[1, 1], [1, 0]]))
        ConnectivityScores(false_connections=0.25, missing_connections=0.5)
    """
    is_real = np.triu((real > 0) | (real > 0).T)
    num_streamlines, num_real = int(counts.sum()), int(is_real.sum())
    num_false = int(counts[~is_real].sum())
    num_missing = int((is_real & (counts == 0)).sum())
    return ConnectivityScores(
        num_false / num_streamlines if num_streamlines else float("nan"),
        num_missing / num_real if num_real else float("nan"),
    )


def mean_square_differences(counts: NDArray, real: NDArray) -> tuple[float, float]:
    """The mean square of the difference of two matrices, and of each one's shares of all its streamlines.

    Args:
        counts, real: (N, N), each with a number above 0.

    Returns:
        Both means, over all N * N entries.

    Source: dwi_ml, `dwiml_compute_connectivity_score`, which calls them roots.

    Example:
        >>> mean_square_differences(np.array([[0, 3], [0, 1]]), np.array([[0, 1], [0, 1]]))
        (1.0, 0.03125)
    """
    raw = counts.astype(np.float64) - real.astype(np.float64)
    shares = counts / counts.sum() - real / real.sum()
    return float((raw**2).mean()), float((shares**2).mean())


def end_points(lines: Streamlines) -> NDArray[np.float64]:
    """The first and the last point of each streamline.

    Args:
        lines: S streamlines of one point or more.

    Returns:
        (S, 2, 3) float64, in the space of the lines.

    Example:
        >>> end_points(Streamlines.from_list([[[0, 0, 0], [1, 0, 0], [2, 0, 0]]]))[0, :, 0].tolist()
        [0.0, 2.0]
    """
    rows = np.stack([lines.offsets[:-1].numpy(), lines.offsets[1:].numpy() - 1], axis=1)
    return lines.points.double().numpy()[rows]
