"""The numbers of a step and the sums of an epoch, each as one vector on the device: nothing is read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dwiml_func.core.metrics import add_metrics
from dwiml_func.types import Metrics, Sum

__all__ = ["VectorSums", "add_vectors", "vector_of"]


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


def vector_of(device: torch.device, *numbers: float | Tensor) -> Tensor:
    """Numbers in double precision, in order."""
    known = [0.0 if isinstance(number, Tensor) else number for number in numbers]
    vector = torch.from_numpy(np.array(known, dtype=np.float64))  # three times faster than torch.tensor
    if device.type != "cpu":  # from pinned memory, so that the host does not wait
        vector = (vector.pin_memory() if device.type == "cuda" else vector).to(device, non_blocking=True)
    for place, number in enumerate(numbers):
        if isinstance(number, Tensor):
            vector[place] = number
    return vector
