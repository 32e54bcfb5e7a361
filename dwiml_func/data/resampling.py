"""How densely streamlines are sampled: by a step, by a number of points, or compressed; on flat arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dwiml_func._checks import check_choice, truncated_repr
from dwiml_func.data.streamlines import Streamlines

__all__ = [
    "Resampling",
    "StepRule",
    "lengths_mm",
    "resample",
    "resample_others",
    "resample_points",
    "resample_streamlines",
    "steps_for",
    "travelled_mm",
]

_MOST_POINTS = 1_000_000  # of a resampled streamline

StepRule = Literal["nearest", "dwi_ml"]
"""A way of counting steps, by name, see `steps_for`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampling:
    """A way of sampling streamlines: at most one of the three; none leaves them as they are.

    Args:
        step_size: mm between points, above 0; each streamline is cut evenly, into steps of about this size.
        nb_points: points of each streamline, at least 2.
        compress: largest distance in mm, above 0, by which the curve may move when points are removed.
        step_rule: how steps are counted: "nearest" to the size, or longer ones as "dwi_ml" makes them. Two ways of
            sampling that differ in it alone are equal: streamlines that have the step size are not sampled again.

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
        check_choice("step_rule", self.step_rule, get_args(StepRule))
        if self.nb_points is not None and not (self.nb_points <= _MOST_POINTS and float(self.nb_points).is_integer()):
            number = truncated_repr(self.nb_points)
            raise ValueError(f"nb_points: expected a whole number of at most {_MOST_POINTS}. Received: {number}")
        for name, value in given.items():
            least = 2 if name == "nb_points" else 0
            if not (math.isfinite(value) and value >= least and value > 0):
                bound = "at least 2" if name == "nb_points" else "above 0 mm"
                raise ValueError(f"{name}: expected a number {bound}. Received: {value}")


def resample_streamlines(lines: Streamlines, voxel_sizes: Tensor, resampling: Resampling) -> Streamlines:
    """Resample streamlines, in mm. Their first and last points stay bitwise identical.

    `lines` are in voxel space, `voxel_sizes` (S, 3) in mm has one row a streamline. New points lie on the segments
    between the old ones; compression keeps some of the old points. Without an option, `lines` itself is returned.
    """
    if resampling == Resampling() or len(lines) == 0:
        return lines
    offsets, sizes = lines.offsets.numpy(), voxel_sizes.numpy().astype(np.float64)
    points = lines.points.numpy() * np.repeat(sizes, np.diff(offsets), axis=0)
    points, offsets = resample_points(points, offsets, resampling)
    # In float64 a factor and its inverse leave every float32 unchanged.
    points = points / np.repeat(sizes, np.diff(offsets), axis=0)
    return Streamlines(torch.from_numpy(points.astype(np.float32)), torch.from_numpy(offsets))


def resample_others(lines: Streamlines, voxel_sizes: Tensor, resampling: Resampling) -> Streamlines:
    """Resample the streamlines that do not have `nb_points` points; the others stay bitwise identical."""
    num = resampling.nb_points
    differs = lines.lengths != num
    if num is None or not differs.any():
        return lines
    points = torch.empty(len(lines), num, 3)
    for which, kept in ((~differs, Resampling()), (differs, resampling)):
        numbers = which.nonzero()[:, 0]
        sampled = resample_streamlines(lines.select(numbers), voxel_sizes[numbers], kept)
        points[numbers] = sampled.points.reshape(-1, num, 3)
    return Streamlines(points.flatten(0, 1), torch.arange(len(lines) + 1) * num)


def resample_points(
    points: NDArray[np.float64], offsets: NDArray[np.int64], resampling: Resampling
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Resample (P, 3) points in mm of one streamline or more, by any of the options; returns points and offsets."""
    if resampling.compress is not None:
        from dipy.tracking.streamlinespeed import compress_streamlines  # dipy is heavy: only where it is asked for

        kept = list(compress_streamlines(np.split(points, offsets[1:-1]), tol_error=resampling.compress))
        return np.concatenate(kept), np.cumsum([0, *map(len, kept)])
    if resampling.step_size is not None:
        num_steps = steps_for(lengths_mm(points, offsets), resampling.step_size, resampling.step_rule)
    elif resampling.nb_points is not None:
        num_steps = np.full(len(offsets) - 1, resampling.nb_points - 1)
    else:
        return points, offsets
    return resample(points, offsets, num_steps)


def lengths_mm(points: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """(S,) lengths in mm of streamlines of one point or more: sums of the distances between their points."""
    travelled = travelled_mm(points, offsets)
    return travelled[offsets[1:] - 1] - travelled[offsets[:-1]]


def steps_for(lengths: NDArray[np.float64], step_size: float, rule: StepRule = "nearest") -> NDArray[np.int64]:
    """(S,) numbers of steps, at least 1, into which lengths in mm divide evenly; the points are one more.

    "nearest": as many as make a step come closest to the size. "dwi_ml": the number of *points* is the quotient,
    rounded up, as in scilpy's `resample_streamlines_step_size`; the steps are fewer and longer than asked for.
    """
    if lengths.max(initial=0) > step_size * _MOST_POINTS:
        longest = f"a streamline of {lengths.max():g} mm would have more than {_MOST_POINTS} points"
        raise ValueError(f"step_size: {longest}. Received: {step_size} mm. Give a larger step size")
    num_steps = np.rint(lengths / step_size) if rule == "nearest" else np.ceil(lengths / step_size) - 1
    return np.maximum(1, num_steps).astype(np.int64)


def resample(
    points: NDArray[np.float64], offsets: NDArray[np.int64], num_steps: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Place points at even distances along streamlines of two points or more, by linear interpolation.

    `num_steps` (S,) is the number of steps of each new streamline. End points stay bitwise identical.
    """
    new_offsets = np.concatenate([[0], np.cumsum(num_steps + 1)])
    streamline = np.repeat(np.arange(len(num_steps)), num_steps + 1)
    position = np.arange(new_offsets[-1]) - new_offsets[streamline]
    travelled = travelled_mm(points, offsets)
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


def travelled_mm(points: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """(P,) distance along all streamlines to each point; the jump from one streamline to the next counts nothing."""
    steps = np.sqrt((np.diff(points, axis=0, prepend=points[:1]) ** 2).sum(axis=1))
    steps[offsets[:-1]] = 0.0
    return np.cumsum(steps)
