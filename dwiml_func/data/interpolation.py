"""Interpolation of a volume at points: the nearest voxel, or weighted sums of eight."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

__all__ = ["Interpolation", "interpolate"]

Interpolation = Literal["nearest", "trilinear", "trilinear-corner"]
"""A mode of `interpolate`, by name."""

_MODES = get_args(Interpolation)
_VALUE_AT = {"trilinear": 0.5, "trilinear-corner": 0.0}  # where in its voxel a voxel's value holds, on each axis


def interpolate(volume: Tensor, points: Tensor, *, mode: Interpolation = "trilinear") -> Tensor:
    """Interpolate a volume at points.

    Voxel i covers [i, i + 1) on each axis. With `"trilinear"` its value holds at the centre, i + 0.5. With
    `"trilinear-corner"` it holds at the lower corner, i: half a voxel off, and what models imported from dwi_ml
    were trained with (its `torch_trilinear_interpolation`). `"nearest"` gives the value of the voxel that covers the
    point. Outside the volume, and beyond the outermost values, all of them give the border's value. It is computed on
    the device of the volume and the points.

    Args:
        volume: (X, Y, Z, F) float, features last; contiguous, or it is copied first.
        points: (P, 3) float, voxel space, corner origin. Finite: a NaN coordinate gives NaN features.
        mode: `"nearest"`, `"trilinear"` or `"trilinear-corner"`.

    Returns:
        (P, F), in the volume's dtype.

    Raises:
        ValueError: the mode or a shape is not one of those above.

    Example:
        >>> volume = torch.tensor([10.0, 20.0]).reshape(2, 1, 1, 1)
        >>> points = torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.5, 0.5]])
        >>> interpolate(volume, points).tolist()
        [[10.0], [15.0]]
        >>> interpolate(volume, points, mode="trilinear-corner").tolist()
        [[15.0], [20.0]]
    """
    if mode not in _MODES:
        raise ValueError(f"Expected an interpolation among {', '.join(_MODES)}. Received: {mode!r}")
    if volume.ndim != 4 or points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(
            "Expected a volume of shape (X, Y, Z, F) and points of shape (P, 3). "
            f"Received: {tuple(volume.shape)} and {tuple(points.shape)}"
        )
    size_x, size_y, size_z, num_features = volume.shape
    last = torch.tensor([size_x, size_y, size_z], device=points.device) - 1
    strides = torch.tensor([size_y * size_z, size_z, 1], device=points.device)
    values = volume.reshape(-1, num_features)
    if mode == "nearest":
        # Clamped before it becomes an integer, for what is far away, and after, as NaN passes the first clamp.
        voxel = torch.minimum(torch.minimum(points.floor().clamp(min=0), last).long().clamp(min=0), last)
        found = values[(voxel * strides).sum(dim=1)]
        return torch.where(points.isnan().any(dim=1, keepdim=True), torch.full_like(found, float("nan")), found)

    # Axes first: sums and products then run along the points, several times faster than along axes of 2 and 3.
    last, strides = last[:, None], strides[:, None]
    # Clamping the position gives the same values as clamping the eight indices: both neighbours become the border.
    position = torch.minimum((points.t().contiguous() - _VALUE_AT[mode]).clamp(min=0), last)
    # Clamped again as integers: NaN passes the first clamp and must not become an address.
    lower = torch.minimum(position.floor().long().clamp(min=0), last)
    upper = torch.minimum(lower + 1, last)
    fraction = position - lower

    x, y, z = (torch.stack([lower, upper]) * strides).unbind(1)  # (2, P) each
    weight_x, weight_y, weight_z = torch.stack([1 - fraction, fraction]).to(volume.dtype).unbind(1)
    corner_rows = x[:, None, None] + y[:, None] + z  # (2, 2, 2, P)
    corner_weights = weight_x[:, None, None] * weight_y[:, None] * weight_z
    return embedding_bag(
        corner_rows.reshape(8, -1).t().contiguous(),
        values,
        mode="sum",
        per_sample_weights=corner_weights.reshape(8, -1).t().contiguous(),
    )
