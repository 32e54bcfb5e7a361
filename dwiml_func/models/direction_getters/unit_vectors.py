"""Vectors of a given length, also where there is no direction to keep."""

from __future__ import annotations

import math

from torch import Tensor, where

__all__ = ["checked_length", "unit_vectors"]


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


def checked_length(name: str, length: float | None) -> float | None:
    """Check an option that gives vectors a length.

    Args:
        name: the option's name.
        length: above 0, or None to leave lengths alone.

    Returns:
        `length`.

    Raises:
        ValueError: it is neither.

    Example:
        >>> checked_length("normalize_targets", -1.0)
        Traceback (most recent call last):
        ...
        ValueError: Expected a finite normalize_targets above 0, or None for no normalisation. Received: -1.0
    """
    if length is not None and not (math.isfinite(length) and length > 0):
        raise ValueError(f"Expected a finite {name} above 0, or None for no normalisation. Received: {length}")
    return length
