"""Learn a direction by its angle to the true one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dwiml_func.models.direction_getters.regression import Regression

__all__ = ["CosineRegression", "cosine_losses"]

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
