"""Distances between streamlines in mm: points at an arc length, and the mean direct-flip distance."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dwiml_func.data.resampling import travelled_mm
from dwiml_func.data.streamlines import Streamlines

__all__ = ["direct_flip_distances", "equidistant_points", "line_lengths", "points_at"]

_BLOCK_VALUES = 1 << 24  # distances in memory at once


def line_lengths(lines: Streamlines) -> NDArray[np.float64]:
    """(S,) mm, of streamlines of one point or more."""
    points, offsets = lines.points.double().numpy(), lines.offsets.numpy()
    travelled = travelled_mm(points, offsets)
    return travelled[offsets[1:] - 1] - travelled[offsets[:-1]]


def points_at(lines: Streamlines, distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (S, D, 3) at distances (S, D) in mm along streamlines in mm; beyond an end: that end."""
    points, offsets = lines.points.double().numpy(), lines.offsets.numpy()
    travelled = travelled_mm(points, offsets)
    starts, ends = offsets[:-1, None], offsets[1:, None] - 1
    target = np.clip(travelled[starts] + distances, travelled[starts], travelled[ends])
    segment = np.searchsorted(travelled, target, side="right") - 1
    segment = np.clip(segment, starts, np.maximum(ends - 1, starts))
    following = np.minimum(segment + 1, ends)
    size = travelled[following] - travelled[segment]
    share = ((target - travelled[segment]) / np.where(size > 0, size, 1.0))[..., None]
    return points[segment] * (1 - share) + points[following] * share


def equidistant_points(lines: Streamlines, num_points: int) -> NDArray[np.float64]:
    """(S, num_points, 3): points at even distances along each streamline, from its first to its last."""
    return points_at(lines, line_lengths(lines)[:, None] * np.linspace(0.0, 1.0, num_points))


def direct_flip_distances(
    lines: NDArray[np.float64], others: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean distances (N, M) in mm of points of the same number, as they run and with the others turned round.

    `lines` is (N, K, 3), `others` (M, K, 3), see `equidistant_points`. The smaller of the two is the MDF, the mean
    direct-flip distance (Garyfallidis et al., QuickBundles, Frontiers in Neuroscience 6, 2012).
    """
    first, second = (torch.from_numpy(np.ascontiguousarray(points.swapaxes(0, 1))) for points in (lines, others))
    num_rows = max(1, _BLOCK_VALUES // max(1, others.shape[0] * others.shape[1]))
    means: list[list[torch.Tensor]] = [[], []]
    for rows in first.split(num_rows, dim=1):
        for found, target in zip(means, (second, second.flip(0)), strict=True):
            found.append(torch.cdist(rows, target, compute_mode="donot_use_mm_for_euclid_dist").mean(dim=0))
    direct, flipped = (torch.cat(found).numpy() for found in means)
    return direct, flipped
