"""By how much two tensors of the same shape and dtype differ, down to the last bit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dwiml_func.digest import tensor_bytes

__all__ = ["BitDifference", "bit_difference"]


class BitDifference(NamedTuple):
    """How two tensors differ.

    Args:
        num_values: values in each.
        num_different: pairs of values whose bits differ.
        largest: largest absolute difference; NaN where one of a pair is NaN or both are the same infinity.
        first: where the first pair that differs is.
        values: that pair, as text that gives the bits again.
        ulps: how many representable values lie between the pair, the further one included; for integers their distance.

    Example:
        >>> bit_difference(torch.ones(2), torch.ones(2)) is None
        True
    """

    num_values: int
    num_different: int
    largest: float
    first: tuple[int, ...]
    values: tuple[str, str]
    ulps: int


def bit_difference(a: Tensor, b: Tensor) -> BitDifference | None:
    """Compare two tensors bit for bit: a NaN equals one of the same bits, and -0 does not equal 0.

    Args:
        a: any tensor.
        b: one of the same shape and dtype.

    Returns:
        How they differ; None where they do not.

    Raises:
        ValueError: shapes or dtypes differ.

    Example:
        >>> found = bit_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 2**-22]))
        >>> found.num_different, found.first, found.values, found.ulps
        (1, (1,), ('2.0', '2.0000002'), 1)
    """
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        raise ValueError(
            f"Expected two tensors of the same shape and dtype. "
            f"Received: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        )
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    bits = _bits(a), _bits(b)
    places = np.flatnonzero(bits[0] != bits[1])
    if not len(places):
        return None
    place = int(places[0])
    pairs = [tensor.detach().cpu().reshape(-1)[torch.from_numpy(places)] for tensor in (a, b)]
    with np.errstate(invalid="ignore"):
        distances = np.abs(pairs[0].double().numpy() - pairs[1].double().numpy())
    return BitDifference(
        num_values=a.numel(),
        num_different=len(places),
        largest=float(distances.max()),
        first=tuple(int(i) for i in np.unravel_index(place, a.shape)) if a.ndim else (),
        values=(_text(pairs[0][0]), _text(pairs[1][0])),
        ulps=abs(_rank(bits[0][place], a) - _rank(bits[1][place], b)),
    )


def _bits(tensor: Tensor) -> NDArray[np.signedinteger]:
    array = np.ascontiguousarray(tensor_bytes(tensor)).reshape(-1)
    return array.view(f"i{array.itemsize}")


def _rank(bits: np.signedinteger, tensor: Tensor) -> int:
    """Floats in order as integers: 0 and -0 are 0, the next ones 1 and -1."""
    number, half = int(bits), 1 << (8 * bits.itemsize - 1)
    return -(number + half) if tensor.is_floating_point() and number < 0 else number


def _text(value: Tensor) -> str:
    try:
        return str(value.numpy()[()])  # the shortest text of its own dtype
    except TypeError:
        return repr(value.item())
