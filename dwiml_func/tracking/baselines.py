"""Who tracks beside a model, through the same tracker.

What a model has to beat: the principal direction of diffusion, and keeping straight. And an oracle that knows the real
streamlines: what is lost by it is lost by the tracker, not by a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.streamlines import Streamlines, directions, input_rows
from dwiml_func.models.baselines import principal_direction
from dwiml_func.models.direction_getters import CosineRegression, DirectionGetter
from dwiml_func.tracking.space import TrackingSpace

__all__ = ["KeepStraight", "NearestDirection", "PrincipalDirection", "position_space"]


class KeepStraight:
    """Continues as the line came; a line that has only a seed ends there.

    Example:
        >>> KeepStraight().run_step(torch.zeros(1, 28), torch.tensor([[0.0, 0, 1]]))[0].tolist()
        [[0.0, 0.0, 1.0]]
    """

    nb_previous_dirs = 1

    def __init__(self) -> None:
        self.direction_getter: DirectionGetter = CosineRegression(1)  # its outputs are directions

    def run_step(self, inputs: Tensor, dirs: Tensor, state: Any = None, /) -> tuple[Tensor, Any]:
        """The previous directions."""
        return dirs[:, :3], ()


class PrincipalDirection:
    """Follows the diffusion tensor's principal direction, on the side of the previous one; see `principal_direction`.

    Args:
        input_attributes: of the volume, with `sh_order`.

    Example:
        >>> PrincipalDirection({"sh_order": 6}).nb_previous_dirs
        1
    """

    nb_previous_dirs = 1

    def __init__(self, input_attributes: Mapping[str, Any]) -> None:
        self.direction_getter: DirectionGetter = CosineRegression(1)
        self._attributes = dict(input_attributes)

    def run_step(self, inputs: Tensor, dirs: Tensor, state: Any = None, /) -> tuple[Tensor, Any]:
        """The principal directions; at a seed either side."""
        num, previous = len(inputs), dirs[:, :3]
        none = torch.zeros(num, dtype=torch.int64, device=inputs.device)
        # Lines of three points each, of which the middle one is asked for.
        batch = StreamlineBatch(
            points=torch.stack([-previous, torch.zeros_like(previous), previous], dim=1).reshape(-1, 3),
            offsets=3 * torch.arange(num + 1, device=inputs.device),
            subject=none,
            ids=none,
            inputs=inputs.repeat_interleave(2, dim=0),
        )
        found = principal_direction(batch, self._attributes)
        if found is None:
            raise ValueError("Expected input attributes with sh_order. Received: none.")
        return found[0][1::2], ()


class NearestDirection:
    """Follows the direction of the nearest segment of real streamlines, on the side of the previous one: an oracle.

    It reads positions in place of a volume, see `position_space`, and runs on the CPU.

    Args:
        lines: real streamlines, voxel space, corner origin.
        voxel_sizes: mm along the three axes.

    Raises:
        ValueError: no streamline has two points.

    Example:
        >>> oracle = NearestDirection(Streamlines.from_list([[[0, 0, 0], [2, 0, 0]]]), (1.0, 1.0, 1.0))
        >>> oracle.run_step(torch.tensor([[1.0, 3, 0]]), torch.tensor([[-1.0, 1, 0]]))[0].tolist()
        [[-2.0, -0.0, -0.0]]
    """

    nb_previous_dirs = 1

    def __init__(self, lines: Streamlines, voxel_sizes: tuple[float, float, float]) -> None:
        from scipy.spatial import KDTree

        self.direction_getter: DirectionGetter = CosineRegression(1)  # its outputs are directions
        self._sizes = torch.tensor(voxel_sizes)
        points = lines.points * self._sizes
        self._directions = directions(points, lines.offsets)
        if len(self._directions) == 0:
            raise ValueError("Expected streamlines of two points or more. Received: none.")
        starts = points[input_rows(lines.offsets, len(points))]
        self._middles = KDTree((starts + self._directions / 2).numpy())

    def run_step(self, inputs: Tensor, dirs: Tensor, state: Any = None, /) -> tuple[Tensor, Any]:
        """Directions (S, 3) in mm along the voxel axes, at positions (S, 3); at a seed either side."""
        nearest = torch.from_numpy(self._middles.query((inputs * self._sizes).numpy())[1])
        found = self._directions[nearest]
        is_behind = (found * dirs[:, :3]).sum(dim=1, keepdim=True) < 0
        return torch.where(is_behind, -found, found), ()


def position_space(space: TrackingSpace) -> TrackingSpace:
    """The same space, in whose volume a model reads where it is: (X, Y, Z, 3), voxel space, corner origin.

    Within half a voxel of the volume's border it reads the nearest centre of a voxel.

    Args:
        space: where to track.

    Returns:
        The space, with the same mask.

    Example:
        >>> space = TrackingSpace(volume=torch.zeros(4, 4, 4, 28), voxel_sizes=(2.0, 2.0, 2.0))
        >>> position_space(space).read(torch.tensor([[1.0, 2.25, 3]])).tolist()
        [[1.0, 2.25, 3.0]]
    """
    axes = [torch.arange(size) + 0.5 for size in space.volume.shape[:3]]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return replace(space, volume=positions, interpolation="trilinear", neighborhood=None)
