"""Interpolation of a volume at points: the nearest voxel, or weighted sums of eight."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from dwiml_func._checks import check_choice
from dwiml_func._transforms import is_transformed

__all__ = ["FlatVolumes", "Interpolation", "interpolate"]

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
    check_choice("interpolation", mode, _MODES)
    if volume.ndim != 4 or points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(
            "Expected a volume of shape (X, Y, Z, F) and points of shape (P, 3). "
            f"Received: {tuple(volume.shape)} and {tuple(points.shape)}"
        )
    last, strides = _grid(volume.shape, points.device)
    return _interpolate(volume.reshape(-1, volume.shape[3]), points, last[:, None], strides[:, None], mode=mode)


@dataclass(frozen=True, slots=True, eq=False)
class FlatVolumes:
    """Volumes of several subjects in one array, which are interpolated together, whichever subject a point is of.

    values: (V, F) float, the voxels of all volumes.
    last: (3, num_subjects) int64, the last index of each axis.
    strides: (3, num_subjects) int64, how many voxels the next index is away.
    starts: (num_subjects,) int64, each volume's first row in `values`.
    """

    values: Tensor
    last: Tensor
    strides: Tensor
    starts: Tensor

    @classmethod
    def of(cls, volumes: Iterable[Tensor], shapes: Sequence[Sequence[int]], device: torch.device) -> FlatVolumes:
        """Copy (X, Y, Z, F) volumes, at least one, to a device; `shapes` has the shape of each."""
        sizes = [shape[0] * shape[1] * shape[2] for shape in shapes]
        starts = [0, *itertools.accumulate(sizes)]
        values = torch.empty(starts[-1], shapes[0][3], device=device)
        for volume, start, size in zip(volumes, starts, sizes, strict=False):  # read one at a time, where they are lazy
            values[start : start + size].copy_(volume.reshape(size, -1))
        last, strides = (torch.stack(parts, dim=1) for parts in zip(*(_grid(s, device) for s in shapes), strict=True))
        return cls(values, last, strides, torch.tensor(starts[:-1], device=device))

    def read(self, points: Tensor, subject: Tensor | None, *, mode: Interpolation = "trilinear") -> Tensor:
        """Interpolate at points (P, 3), each in the volume of its `subject` (P,); None where there is one volume."""
        if subject is None:
            return _interpolate(self.values, points, self.last, self.strides, mode=mode)
        grid = (part.index_select(1, subject) for part in (self.last, self.strides))
        return _interpolate(self.values, points, *grid, mode=mode, start=self.starts.index_select(0, subject))


def _grid(shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(3,) last indices and strides of a volume. A device gets those of each shape once: copying them waits for it."""
    sizes = (shape[0], shape[1], shape[2])
    return _new_grid(sizes, device) if device.type == "cpu" or is_transformed() else _kept_grid(sizes, device)


@functools.lru_cache(maxsize=64)
def _kept_grid(sizes: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # later calls may need gradients
        return _new_grid(sizes, device)


def _new_grid(sizes: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    size_x, size_y, size_z = sizes
    last = torch.tensor([size_x, size_y, size_z], device=device) - 1
    return last, torch.tensor([size_y * size_z, size_z, 1], device=device)


def _interpolate(
    values: Tensor,
    points: Tensor,
    last: Tensor,
    strides: Tensor,
    *,
    mode: Interpolation,
    start: Tensor | None = None,
) -> Tensor:
    """Interpolate among rows of values; last and strides are (3, 1), or (3, P) where each point has its own."""
    if mode == "nearest":
        last, strides = last.t(), strides.t()
        # Clamped before it becomes an integer, for what is far away, and after, as NaN passes the first clamp.
        voxel = torch.minimum(torch.minimum(points.floor().clamp(min=0), last).long().clamp(min=0), last)
        row = (voxel * strides).sum(dim=1)
        found = values[row if start is None else row + start]
        return torch.where(points.isnan().any(dim=1, keepdim=True), torch.full_like(found, float("nan")), found)

    # Axes first: sums and products then run along the points, several times faster than along axes of 2 and 3.
    # Clamping the position gives the same values as clamping the eight indices: both neighbours become the border.
    position = torch.minimum((points.t().contiguous() - _VALUE_AT[mode]).clamp(min=0), last)
    # Clamped again as integers: NaN passes the first clamp and must not become an address.
    lower = torch.minimum(position.floor().long().clamp(min=0), last)
    upper = torch.minimum(lower + 1, last)
    fraction = position - lower

    x, y, z = (torch.stack([lower, upper]) * strides).unbind(1)  # (2, P) each
    if start is not None:
        x = x + start
    weight_x, weight_y, weight_z = torch.stack([1 - fraction, fraction]).to(values.dtype).unbind(1)
    corner_rows = x[:, None, None] + y[:, None] + z  # (2, 2, 2, P)
    corner_weights = weight_x[:, None, None] * weight_y[:, None] * weight_z
    return embedding_bag(
        corner_rows.reshape(8, -1).t().contiguous(),
        values,
        mode="sum",
        per_sample_weights=corner_weights.reshape(8, -1).t().contiguous(),
    )
