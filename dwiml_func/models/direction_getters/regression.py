"""Direction getters that predict one direction, with a loss on its angle, its distance to the true one, or both."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dwiml_func.models.direction_getters.base import DirectionGetter, TwoLayerNetwork, check_length, with_length

__all__ = ["CosinePlusL2Regression", "CosineRegression", "L2Regression", "Regression", "cosine_losses", "l2_losses"]

_LEAST_LENGTH = 1e-8  # shorter vectors count as having this length
_SHIFT = 1e-6  # torch.nn.PairwiseDistance adds it to each component of the difference


class Regression(DirectionGetter):
    """A two-layer network to x, y, z and, with `add_eos`, the logit of EOS; subclasses define the loss.

    Args:
        input_size, dropout, add_eos, eos_weight: as in `DirectionGetter`.
        normalize_targets: length given to the true directions in the loss; None leaves them alone.
        normalize_outputs: length given to the outputs in `forward`; None (or 0) leaves them alone. With `add_eos` it is
            the length of all four columns together, as in dwi_ml: the direction is shorter, and the logit of EOS lies
            between -normalize_outputs and normalize_outputs.

    Raises:
        ValueError: an argument is out of range.

    Source: dwi_ml, `direction_getter_models.py`.

    Example:
        >>> Regression.option_names
        ('normalize_targets', 'normalize_outputs')
    """

    is_probabilistic = False

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
        """Compute directions (N, 3), along the voxel axes, from features; with `add_eos` (N, 4)."""
        return with_length(self.layers(features), self.normalize_outputs)

    def directions(self, outputs: Tensor) -> Tensor:
        """The first three columns of the outputs: directions (N, 3) of any length."""
        return outputs[..., :3]

    def _direction_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = with_length(targets, self.normalize_targets)
        return self._compare(outputs[..., :3], targets)

    def _compare(self, directions: Tensor, targets: Tensor) -> Tensor:
        """The losses (N,) of directions (N, 3)."""
        raise NotImplementedError


class CosineRegression(Regression):
    """Regression with the loss 1 - cos of the angle to the true direction (`cosine_losses`).

    Args:
        input_size, dropout, add_eos, eos_weight, normalize_targets, normalize_outputs: as in `Regression`;
            `normalize_targets` changes only the rounding.

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
    """1 - cos of the angle between directions (N, 3) and targets (N, 3), each of any length.

    Lengths below 1e-8 count as 1e-8, so a vector without length costs 1. A target without length has no gradient. At a
    direction that is exactly zero, 1 - cos has no derivative and the formula's would be 1e8 long; the gradient there is
    the unit vector away from the target.

    Source: dwi_ml, `direction_getter_models.py`; `torch.nn.functional.cosine_similarity`.
    """
    is_zero = (directions == 0).all(dim=-1, keepdim=True)
    directions = torch.where(is_zero, directions * _LEAST_LENGTH, directions)
    return 1 - cosine_similarity(directions, targets, dim=-1, eps=_LEAST_LENGTH)


class L2Regression(Regression):
    """Regression with the distance to the true direction as loss (`l2_losses`).

    With `add_eos` the loss pulls the outputs at last points towards zero.

    Args:
        input_size, dropout, add_eos, eos_weight, normalize_targets, normalize_outputs: as in `Regression`.

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
    """Regression with the sum of `cosine_losses` and `l2_losses` as loss.

    Args:
        input_size, dropout, add_eos, eos_weight, normalize_targets, normalize_outputs: as in `Regression`.

    Example:
        >>> CosinePlusL2Regression(6).losses(torch.tensor([[1.0, 0, 0]]), torch.tensor([[-1.0, 0, 0]]))
        tensor([4.0000])
    """

    key = "cosine-plus-l2-regression"

    def _compare(self, directions: Tensor, targets: Tensor) -> Tensor:
        return l2_losses(directions, targets) + cosine_losses(directions, targets)


def l2_losses(directions: Tensor, targets: Tensor) -> Tensor:
    """|u - v + (1e-6, 1e-6, 1e-6)| of directions u (N, 3) and targets v (N, 3), in voxels.

    The shift keeps the gradient defined where u = v, and costs 1.7e-6 there.

    Source: dwi_ml, `direction_getter_models.py`; `torch.nn.PairwiseDistance`, whose shift this is.
    """
    return torch.linalg.vector_norm(directions - targets + _SHIFT, dim=-1)
