"""What a model asks of its last layers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["DirectionGetter"]


class DirectionGetter(torch.nn.Module, ABC):
    """Turns features at points into outputs, and knows what the outputs mean: their loss, and their direction.

    The losses and the directions are functions of the outputs alone; only `forward` uses parameters. So a loss can be
    taken of outputs that came from `torch.func.functional_call`.

    Example:
        >>> from dwiml_func.models.direction_getters import CosineRegression
        >>> isinstance(CosineRegression(100), DirectionGetter)
        True
    """

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Compute the outputs.

        Args:
            features: (N, input_size) float, N points of any streamlines.

        Returns:
            (N, K); the subclass says what the columns are.
        """

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compare outputs with the true directions.

        Args:
            outputs: (N, K), from `forward`.
            targets: (N, 3) float, voxel space, the direction to the next point, not normalised.

        Returns:
            (N,), the loss at each point.
        """

    @abstractmethod
    def directions(self, outputs: Tensor) -> Tensor:
        """The most likely direction at each point.

        Args:
            outputs: (N, K), from `forward`.

        Returns:
            (N, 3), voxel space, of any length.
        """
