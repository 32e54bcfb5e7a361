"""Neighbourhoods: the inputs at a point are the volume at the point itself and at points around it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dwiml_func._checks import check_choice
from dwiml_func.data.interpolation import Interpolation, interpolate

__all__ = [
    "Neighborhood",
    "NeighborhoodType",
    "check_cubic_voxels",
    "direction_units",
    "interpolate_neighborhood",
    "neighborhood_vectors",
]

_CUBIC = 1.001  # how much longer one side of a cube may be than another

NeighborhoodType = Literal["axes", "grid"]
"""A kind of neighbourhood, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighborhood:
    """Where around a point the volume is read too.

    Args:
        type: "axes": on the three axes, in both directions. "grid": on a cube of points.
        radius: how many steps away from the point, at least 1.
        resolution: length of a step in voxels, above 0.

    Raises:
        ValueError: an argument is not one of those above.

    Example:
        >>> Neighborhood(type="axes", radius=2).num_points, Neighborhood(type="grid", radius=1).num_points
        (13, 27)
    """

    type: NeighborhoodType
    radius: int = 1
    resolution: float = 1.0

    def __post_init__(self) -> None:
        check_choice("neighborhood_type", self.type, get_args(NeighborhoodType))
        if self.radius < 1:
            raise ValueError(f"Expected a neighborhood_radius of at least 1. Received: {self.radius}")
        if not (math.isfinite(self.resolution) and self.resolution > 0):
            raise ValueError(f"Expected a neighborhood_resolution above 0 voxels. Received: {self.resolution}")

    @property
    def num_points(self) -> int:
        """How many points are read for one, itself included: the factor of the number of features."""
        return 1 + 6 * self.radius if self.type == "axes" else (2 * self.radius + 1) ** 3


def neighborhood_vectors(neighborhood: Neighborhood) -> Tensor:
    """(N, 3) float32 vectors in voxels from a point to the points that are read for it, the point itself first.

    The order is dwi_ml's (`prepare_neighborhood_vectors`), which its models depend on: for "axes", from the nearest to
    the farthest, +x, +y, +z, -x, -y, -z; for "grid" by x, then y, then z, from low to high.
    """
    if neighborhood.type == "axes":
        axes = torch.cat([torch.eye(3, dtype=torch.float64), -torch.eye(3, dtype=torch.float64)])
        steps = torch.cat([axes * radius for radius in range(1, neighborhood.radius + 1)])
    else:
        along = range(-neighborhood.radius, neighborhood.radius + 1)
        others = [step for step in itertools.product(along, repeat=3) if step != (0, 0, 0)]
        steps = torch.tensor(others, dtype=torch.float64)
    # Scaled in float64 and rounded once; adding 0 turns -0 into 0.
    return torch.cat([torch.zeros(1, 3), (steps * neighborhood.resolution).float() + 0.0])


def interpolate_neighborhood(
    volume: Tensor, points: Tensor, neighborhood: Neighborhood | None, *, mode: Interpolation = "trilinear"
) -> Tensor:
    """Interpolate a volume at points and around them.

    Args:
        volume: (X, Y, Z, F) float, features last.
        points: (P, 3) float, voxel space, corner origin. Neighbours outside the volume get the border's value.
        neighborhood: where around each point; None for the point alone.
        mode: see `dwiml_func.data.interpolation.interpolate`.

    Returns:
        (P, N * F), in the volume's dtype: the F features at the point, then those of each neighbour in turn.

    Example:
        >>> volume = torch.arange(3.0).reshape(3, 1, 1, 1)
        >>> interpolate_neighborhood(volume, torch.tensor([[1.5, 0.5, 0.5]]), Neighborhood(type="axes")).tolist()
        [[1.0, 2.0, 1.0, 1.0, 0.0, 1.0, 1.0]]
    """
    if neighborhood is None:
        return interpolate(volume, points, mode=mode)
    vectors = neighborhood_vectors(neighborhood).to(points)
    around = (points[:, None, :] + vectors).reshape(-1, 3)
    num_features = volume.shape[-1] * neighborhood.num_points
    return interpolate(volume, around, mode=mode).reshape(len(points), num_features)


def direction_units(voxel_sizes: Tensor) -> Tensor:
    """What turns steps in voxels into the units of directions, (..., 3): 1 where voxels are cubes, else mm.

    Angles and lengths are those of space in both. Cubes keep their voxels, as in dwi_ml.
    """
    is_cubic = voxel_sizes.amax(dim=-1, keepdim=True) <= _CUBIC * voxel_sizes.amin(dim=-1, keepdim=True)
    return torch.where(is_cubic, torch.ones_like(voxel_sizes), voxel_sizes)


def check_cubic_voxels(voxel_sizes: Tensor, subjects: Sequence[str]) -> None:
    """Check that voxels are cubes within a thousandth: a neighbourhood's steps are counted in voxels.

    Source: dwi_ml, `neighborhood.py`, which asks for this and does not check it.
    """
    for subject, sizes in zip(subjects, voxel_sizes.tolist(), strict=True):
        if max(sizes) > _CUBIC * min(sizes):
            text = " x ".join(f"{size:.4g}" for size in sizes)
            raise ValueError(
                f"A neighbourhood counts its steps in voxels, so it needs cubic voxels. Received: {text} mm "
                f"({subject}). Resample the volume to cubic voxels, or leave the neighbourhood out"
            )
