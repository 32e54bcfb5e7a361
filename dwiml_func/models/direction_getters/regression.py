"""What the getters that learn one direction have in common.

Learn a direction by its angle to the true one.

Learn a direction with its length, by the distance to the true one, alone or together with the angle.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dwiml_func.models.direction_getters._layers import TwoLayerNetwork, check_length, unit_vectors
from dwiml_func.models.direction_getters.base import DirectionGetter

__all__ = ["CosinePlusL2Regression", "CosineRegression", "L2Regression", "Regression", "cosine_losses", "l2_losses"]


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
        self.normalize_targets = check_length("normalize_targets", normalize_targets)
        self.normalize_outputs = check_length("normalize_outputs", normalize_outputs or None)
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


_LEAST_LENGTH = 1e-8  # shorter vectors count as having this length


class CosineRegression(Regression):
    """Regression with the loss `cosine_losses`: 1 - cos of the angle to the true direction.

    The arguments are those of `Regression`; `normalize_targets` changes nothing here but rounding.

    Example:
        >>> getter = CosineRegression(100)
        >>> getter(torch.zeros(7, 100)).shape
        torch.Size([7, 3])
        >>> targets = torch.tensor([[0.0, 2, 0], [0, -5, 0], [0, 0, 0]])
        >>> getter.losses(torch.tensor([[0.0, 1, 0]]).expand(3, 3), targets).tolist()
        [0.0, 2.0, 1.0]
    """

    key = "cosine-regression"

    def _compare(self, directions: Tensor, targets: Tensor) -> Tensor:
        return cosine_losses(directions, targets)


def cosine_losses(directions: Tensor, targets: Tensor) -> Tensor:
    """Compare directions by angle.

    Args:
        directions: (N, 3) float, of any length.
        targets: (N, 3) float, of any length.

    Returns:
        (N,), 1 - u.v / (|u| |v|), where lengths below 1e-8 count as 1e-8: 0 for equal directions, 2 for opposite
        ones, 1 where a vector has no length. A target without length has no gradient. At a direction that is exactly
        zero, where 1 - cos has no derivative and the formula's would be 1e8 long, the gradient is the unit vector away
        from the target; the value is the formula's.

    Source: dwi_ml, `direction_getter_models.py`; `torch.nn.functional.cosine_similarity`.

    Example:
        >>> cosine_losses(torch.tensor([[3.0, 0, 0], [0, 0, 0]]), torch.tensor([[1.0, 0, 0], [1, 0, 0]]))
        tensor([0., 1.])
    """
    is_zero = (directions == 0).all(dim=-1, keepdim=True)
    directions = torch.where(is_zero, directions * _LEAST_LENGTH, directions)
    return 1 - cosine_similarity(directions, targets, dim=-1, eps=_LEAST_LENGTH)


_SHIFT = 1e-6  # torch.nn.PairwiseDistance adds it to each component of the difference


class L2Regression(Regression):
    """Regression with the loss `l2_losses`: the distance to the true direction.

    The arguments are those of `Regression`. With `add_eos` the last points pull their outputs towards zero.

    Example:
        >>> L2Regression(6).losses(torch.tensor([[3.0, 0, 1]]), torch.tensor([[0.0, 4, 1]]))
        tensor([5.])
        >>> L2Regression.supports_compressed
        True
    """

    key = "l2-regression"
    supports_compressed = True

    def _compare(self, directions: Tensor, targets: Tensor) -> Tensor:
        return l2_losses(directions, targets)


class CosinePlusL2Regression(Regression):
    """Regression with the sum of both losses, `cosine_losses` and `l2_losses`.

    The arguments are those of `Regression`.

    Example:
        >>> CosinePlusL2Regression(6).losses(torch.tensor([[1.0, 0, 0]]), torch.tensor([[-1.0, 0, 0]]))
        tensor([4.0000])
    """

    key = "cosine-plus-l2-regression"

    def _compare(self, directions: Tensor, targets: Tensor) -> Tensor:
        return l2_losses(directions, targets) + cosine_losses(directions, targets)


def l2_losses(directions: Tensor, targets: Tensor) -> Tensor:
    """Compare directions by distance.

    Args:
        directions: (N, 3) float, voxel space.
        targets: (N, 3) float, voxel space.

    Returns:
        (N,), |u - v + (1e-6, 1e-6, 1e-6)|, voxels: the shift keeps the gradient defined where u = v, and costs 1.7e-6
        there.

    Source: dwi_ml, `direction_getter_models.py`; `torch.nn.PairwiseDistance`, whose shift this is.

    Example:
        >>> l2_losses(torch.tensor([[3.0, 0, 0]]), torch.tensor([[0.0, 4, 0]]))
        tensor([5.])
    """
    return torch.linalg.vector_norm(directions - targets + _SHIFT, dim=-1)
