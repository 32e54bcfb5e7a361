"""How tensors lie in memory: whether several of them share it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["memory_problems", "overlapping"]


def overlapping(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of names whose tensors, from first to last element, have memory in common."""
    spans = []
    for name, tensor in tensors.items():
        if tensor.numel() and not tensor.is_meta and tensor.layout == torch.strided:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            spans.append((start, start + (last + 1) * tensor.itemsize, name))
    reaching: list[tuple[int, str]] = []  # the ends of those before that reach as far as the next one
    for start, end, name in sorted(spans):
        reaching = [(other_end, other) for other_end, other in reaching if other_end > start]
        yield from ((other, name) for _, other in reaching)
        reaching.append((end, name))


def memory_problems(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Why a module's tensors, by name, cannot be copied into a state, and back, one by one."""
    yield from (f"{name} is {t.layout}" for name, t in tensors.items() if t.layout != torch.strided)
    for one, other in overlapping(tensors):
        if _share_elements(tensors[one], tensors[other]):
            yield f"{one} and {other} overlap in memory (weights are tied by one name for both)"


def _share_elements(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose spans overlap do so: columns of one matrix do not."""
    if one.dtype != other.dtype or one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return True
    marks = torch.zeros(one.untyped_storage().nbytes() // one.itemsize, dtype=torch.bool)
    marks.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(marks.as_strided(other.shape, other.stride(), other.storage_offset()).any())
