"""The precision of training: bfloat16 for a module's operations, and that of float32 products."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["MatmulPrecision", "autocast_forward", "check_bf16", "set_matmul_precision"]


def autocast_forward(module: torch.nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    """A module's `forward` with torch's choice of operations (matrix products, convolutions) in bfloat16.

    Results in bfloat16, also within tuples, lists, mappings and dataclasses, are converted to float32.
    """
    if dtype != torch.bfloat16:
        # float16 would need scaled losses
        raise ValueError(f"Expected torch.bfloat16 for autocast. Received: {dtype}")
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        device_type = next(module.parameters()).device.type
        # No cache: under torch.func it would keep casts beyond the gradient's level.
        with torch.autocast(device_type, dtype, cache_enabled=False):
            results = forward(*args, **kwargs)
        return _to_float32(results, dtype)

    return run


def check_bf16(device: torch.device) -> None:
    """Raise a ValueError if a device has no arithmetic in bfloat16. Every CPU has, at some speed."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"precision bf16: {name} has no arithmetic in bfloat16. Use precision float32.")


def _to_float32(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype == dtype else value
    if isinstance(value, Mapping):
        return type(value)({name: _to_float32(part, dtype) for name, part in value.items()})  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to_float32(part, dtype) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(_to_float32(part, dtype) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        changes = {each.name: _to_float32(getattr(value, each.name), dtype) for each in fields(value) if each.init}
        return replace(value, **changes)
    return value


MatmulPrecision = Literal["highest", "high", "medium"]
"""A precision of float32 products, by name, see `torch.set_float32_matmul_precision`."""


def set_matmul_precision(precision: MatmulPrecision) -> None:
    """Set the precision of float32 products for this process, also for cuDNN, whose own default is TF32.

    cuDNN then takes only algorithms whose results repeat; by default its gradients of convolutions may not.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use the new API", UserWarning)  # torch 2.9 to 2.11, of these settings
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision != "highest"
    torch.backends.cudnn.deterministic = True
