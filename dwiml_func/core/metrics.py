"""Metrics as weighted sums, divided by their weights once, at the end of an epoch.

A mean over batches of unequal size must be weighted; sums of (total, weight) pairs are right in any grouping. Totals
are float64: Python floats on the CPU, where they are cheapest, and tensors on other devices, so that no step waits for
the device, and under torch.func and torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwiml_func._transforms import is_transformed
from dwiml_func.types import Metrics, Sum

__all__ = ["add_metrics", "read_means", "weighted_sum"]


def weighted_sum(mean: float | Tensor, weight: float | Tensor) -> Sum:
    """A mean times its weight (number of points averaged); zero for a weight of zero, even if the mean is NaN."""
    mean, weight = _float64(mean), _float64(weight)
    if isinstance(weight, Tensor):
        return Sum(torch.where(weight == 0, 0.0, mean * weight), weight)
    # A traced number may stand for the size of any batch; its value is not read.
    is_known = isinstance(mean, float) or not is_transformed()
    return Sum(0.0 if is_known and weight == 0 else mean * weight, weight)


def add_metrics(first: Metrics, second: Metrics) -> dict[str, Sum]:
    """Add sums by name, in a new dict; a name may be in only one of them."""
    result = dict(first)
    for name, new in second.items():
        old = result.get(name)
        result[name] = new if old is None else Sum(old.total + new.total, old.weight + new.weight)
    return result


def read_means(metrics: Metrics) -> dict[str, float]:
    """Divide each sum by its weight. This waits for the device.

    Args:
        metrics: sums.

    Returns:
        Means by name; NaN where the weight is 0.

    Example:
        >>> read_means({"loss": Sum(6.0, 4.0)})
        {'loss': 1.5}
    """
    return {
        name: float(total) / float(weight) if float(weight) else float("nan")
        for name, (total, weight) in metrics.items()
    }


def _float64(value: float | Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        readable = not is_transformed() and value.is_cpu
        return float(value.item()) if readable else value.detach().to(torch.float64)
    return float(value)
