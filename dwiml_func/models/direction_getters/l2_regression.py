"""Learn a direction with its length, by the distance to the true one, alone or together with the angle."""

from __future__ import annotations

import torch
from torch import Tensor

from dwiml_func.models.direction_getters.cosine_regression import cosine_losses
from dwiml_func.models.direction_getters.regression import Regression

__all__ = ["CosinePlusL2Regression", "L2Regression", "l2_losses"]

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
