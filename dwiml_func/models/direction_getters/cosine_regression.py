"""Learn a direction by its angle to the true one."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

from dwiml_func.models.direction_getters.direction_getter import DirectionGetter
from dwiml_func.models.direction_getters.two_layer_network import TwoLayerNetwork

__all__ = ["CosineRegression"]

_LEAST_LENGTH = 1e-8  # shorter vectors count as having this length


class CosineRegression(DirectionGetter):
    """A two-layer network that gives x, y and z; its loss is 1 - cos of the angle to the true direction.

    Args:
        input_size: features at a point.
        dropout: probability of dropping a value between the layers when training, 0 <= dropout < 1.

    Raises:
        ValueError: dropout is out of range.

    Example:
        >>> import torch
        >>> getter = CosineRegression(100)
        >>> getter(torch.zeros(7, 100)).shape
        torch.Size([7, 3])
    """

    def __init__(self, input_size: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = TwoLayerNetwork(input_size, 3, dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Compute directions.

        Args:
            features: (N, input_size) float.

        Returns:
            (N, 3), voxel space, of any length.

        Example:
            >>> import torch
            >>> CosineRegression(6)(torch.zeros(2, 6)).shape
            torch.Size([2, 3])
        """
        return self.layers(features)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compare directions with the true ones.

        Args:
            outputs: (N, 3) float, of any length.
            targets: (N, 3) float, of any length.

        Returns:
            (N,), 1 - u.v / (|u| |v|), where lengths below 1e-8 count as 1e-8: 0 for equal directions, 2 for opposite
            ones, 1 where a vector has no length. A target without length has no gradient.

        Source: dwi_ml, `direction_getter_models.py`; `torch.nn.functional.cosine_similarity`.

        Example:
            >>> import torch
            >>> targets = torch.tensor([[0.0, 2, 0], [0, -5, 0], [0, 0, 0]])
            >>> CosineRegression(6).losses(torch.tensor([[0.0, 1, 0]]).expand(3, 3), targets).tolist()
            [0.0, 2.0, 1.0]
        """
        return 1 - cosine_similarity(outputs, targets, dim=-1, eps=_LEAST_LENGTH)

    def directions(self, outputs: Tensor) -> Tensor:
        """The outputs are directions.

        Args:
            outputs: (N, 3) float.

        Returns:
            (N, 3), `outputs` itself.

        Example:
            >>> import torch
            >>> CosineRegression(6).directions(torch.tensor([[0.0, 2.0, 0.0]]))
            tensor([[0., 2., 0.]])
        """
        return outputs
