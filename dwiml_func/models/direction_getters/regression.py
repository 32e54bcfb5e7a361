"""What the getters that learn one direction have in common."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from dwiml_func.models.direction_getters.direction_getter import DirectionGetter
from dwiml_func.models.direction_getters.two_layer_network import TwoLayerNetwork
from dwiml_func.models.direction_getters.unit_vectors import checked_length, unit_vectors

__all__ = ["Regression"]


class Regression(DirectionGetter):
    """A two-layer network that gives x, y and z and, with `add_eos`, the logit of EOS; a subclass has the loss.

    Args:
        input_size: features at a point.
        dropout: probability of dropping a value between the layers when training, 0 <= dropout < 1.
        add_eos: learn where streamlines end.
        eos_weight: weight of the EOS loss beside that of the direction.
        normalize_targets: length that the true directions get before they are compared; None leaves them alone.
        normalize_outputs: length that the outputs get in `forward`; None (or 0) leaves them alone. With `add_eos` it is
            the length of all four columns together, so that the direction is shorter, and the logit of EOS lies between
            -normalize_outputs and normalize_outputs. That is dwi_ml's way, which a model from there was trained in.

    Raises:
        ValueError: an argument is out of range.

    Source: dwi_ml, `direction_getter_models.py`.

    Example:
        >>> Regression.option_names
        ('normalize_targets', 'normalize_outputs')
    """

    is_probabilistic = False
    option_defaults: ClassVar = MappingProxyType({"normalize_targets": None, "normalize_outputs": None})

    def __init__(
        self,
        input_size: int,
        *,
        dropout: float = 0.0,
        add_eos: bool = False,
        eos_weight: float = 1.0,
        normalize_targets: float | None = None,
        normalize_outputs: float | None = None,
    ) -> None:
        super().__init__(input_size, add_eos=add_eos, eos_weight=eos_weight)
        self.normalize_targets = checked_length("normalize_targets", normalize_targets)
        self.normalize_outputs = checked_length("normalize_outputs", normalize_outputs or None)
        self.output_size = 4 if add_eos else 3
        self.layers = TwoLayerNetwork(input_size, self.output_size, dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Compute directions.

        Args:
            features: (N, input_size) float.

        Returns:
            (N, 3), voxel space, of any length, or of `normalize_outputs`; with `add_eos` (N, 4).

        Example:
            >>> import torch
            >>> from dwiml_func.models.direction_getters import L2Regression
            >>> getter = L2Regression(6, normalize_outputs=2)
            >>> torch.round(getter(torch.ones(1, 6)).norm(), decimals=3)
            tensor(2., grad_fn=<RoundBackward1>)
        """
        outputs = self.layers(features)
        return outputs if self.normalize_outputs is None else unit_vectors(outputs) * self.normalize_outputs

    def directions(self, outputs: Tensor) -> Tensor:
        """The outputs are directions.

        Args:
            outputs: (N, 3) or, with `add_eos`, (N, 4) float.

        Returns:
            (N, 3), the first three columns.

        Example:
            >>> import torch
            >>> from dwiml_func.models.direction_getters import CosineRegression
            >>> CosineRegression(6).directions(torch.tensor([[0.0, 2.0, 0.0]]))
            tensor([[0., 2., 0.]])
        """
        return outputs[..., :3]

    def _direction_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.normalize_targets is not None:
            targets = unit_vectors(targets) * self.normalize_targets
        return self._compare(outputs[..., :3], targets)

    def _compare(self, directions: Tensor, targets: Tensor) -> Tensor:
        """(N,) from two (N, 3)."""
        raise NotImplementedError
