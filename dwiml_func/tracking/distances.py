"""Distances between streamlines in mm: points at an arc length, lags after the same way, the direct-flip distance."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dwiml_func.data.resampling import lengths_mm, travelled_mm
from dwiml_func.data.streamlines import Streamlines

__all__ = [
    "direct_flip_distances",
    "equidistant_points",
    "final_distances",
    "lags",
    "line_lengths",
    "points_at",
]

_BLOCK_VALUES = 1 << 24  # distances in memory at once


def line_lengths(lines: Streamlines) -> NDArray[np.float64]:
    """(S,) mm, of streamlines of one point or more."""
    return lengths_mm(lines.points.double().numpy(), lines.offsets.numpy())


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


def lags(
    lines: Streamlines, real: Streamlines, distances: tuple[float, ...] = (10.0, 20.0, 40.0, 80.0)
) -> NDArray[np.float64]:
    """Distances between tracked and real lines after the same way along each, from a start that both share.

    A line that stopped counts where it stopped, so that stopping early wins nothing.

    Args:
        lines: S tracked streamlines in mm, from the start on; of one point where tracking found none.
        real: the S real ones, from the same start on.
        distances: D ways in mm from the start.

    Returns:
        (S, D) float64 in mm; NaN where the real line is shorter than the way.

    Example:
        >>> real = Streamlines.from_list([[[0, 0, 0], [30, 0, 0]]])
        >>> lines = Streamlines.from_list([[[0, 0, 0], [10, 0, 0], [10, 5, 0]]])
        >>> lags(lines, real).round(1).tolist()
        [[0.0, 11.2, nan, nan]]
    """
    ways = np.broadcast_to(np.array(distances), (len(lines), len(distances)))
    found = np.linalg.norm(points_at(lines, ways) - points_at(real, ways), axis=-1)
    return np.where(ways <= line_lengths(real)[:, None] + 1e-6, found, np.nan)


def final_distances(lines: Streamlines, real: Streamlines) -> NDArray[np.float64]:
    """Distances between the last points of tracked and real lines, (S,) in the unit of the lines.

    Args:
        lines: S tracked streamlines.
        real: the S real ones, in the same space; in mm for distances in mm.

    Returns:
        (S,) float64. dwi_ml's `tracking_mean_final_distance_monitor` is their mean, there in voxels.

    Example:
        >>> real = Streamlines.from_list([[[0, 0, 0], [3, 0, 0]]])
        >>> final_distances(Streamlines.from_list([[[0, 0, 0], [3, 4, 0]]]), real).tolist()
        [4.0]
    """
    last = [each.points[each.offsets[1:] - 1].double().numpy() for each in (lines, real)]
    return np.linalg.norm(last[0] - last[1], axis=1)
