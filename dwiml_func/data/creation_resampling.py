"""Points at even distances along streamlines, for all streamlines of a file at once, on flat arrays."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["StepRule", "compress", "lengths_mm", "resample", "steps_for"]

StepRule = Literal["nearest", "dwi_ml"]
"""A way of counting steps, by name, see `steps_for`."""


def compress(
    points: NDArray[np.float64], offsets: NDArray[np.int64], tolerance: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Leave out points where streamlines are nearly straight, by dipy's `compress_streamlines`.

    Args:
        points: (P, 3), in mm.
        offsets: (S + 1,) from 0 to P; at least one streamline, each of at least two points.
        tolerance: largest distance in mm between a streamline and what is left of it.

    Returns:
        The points that are left, and their (S + 1,) offsets. Segments grow to 10 mm at most.

    Example:
        >>> line = np.array([[0.0, 0, 0], [1, 0, 0], [4, 0, 0]])
        >>> compress(line, np.array([0, 3]), 0.01)[0].tolist()
        [[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]
    """
    from dipy.tracking.streamlinespeed import compress_streamlines  # dipy is heavy: only where it is asked for

    kept = list(compress_streamlines(np.split(points, offsets[1:-1]), tol_error=tolerance))
    return np.concatenate(kept), np.cumsum([0, *map(len, kept)])


def lengths_mm(points: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum the distances between the points of each streamline.

    Args:
        points: (P, 3), in mm.
        offsets: (S + 1,) from 0 to P; every streamline has at least one point.

    Returns:
        (S,) in mm.

    Example:
        >>> lengths_mm(np.array([[0.0, 0, 0], [3, 4, 0], [9, 9, 9]]), np.array([0, 2, 3])).tolist()
        [5.0, 0.0]
    """
    travelled = _travelled(points, offsets)
    return travelled[offsets[1:] - 1] - travelled[offsets[:-1]]


def steps_for(lengths: NDArray[np.float64], step_size: float, rule: StepRule = "nearest") -> NDArray[np.int64]:
    """Count the steps into which streamlines divide evenly.

    Args:
        lengths: (S,) in mm.
        step_size: in mm, above 0.
        rule: "nearest": as many as make a step come closest to the size. "dwi_ml": there, and in scilpy, that is the
            number of *points*, rounded up, so that the steps are fewer, and longer than asked for.

    Returns:
        (S,) numbers of steps, at least 1. The points are one more.

    Source: scilpy, `resample_streamlines_step_size`, for "dwi_ml".

    Example:
        >>> steps_for(np.array([10.0, 10.4, 0.1]), 1.0).tolist()
        [10, 10, 1]
        >>> steps_for(np.array([10.0, 10.4, 0.1]), 1.0, "dwi_ml").tolist()
        [9, 10, 1]
    """
    num_steps = np.rint(lengths / step_size) if rule == "nearest" else np.ceil(lengths / step_size) - 1
    return np.maximum(1, num_steps).astype(np.int64)


def resample(
    points: NDArray[np.float64], offsets: NDArray[np.int64], num_steps: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Place points at even distances along each streamline, by linear interpolation. Ends stay where they are.

    Args:
        points: (P, 3), in mm.
        offsets: (S + 1,) from 0 to P; every streamline has at least two points and a length above 0.
        num_steps: (S,) steps of each new streamline, at least 1.

    Returns:
        The new (P', 3) points and (S + 1,) offsets, P' = sum of num_steps + S.

    Example:
        >>> line = np.array([[0.0, 0, 0], [1, 0, 0], [4, 0, 0]])
        >>> resample(line, np.array([0, 3]), np.array([2]))[0].tolist()
        [[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [4.0, 0.0, 0.0]]
    """
    new_offsets = np.concatenate([[0], np.cumsum(num_steps + 1)])
    streamline = np.repeat(np.arange(len(num_steps)), num_steps + 1)
    position = np.arange(new_offsets[-1]) - new_offsets[streamline]
    travelled = _travelled(points, offsets)
    starts, ends = offsets[:-1], offsets[1:] - 1
    lengths = travelled[ends] - travelled[starts]
    target = travelled[starts][streamline] + lengths[streamline] * (position / num_steps[streamline])
    # The segment that holds the target; rounding must not lead into a neighbouring streamline.
    segment = np.searchsorted(travelled, target, side="right") - 1
    segment = np.clip(segment, starts[streamline], ends[streamline] - 1)
    size = travelled[segment + 1] - travelled[segment]
    share = np.clip((target - travelled[segment]) / np.where(size > 0, size, 1.0), 0.0, 1.0)[:, None]
    new_points = points[segment] * (1 - share) + points[segment + 1] * share
    new_points[new_offsets[:-1]] = points[starts]
    new_points[new_offsets[1:] - 1] = points[ends]
    return new_points, new_offsets


def _travelled(points: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """(P,) distance walked to each point through all streamlines; the way from one to the next counts nothing."""
    steps = np.sqrt((np.diff(points, axis=0, prepend=points[:1]) ** 2).sum(axis=1))
    steps[offsets[:-1]] = 0.0
    return np.cumsum(steps)
