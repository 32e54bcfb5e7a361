"""The fully connected network that most direction getters consist of.

Vectors of a given length, also where there is no direction to keep.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, where
from torch.nn.functional import dropout

__all__ = ["TwoLayerNetwork", "check_length", "unit_vectors"]


class TwoLayerNetwork(torch.nn.ModuleList):
    """Two linear layers, input_size to ceil(input_size / 2) to output_size; between them ReLU, then dropout.

    A list of its two layers, so that their parameters are named `0.weight` and `1.weight` as in dwi_ml.

    Args:
        input_size: features of an input row.
        output_size: features of an output row.
        dropout: probability of dropping a value between the layers when training, 0 <= dropout < 1.

    Raises:
        ValueError: dropout is out of range.

    Source: dwi_ml, `direction_getter_models.py`.

    Example:
        >>> network = TwoLayerNetwork(5, 2)
        >>> network(torch.zeros(7, 5)).shape, network[0].out_features
        (torch.Size([7, 2]), 3)
    """

    def __init__(self, input_size: int, output_size: int, dropout: float = 0.0) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"Expected a dropout of at least 0 and below 1. Received: {dropout}")
        hidden_size = math.ceil(input_size / 2)
        super().__init__([torch.nn.Linear(input_size, hidden_size), torch.nn.Linear(hidden_size, output_size)])
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Run the network on each row.

        Args:
            x: (N, input_size) float.

        Returns:
            (N, output_size), under `torch.autocast` too in the dtype of the parameters: a density of width 0.01 has no
            use for means that were rounded to 8 bits.

        Example:
            >>> TwoLayerNetwork(4, 3)(torch.zeros(2, 4)).shape
            torch.Size([2, 3])
        """
        first, last = self
        hidden = dropout(first(x).relu(), self.dropout, self.training)
        with torch.autocast(x.device.type, enabled=False):
            return last(hidden.to(cast(Tensor, last.weight).dtype))


def unit_vectors(vectors: Tensor) -> Tensor:
    """Divide vectors by their lengths.

    Args:
        vectors: (..., D) float.

    Returns:
        (..., D), of length 1; zeros where the length is 0 (or so small that its square is), where dwi_ml gets
        not-a-number. The gradient there is that of `vectors` themselves, so that it stays finite.

    Example:
        >>> import torch
        >>> unit_vectors(torch.tensor([[0.0, 3, 4], [0, 0, 0]]))
        tensor([[0.0000, 0.6000, 0.8000],
                [0.0000, 0.0000, 0.0000]])
    """
    squares = vectors.square().sum(dim=-1, keepdim=True)
    return vectors / where(squares == 0, 1.0, squares).sqrt()


def check_length(name: str, length: float | None) -> float | None:
    """Check an option that gives vectors a length.

    Args:
        name: the option's name.
        length: above 0, or None to leave lengths alone.

    Returns:
        `length`.

    Raises:
        ValueError: it is neither.

    Example:
        >>> check_length("normalize_targets", -1.0)
        Traceback (most recent call last):
        ...
        ValueError: Expected a finite normalize_targets above 0, or None for no normalisation. Received: -1.0
    """
    if length is not None and not (math.isfinite(length) and length > 0):
        raise ValueError(f"Expected a finite {name} above 0, or None for no normalisation. Received: {length}")
    return length
