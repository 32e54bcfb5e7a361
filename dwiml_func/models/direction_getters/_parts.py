"""Parts that several direction getters use: the two-layer network, vectors of a given length, and mixtures."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, where
from torch.nn.functional import dropout

from dwiml_func._checks import check_number

__all__ = [
    "TwoLayerNetwork",
    "check_length",
    "component",
    "mixture_log_density",
    "sample_classes",
    "unit_vectors",
    "with_length",
]


class TwoLayerNetwork(torch.nn.ModuleList):
    """Two linear layers, input_size to ceil(input_size / 2) to output_size; between them ReLU, then dropout.

    It is a list of its two layers, so that their parameters are named `0.weight` and `1.weight` as in dwi_ml.

    Source: dwi_ml, `direction_getter_models.py`.
    """

    def __init__(self, input_size: int, output_size: int, dropout: float = 0.0) -> None:
        check_number("dropout", dropout, at_least=0, below=1)
        hidden_size = math.ceil(input_size / 2)
        super().__init__([torch.nn.Linear(input_size, hidden_size), torch.nn.Linear(hidden_size, output_size)])
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map rows (N, input_size) to (N, output_size), also under `torch.autocast` in the dtype of the parameters.

        Eight bits of a mean are too few for a density of width 0.01.
        """
        first, last = self
        hidden = dropout(first(x).relu(), self.dropout, self.training)
        with torch.autocast(x.device.type, enabled=False):
            return last(hidden.to(cast(Tensor, last.weight).dtype))


def unit_vectors(vectors: Tensor) -> Tensor:
    """Divide vectors (..., D) by their lengths; vectors without length stay zero, where dwi_ml gets NaN.

    The gradient at a vector without length is that of the vector itself, so that it stays finite.
    """
    squares = vectors.square().sum(dim=-1, keepdim=True)
    return vectors / where(squares == 0, 1.0, squares).sqrt()


def with_length(vectors: Tensor, length: float | None) -> Tensor:
    """Give vectors (..., D) a length; None leaves them alone."""
    return vectors if length is None else unit_vectors(vectors) * length


def check_length(name: str, length: float | None) -> float | None:
    """Return a length for `with_length`, if it is valid."""
    if length is not None:
        check_number(name, length, above=0)
    return length


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
