"""How causal attention goes through its weights: in blocks of queries and keys, each with the same dropout each time.

A block is 48 queries of some lines, and the keys up to the last of them. All have the same memory, one after the other.
Dropout takes 16 random bits a weight, since torch's own draws take more time than all else here. So its rate is a
multiple of 1 / 65536.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Dropout", "Layout", "block_memory", "join_heads", "slices", "split_heads", "weight_blocks"]

_QUERIES = 48
_WEIGHTS = 2**17  # of a block: 512 KB
_LEVELS = 2**16


class Layout(NamedTuple):
    """The sequences of each bucket and their padded rows, attention heads, and the rate of dropout on the weights."""

    buckets: tuple[tuple[int, int], ...]
    num_heads: int
    rate: float

    @property
    def dropped(self) -> int:
        """Of 65536 weights, not all."""
        return min(round(self.rate * _LEVELS), _LEVELS - 1)


class Dropout:
    """Which weights are kept, from a generator for each of the K first dimensions."""

    def __init__(self, seeds: Tensor, layout: Layout) -> None:
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds] if layout.dropped else []
        self._least = layout.dropped - _LEVELS // 2
        self.share = 1 - layout.dropped / _LEVELS

    def kept(self, lines: slice, num_lines: int, space: Tensor, weights: Tensor) -> Tensor | None:
        """1 for kept and 0 for dropped weights of lines, of num_lines in all; None without dropout."""
        if not self._generators:
            return None
        own, line, parts = num_lines // len(self._generators), lines.start, []
        while line < lines.stop:  # each member's in the order of its lines, however many are in a block
            last = min(lines.stop, line - line % own + own)
            num = (last - line) * weights[0].numel()
            bits = torch.empty(-(-num // 4), dtype=torch.int64)
            parts.append(bits.random_(-(2**63), None, generator=self._generators[line // own]).view(torch.int16)[:num])
            line = last
        return space[: weights.numel()].copy_(torch.cat(parts)).ge_(self._least).view_as(weights)


def weight_blocks(query: Tensor, key: Tensor, space: Tensor) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Blocks of weights, one after the other in the same memory: lines, queries, keys, weights."""
    num, length, _ = query.shape
    hidden = query.new_full((_QUERIES, _QUERIES), -math.inf).triu_(1)
    for lines, now, until in slices(num, length):
        shape = lines.stop - lines.start, now.stop - now.start, until.stop
        weights = space[: math.prod(shape)].view(shape)
        torch.bmm(query[lines, now], key[lines, until].mT, out=weights)
        weights[:, :, now] += hidden[: shape[1], : shape[1]]
        yield lines, now, until, torch.softmax(weights, -1, out=weights)


def slices(num: int, length: int) -> Iterator[tuple[slice, slice, slice]]:
    """The lines, queries and keys of each block of `num` lines of a length."""
    for first in range(0, length, _QUERIES):
        last = min(first + _QUERIES, length)
        num_lines = max(1, _WEIGHTS // (last * (last - first)))
        for line in range(0, num, num_lines):
            yield slice(line, min(line + num_lines, num)), slice(first, last), slice(last)


def block_memory(padded: Tensor, layout: Layout, num: int) -> tuple[Tensor, ...]:
    """Memory for blocks of weights."""
    num_heads = len(padded) * layout.num_heads
    sizes = [(lines * num_heads * rows * min(rows, _QUERIES), rows) for lines, rows in layout.buckets]
    size = max(min(all_weights, max(_WEIGHTS, _QUERIES * rows)) for all_weights, rows in sizes)
    return padded.new_empty(num, size).unbind()


def split_heads(padded: Tensor, layout: Layout, num_parts: int) -> Iterator[tuple[Tensor, ...]]:
    """Each bucket of rows (K, P, parts * d) as parts (K * sequences * heads, L, size)."""
    sizes = [num * length for num, length in layout.buckets]
    for (num, length), rows in zip(layout.buckets, padded.split(sizes, 1), strict=True):
        apart = rows.unflatten(2, (num_parts, layout.num_heads, -1)).unflatten(1, (num, length))
        yield apart.permute(3, 0, 1, 4, 2, 5).flatten(1, 3).unbind()


def join_heads(results: Sequence[Sequence[Tensor]], padded: Tensor, layout: Layout, places: Tensor) -> Tensor:
    """Rows (K, N, parts * d) of parts (K * sequences * heads, size, L) of each bucket."""
    size, num_heads = results[0][0].shape[1], layout.num_heads
    joined = padded.new_empty(*padded.shape[:2], len(results[0]) * num_heads * size)
    sizes = [num * length for num, length in layout.buckets]
    for (num, length), parts, rows in zip(layout.buckets, results, joined.split(sizes, 1), strict=True):
        apart = rows.unflatten(2, (len(parts), num_heads, size)).unflatten(1, (num, length))
        for number, part in enumerate(parts):
            apart[:, :, :, number] = part.view(len(padded), num, num_heads, size, length).permute(0, 1, 4, 2, 3)
    return joined.index_select(1, places)  # no real row reads a padded one
