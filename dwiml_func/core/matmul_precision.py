"""How float32 matrix products may be rounded: an explicit choice, the same for cuBLAS, cuDNN and oneDNN."""

from __future__ import annotations

import warnings
from typing import Literal

import torch

__all__ = ["MatmulPrecision", "set_matmul_precision"]

MatmulPrecision = Literal["highest", "high", "medium"]
"""A precision of float32 products, by name, see `torch.set_float32_matmul_precision`."""


def set_matmul_precision(precision: MatmulPrecision) -> None:
    """Set the precision of float32 products for this process, also for cuDNN, whose own default is TF32.

    cuDNN then takes only algorithms that give the same bits again; by default its gradients of convolutions may not.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use the new API", UserWarning)  # torch 2.9 to 2.11, of these settings
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision != "highest"
    torch.backends.cudnn.deterministic = True
