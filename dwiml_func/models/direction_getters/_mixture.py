"""Mixtures: weighted sums of distributions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["component", "mixture_log_density", "sample_components"]


def mixture_log_density(logits: Tensor, log_densities: Tensor) -> Tensor:
    """The log density (...) of mixtures, from the logits of their weights and their log densities, both (..., G).

    Source: dwi_ml, `formulas_fisher_gaussian.rst`.
    """
    return (logits.log_softmax(dim=-1) + log_densities).logsumexp(dim=-1)


def sample_components(logits: Tensor) -> Tensor:
    """Sample one distribution of each mixture by the weights' logits (N, G), with torch's generator: (N,) int64."""
    return torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]


def component(values: Tensor, index: Tensor) -> Tensor:
    """Take the values (N, D) of one distribution of each mixture from those of all (N, G, D)."""
    # Not take_along_dim: torch.compile would make a graph for each N.
    rows = index[..., None, None].expand(*values.shape[:-2], 1, values.shape[-1])
    return values.gather(-2, rows)[..., 0, :]
