"""Where lines are followed: the volume that the model reads, and the mask that lines may not leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from dwiml_func._checks import check_choice
from dwiml_func.data.interpolation import Interpolation, interpolate
from dwiml_func.data.neighborhood import Neighborhood, check_cubic_voxels, interpolate_neighborhood

__all__ = ["TrackingMask", "TrackingSpace"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrackingMask:
    """The voxels that lines may enter.

    Args:
        values: (X, Y, Z) float or bool, kept as float32; a line stays where the mask is at least 0.5.
        interpolation: how it is read between voxel centres, see `dwiml_func.data.interpolate`.

    Raises:
        ValueError: there is no such interpolation.

    Example:
        >>> mask = TrackingMask(values=torch.ones(2, 2, 2))
        >>> mask.interpolation
        'nearest'
    """

    values: Tensor
    interpolation: Interpolation = "nearest"

    def __post_init__(self) -> None:
        check_choice("mask_interp", self.interpolation, get_args(Interpolation))
        object.__setattr__(self, "values", self.values.float())  # once, not at every step


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrackingSpace:
    """A subject's volume, as a model reads it, and the mask of the lines.

    Args:
        volume: (X, Y, Z, F) float32, the model's input volume, on the model's device.
        voxel_sizes: mm along the three axes.
        mask: the voxels that lines may enter; None: all of the volume.
        interpolation: see `dwiml_func.data.interpolate`; that of the model's training.
        neighborhood: points around each point that the model also reads; that of the model's training.

    Raises:
        ValueError: a shape or a voxel size does not fit.

    Example:
        >>> space = TrackingSpace(volume=torch.zeros(4, 4, 4, 28), voxel_sizes=(2.0, 2.0, 2.0))
        >>> space.read(torch.full((5, 3), 1.5)).shape
        torch.Size([5, 28])
    """

    volume: Tensor
    voxel_sizes: tuple[float, float, float]
    mask: TrackingMask | None = None
    interpolation: Interpolation = "trilinear"
    neighborhood: Neighborhood | None = None

    def __post_init__(self) -> None:
        if self.volume.ndim != 4:
            raise ValueError(f"Expected a volume of shape (X, Y, Z, F). Received: {tuple(self.volume.shape)}.")
        if self.mask is not None and self.mask.values.shape != self.volume.shape[:3]:
            raise ValueError(
                f"Expected a tracking mask of {tuple(self.volume.shape[:3])} voxels, as the volume. "
                f"Received: {tuple(self.mask.values.shape)}."
            )
        if not all(0 < size < float("inf") for size in self.voxel_sizes):
            raise ValueError(f"Expected voxel sizes above 0 mm. Received: {self.voxel_sizes}.")
        if self.neighborhood is not None:
            check_cubic_voxels(torch.tensor([self.voxel_sizes]), ["the volume"])

    def read(self, points: Tensor) -> Tensor:
        """The model's inputs (N, F * points read) at points (N, 3), voxel space, corner origin."""
        return interpolate_neighborhood(self.volume, points, self.neighborhood, mode=self.interpolation)

    def contains(self, points: Tensor) -> Tensor:
        """Whether points (N, 3) lie in a voxel of the volume, (N,) bool; false for NaN."""
        shape = torch.tensor(self.volume.shape[:3], device=points.device)
        return ((points >= 0) & (points < shape)).all(dim=1)

    def allows(self, points: Tensor) -> Tensor:
        """Whether the mask allows points (N, 3), (N,) bool."""
        if self.mask is None:
            return torch.ones(len(points), dtype=torch.bool, device=points.device)
        return interpolate(self.mask.values[..., None], points, mode=self.mask.interpolation)[:, 0] >= 0.5
