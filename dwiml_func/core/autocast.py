"""Mixed precision: a module's forward under torch.autocast, between parameters and a loss in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_forward", "check_bf16"]


def autocast_forward(module: torch.nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    """What a module's forward computes, with the operations that bear it in a lower precision.

    Which these are is torch's choice: matrix products and convolutions are, sums of many numbers are not. Parameters
    and gradients keep their dtype.

    Args:
        module: the module. It is not changed.
        dtype: torch.bfloat16, which has the range of float32 and 8 bits of precision.

    Returns:
        A function like the module's `forward`, for the device of its parameters. Tensors of `dtype` that it returns,
        alone or within tuples, lists, mappings and dataclasses, are brought back to float32.

    Raises:
        ValueError: another dtype (float16 overflows: its losses must be scaled, which is not done here).

    Example:
        >>> linear = torch.nn.Linear(2, 1)
        >>> low = autocast_forward(linear, torch.bfloat16)(torch.ones(1, 2))
        >>> low.dtype, torch.equal(low, low.bfloat16().float()), bool((low - linear(torch.ones(1, 2))).abs() < 0.02)
        (torch.float32, True, True)
    """
    if dtype != torch.bfloat16:
        raise ValueError(f"Expected torch.bfloat16 for autocast. Received: {dtype}")
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        device_type = next(module.parameters()).device.type
        # No cache: it holds casts for as long as the context lasts, and under torch.func beyond the gradient's level.
        with torch.autocast(device_type, dtype, cache_enabled=False):
            results = forward(*args, **kwargs)
        return _to_float32(results, dtype)

    return run


def check_bf16(device: torch.device) -> None:
    """Refuse a device that has no arithmetic in bfloat16. Every CPU has, at some speed.

    Args:
        device: where the model is to run.

    Raises:
        ValueError: it has none.

    Example:
        >>> check_bf16(torch.device("cpu"))
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"precision bf16: {name} has no arithmetic in bfloat16. Expected precision float32 on it.")


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
