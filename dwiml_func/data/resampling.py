"""How densely streamlines are sampled: by a step, by a number of points, or compressed; on flat arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from dwiml_func.data.creation_resampling import StepRule, compress, lengths_mm, resample, steps_for
from dwiml_func.data.streamlines import Streamlines

__all__ = ["Resampling", "resample_streamlines"]


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
