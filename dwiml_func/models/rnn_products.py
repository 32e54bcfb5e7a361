"""Matrix products in the dtype of their second factor, for sums in another: those of a recurrent layer in bfloat16.

Under autocast a layer's weight matrices come in bfloat16. The products are taken in it; gates, states and sums of
gradients stay in float32, where a forget gate near 1 and a small step of the cell are not rounded away.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_product", "product", "write_product"]


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product, in the dtype of `b`.

    Args:
        a: (N, F) float.
        b: (F, G) float.

    Returns:
        (N, G), of the dtype of `b`.

    Example:
        >>> product(torch.ones(1, 2), torch.ones(2, 1, dtype=torch.bfloat16))
        tensor([[2.]], dtype=torch.bfloat16)
    """
    return a.to(b.dtype) @ b


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a matrix product to a tensor in place, taken in the dtype of `b`.

    Args:
        total: (N, G) float, written in place.
        a: (N, F) float.
        b: (F, G) float.

    Returns:
        `total`.

    Example:
        >>> add_product(torch.ones(1, 1), torch.ones(1, 2), torch.ones(2, 1, dtype=torch.bfloat16))
        tensor([[3.]])
    """
    return total.addmm_(a, b) if a.dtype == b.dtype == total.dtype else total.add_(product(a, b))


def write_product(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Write a matrix product into a tensor, taken in the dtype of `b`, with a bias added in that of `out`.

    Args:
        out: (N, G) float, written in place.
        a: (N, F) float.
        b: (F, G) float.
        bias: (G,), of the dtype of `out`; None adds nothing.

    Returns:
        `out`.

    Example:
        >>> write_product(torch.empty(1, 1), torch.ones(1, 2), torch.ones(2, 1, dtype=torch.bfloat16), torch.ones(1))
        tensor([[3.]])
    """
    if a.dtype == b.dtype == out.dtype:
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    return out.copy_(product(a, b)) if bias is None else torch.add(bias, product(a, b), out=out)
