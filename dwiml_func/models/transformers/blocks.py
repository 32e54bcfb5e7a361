"""How causal attention goes through its weights: in blocks of queries and keys, each with the same dropout each time.

A chunk is some sequences of a bucket, so many that their blocks stay in a core's cache. A block is 48 queries of a
chunk, and the keys up to the last of them. All blocks have the same memory, one after the other. Dropout takes 16
random bits a weight, since torch's own random numbers take more time than all else here. So its rate is a
multiple of 1 / 65536.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Chunk", "Dropout", "Layout", "block_weights", "chunks", "hidden_keys", "most_weights", "query_blocks"]

_QUERIES = 48
_WEIGHTS = 2**18  # of a block: 1 MB
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


class Chunk(NamedTuple):
    """Some sequences of a bucket, of some members of an ensemble, which are the first dimension of all rows."""

    members: slice
    num: int
    length: int
    rows: slice  # of all padded rows
    num_heads: int

    def split(self, flat: Tensor, rows: Tensor, num_parts: int) -> Tensor:
        """Its part of rows (K, N, parts * d), at padded rows (P,): (parts, members, sequences, heads, L, size)."""
        return self._apart(flat[self.members].index_select(1, rows[self.rows]), num_parts)

    def of(self, padded: Tensor, num_parts: int) -> Tensor:
        """Its part of all padded rows (K, P, parts * d), as `split` has it, to write into."""
        return self._apart(padded[self.members, self.rows], num_parts)

    def _apart(self, padded: Tensor, num_parts: int) -> Tensor:
        apart = padded.unflatten(2, (num_parts, self.num_heads, -1)).unflatten(1, (self.num, self.length))
        return apart.permute(3, 0, 1, 4, 2, 5)


def chunks(layout: Layout, num_members: int) -> Iterator[Chunk]:
    """All of K members' sequences, in the order of their padded rows."""
    first = 0
    for num_sequences, length in layout.buckets:
        weights = layout.num_heads * min(_QUERIES, length) * length
        most = max(_WEIGHTS // weights, 1)
        for sequence in range(0, num_sequences, most):
            num = min(most, num_sequences - sequence)
            rows = slice(first, first := first + num * length)
            step = max(_WEIGHTS // (weights * num), 1)
            for member in range(0, num_members, step):
                yield Chunk(slice(member, min(member + step, num_members)), num, length, rows, layout.num_heads)


def query_blocks(length: int) -> list[tuple[int, int]]:
    """The first and last + 1 query of each block: also the number of its keys."""
    return [(first, min(first + _QUERIES, length)) for first in range(0, length, _QUERIES)]


def most_weights(layout: Layout, num_members: int) -> int:
    """Of any block."""
    sizes = [
        (chunk.members.stop - chunk.members.start) * chunk.num * min(_QUERIES, chunk.length) * chunk.length
        for chunk in chunks(layout, num_members)
    ]
    return max(sizes) * layout.num_heads


class Dropout:
    """Which weights are kept, from a generator for each of the K members."""

    def __init__(self, seeds: Tensor, layout: Layout) -> None:
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds] if layout.dropped else []
        self._least = layout.dropped - _LEVELS // 2
        self.share = 1 - layout.dropped / _LEVELS

    def bits(self, chunk: Chunk) -> Tensor | None:
        """16 random bits for each weight, (members, sequences * heads, of all blocks); None without dropout."""
        if not self._generators:
            return None
        generators, lines = self._generators[chunk.members], chunk.num * chunk.num_heads
        num = lines * sum((last - first) * last for first, last in query_blocks(chunk.length))
        bits = torch.empty(len(generators), -(-num // 4), dtype=torch.int64)
        for own, generator in zip(bits, generators, strict=True):
            own.random_(-(2**63), None, generator=generator)
        return bits.view(torch.int16)[:, :num].unflatten(1, (lines, -1))

    def kept(self, bits: Tensor | None, first: int, last: int, space: Tensor) -> Tensor | None:
        """1 for kept and 0 for dropped weights of a block, (members * sequences * heads, queries, keys)."""
        if bits is None:
            return None
        before = sum((end - start) * end for start, end in query_blocks(first))
        own = bits[:, :, before : before + (last - first) * last]
        kept = space[: own.numel()].view_as(own).copy_(own).ge_(self._least)
        return kept.view(-1, last - first, last)


def hidden_keys(space: Tensor) -> Tensor:
    """What is added to the scores of a block's queries and its last keys: no query sees what comes after it."""
    return space.new_full((_QUERIES, _QUERIES), -math.inf).triu_(1)


def block_weights(query: Tensor, key: Tensor, hidden: Tensor, space: Tensor) -> Tensor:
    """The weights (lines, queries, keys) of a block's scaled queries, the last of which are those of its last keys."""
    num, last = query.shape[1], key.shape[1]
    weights = space[: len(query) * num * last].view(-1, num, last)
    torch.bmm(query, key.mT, out=weights)
    weights[:, :, last - num :].add_(hidden[:num, :num])
    return torch.softmax(weights, -1, out=weights)
