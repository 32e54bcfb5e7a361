"""Weighted sums of distributions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["component", "draw_components", "mixture_log_density"]


def mixture_log_density(logits: Tensor, log_densities: Tensor) -> Tensor:
    """The logarithm of a weighted sum of densities.

    Args:
        logits: (..., G) float, the logarithms of the weights, up to a constant.
        log_densities: (..., G) float, of each distribution.

    Returns:
        (...), log of the sum over g of weight g * density g, where the weights add up to 1.

    Source: dwi_ml, `formulas_fisher_gaussian.rst`.

    Example:
        >>> mixture_log_density(torch.zeros(2), torch.tensor([0.2, 0.4]).log()).exp()
        tensor(0.3000)
    """
    return (logits.log_softmax(dim=-1) + log_densities).logsumexp(dim=-1)


def draw_components(logits: Tensor) -> Tensor:
    """Draw one distribution of each mixture by the weights, with torch's generator.

    Args:
        logits: (N, G) float, the logarithms of the weights, up to a constant.

    Returns:
        (N,) int64, 0 to G - 1.

    Example:
        >>> draw_components(torch.tensor([[0.0, 1000.0]]))
        tensor([1])
    """
    return torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]


def component(values: Tensor, index: Tensor) -> Tensor:
    """Take one distribution's values of each mixture.

    Args:
        values: (N, G, D).
        index: (N,) int64, 0 to G - 1.

    Returns:
        (N, D).

    Example:
        >>> component(torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 8]]]), torch.tensor([1, 0]))
        tensor([[3, 4],
                [5, 6]])
    """
    # Not take_along_dim: torch.compile would make a graph for each N.
    rows = index[..., None, None].expand(*values.shape[:-2], 1, values.shape[-1])
    return values.gather(-2, rows)[..., 0, :]
