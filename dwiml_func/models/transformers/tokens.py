"""What transformers read besides the input: positions, and the previous direction as a token.

Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.5; dwi_ml, `positional_encoding.py` and
`embeddings_on_tensors.py` (which tokens).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dwiml_func._checks import truncated_repr
from dwiml_func.models.direction_getters.sphere_classification import nearest_vertices, sphere_vertices

__all__ = ["SOS_AS_LABEL", "TargetTokens", "sinusoidal_encoding"]

SOS_AS_LABEL = "as_label"
"""A token of four numbers."""


def sinusoidal_encoding(positions: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sines (even columns) and cosines (odd ones) of positions (...,) in `size` columns; `size` is even."""
    pairs = torch.arange(0, size, 2, device=positions.device, dtype=dtype)
    angles = positions[..., None] * torch.exp(pairs * (-math.log(10000.0) / size))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class TargetTokens(torch.nn.Module):
    """The previous direction at each point as a token; at the first point of a streamline SOS, start of sequence.

    With "as_label" a token is the direction and a fourth number, which is 1 for SOS. With the name of a sphere it is
    the class of the vertex closest to the direction, and SOS is a class after the last.
    """

    def __init__(self, sos_token_type: str) -> None:
        super().__init__()
        self._vertices = None  # or a constant: not in the state, as in dwi_ml
        if sos_token_type != SOS_AS_LABEL:
            try:
                self._vertices = sphere_vertices(sos_token_type)
            except ValueError:
                raise ValueError(
                    f"sos_token_type: expected as_label or a sphere of dipy such as repulsion724, received "
                    f"{truncated_repr(sos_token_type)}."
                ) from None
        self.output_size = 4 if self._vertices is None else len(self._vertices) + 1

    def forward(self, previous: Tensor, is_first: Tensor) -> Tensor:
        """Tokens (N, output_size) from previous directions (N, 3), any where `is_first` (N,) bool is true."""
        if self._vertices is None:
            return torch.cat([previous.masked_fill(is_first[:, None], 0), is_first[:, None].to(previous.dtype)], dim=1)
        with torch.autocast(previous.device.type, enabled=False):
            nearest = nearest_vertices(previous, self._vertices)
        classes = nearest.masked_fill(is_first, len(self._vertices))
        return one_hot(classes, self.output_size).to(previous.dtype)
