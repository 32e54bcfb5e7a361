"""The sums of an epoch as one vector on the device: one addition a step, and nothing is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dwiml_func.core.metrics import add_metrics
from dwiml_func.types import Metrics, Sum

__all__ = ["VectorSums", "add_vectors"]


class VectorSums(dict[str, Sum]):
    """Sums by name, whose numbers are parts of `vector`: total and weight of each, in order."""

    __slots__ = ("vector",)

    def __init__(self, names: tuple[str, ...], vector: Tensor) -> None:
        parts = vector.unbind()
        super().__init__({name: Sum(parts[2 * i], parts[2 * i + 1]) for i, name in enumerate(names)})
        self.vector = vector


def add_vectors(sums: Mapping[str, Sum], new: VectorSums) -> Metrics:
    """The sums with new ones added, as `add_metrics` does it, by one operation where both have the same names."""
    if not sums:
        return new
    if list(sums) != list(new):
        return add_metrics(sums, new)
    if not isinstance(sums, VectorSums):
        parts = [torch.as_tensor(part, dtype=torch.float64) for own in sums.values() for part in own]
        if any(part.device != new.vector.device for part in parts):
            return add_metrics(sums, new)
        return VectorSums(tuple(new), torch.stack(parts) + new.vector)
    return VectorSums(tuple(new), sums.vector + new.vector)
