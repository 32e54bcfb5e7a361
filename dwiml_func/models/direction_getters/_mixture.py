"""Mixtures: weighted sums of distributions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["component", "mixture_log_density", "sample_classes"]


def mixture_log_density(logits: Tensor, log_densities: Tensor) -> Tensor:
    """The log density (...) of mixtures, from the logits of their weights and their log densities, both (..., G).

    Source: dwi_ml, `formulas_fisher_gaussian.rst`.
    """
    return (logits.log_softmax(dim=-1) + log_densities).logsumexp(dim=-1)


def sample_classes(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Turn uniform random numbers (N,) into classes (N,) int64 with the probabilities of logits (N, G)."""
    distribution = logits.softmax(dim=-1).cumsum(dim=-1)
    # Never beyond the last class that has a probability, though rounding may leave the sum below 1.
    target = uniforms.to(logits.dtype).clamp(max=1 - torch.finfo(logits.dtype).eps)[:, None] * distribution[:, -1:]
    return (distribution <= target).sum(dim=-1).clamp(max=logits.shape[-1] - 1)


def component(values: Tensor, index: Tensor) -> Tensor:
    """Take the values (N, D) of one distribution of each mixture from those of all (N, G, D)."""
    # Not take_along_dim: torch.compile would make a graph for each N.
    rows = index[..., None, None].expand(*values.shape[:-2], 1, values.shape[-1])
    return values.gather(-2, rows)[..., 0, :]
