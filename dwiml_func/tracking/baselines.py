"""What a model has to beat, through the same tracker: the principal direction of diffusion, and keeping straight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.models.baselines import principal_direction
from dwiml_func.models.direction_getters import CosineRegression, DirectionGetter

__all__ = ["KeepStraight", "PrincipalDirection"]


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
