"""Points at even distances along streamlines, for all streamlines of a file at once, on flat arrays.

How densely streamlines are sampled: by a step, by a number of points, or compressed; on flat arrays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dwiml_func.data.streamlines import Streamlines

__all__ = ["Resampling", "StepRule", "compress", "lengths_mm", "resample", "resample_streamlines", "steps_for"]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampling:
    """A way of sampling streamlines: at most one of the three; none leaves them as they are.

    Args:
        step_size: mm between points, above 0; each streamline is cut evenly, into steps of about this size.
        nb_points: points of each streamline, at least 2.
        compress: largest distance in mm, above 0, by which the curve may move when points are removed.
        step_rule: how steps are counted, see `steps_for`. It does not make two ways of sampling unequal: streamlines
            that have the step size already are not sampled again, whichever rule they were made by.

    Raises:
        ValueError: more than one is given, or a number is out of range.

    Example:
        >>> Resampling(step_size=0.5).nb_points is None
        True
    """

    step_size: float | None = None
    nb_points: int | None = None
    compress: float | None = None
    step_rule: StepRule = field(default="nearest", compare=False)

    def __post_init__(self) -> None:
        given = {name: v for name in ("step_size", "nb_points", "compress") if (v := getattr(self, name)) is not None}
        if len(given) > 1:
            raise ValueError(f"Expected at most one of step_size, nb_points and compress. Received: {given}")
        if self.step_rule not in get_args(StepRule):
            raise ValueError(
                f"Expected a step_rule among {', '.join(get_args(StepRule))}. Received: {self.step_rule!r}"
            )
        for name, value in given.items():
            least = 2 if name == "nb_points" else 0
            if not (math.isfinite(value) and value >= least and value > 0):
                bound = "at least 2" if name == "nb_points" else "above 0 mm"
                raise ValueError(f"{name}: expected a number {bound}. Received: {value}")


def resample_streamlines(lines: Streamlines, voxel_sizes: Tensor, resampling: Resampling) -> Streamlines:
    """Sample streamlines anew, in mm. Their first and last points stay where they are, to the bit.

    Args:
        lines: S streamlines of two points or more, voxel space.
        voxel_sizes: (S, 3), mm, of each streamline's voxels.
        resampling: how.

    Returns:
        S streamlines, voxel space; `lines` itself where nothing is asked for. New points lie on the segments between
        the old ones; compression keeps a part of the old points (dipy's `compress_streamlines`, segments up to 10 mm).

    Example:
        >>> lines = Streamlines.from_list([[[0, 0, 0], [1, 0, 0], [4, 0, 0]]])
        >>> resample_streamlines(lines, torch.full((1, 3), 2.0), Resampling(step_size=4.0)).points[:, 0].tolist()
        [0.0, 2.0, 4.0]
    """
    if resampling == Resampling() or len(lines) == 0:
        return lines
    offsets, sizes = lines.offsets.numpy(), voxel_sizes.numpy().astype(np.float64)
    points = lines.points.numpy() * np.repeat(sizes, np.diff(offsets), axis=0)
    if resampling.compress is not None:
        points, offsets = compress(points, offsets, resampling.compress)
    else:
        if resampling.step_size is not None:
            num_steps = steps_for(lengths_mm(points, offsets), resampling.step_size, resampling.step_rule)
        else:
            num_steps = np.full(len(lines), (resampling.nb_points or 2) - 1)
        points, offsets = resample(points, offsets, num_steps)
    # In float64 a factor and its inverse leave every float32 as it was.
    points = points / np.repeat(sizes, np.diff(offsets), axis=0)
    return Streamlines(torch.from_numpy(points.astype(np.float32)), torch.from_numpy(offsets))
