"""Metrics as sums: a weighted total beside its weight, divided once, when the epoch is over.

A mean over batches of unequal size is wrong unless it is weighted; a sum of (total, weight) pairs is right in any
grouping. Totals are float64. On the CPU they are Python floats, because reading a tensor there costs nothing and adding
floats costs less than adding tensors; on other devices they stay tensors, so that no step waits for the device, and so
they do under torch.func and torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwiml_func._transforms import is_transformed
from dwiml_func.types import Metrics, Sum

__all__ = ["Metrics", "Sum", "add_metrics", "read_means", "weighted_sum"]


def weighted_sum(mean: float | Tensor, weight: float | Tensor) -> Sum:
    """Turn a batch's mean into a sum.

    Args:
        mean: () tensor of any floating dtype, or a float.
        weight: what stands behind the mean, e.g. the number of points.

    Returns:
        The sum, in float64; zero where the weight is, whatever the mean of nothing was. A tensor on the CPU is read;
        one on another device or under a transform is not.

    Example:
        >>> weighted_sum(torch.tensor(0.5), 4)
        Sum(total=2.0, weight=4.0)
    """
    mean, weight = _float64(mean), _float64(weight)
    if isinstance(weight, Tensor):
        return Sum(torch.where(weight == 0, 0.0, mean * weight), weight)
    # A number that is traced may stand for the size of any batch, and is not looked at.
    is_known = isinstance(mean, float) or not is_transformed()
    return Sum(0.0 if is_known and weight == 0 else mean * weight, weight)


def add_metrics(first: Metrics, second: Metrics) -> dict[str, Sum]:
    """Add two sets of sums; a name that stands in one of them only is kept.

    Args:
        first: sums so far.
        second: sums to add, e.g. those of one batch.

    Returns:
        A new dict.

    Example:
        >>> add_metrics({"loss": Sum(1.0, 2.0)}, {"loss": Sum(3.0, 4.0)})
        {'loss': Sum(total=4.0, weight=6.0)}
    """
    result = dict(first)
    for name, new in second.items():
        old = result.get(name)
        result[name] = new if old is None else Sum(old.total + new.total, old.weight + new.weight)
    return result


def read_means(metrics: Metrics) -> dict[str, float]:
    """Divide each sum by its weight. This is the one place that waits for the device.

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
        readable = value.device.type == "cpu" and not is_transformed()
        return float(value.item()) if readable else value.detach().to(torch.float64)
    return float(value)
