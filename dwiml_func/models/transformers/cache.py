"""Keys and values of the points read so far: what tracking needs to read one more point of every line.

The cache of an attention is a list of blocks of 64 points. Each block is attended to by itself, and the results are
joined as in an online softmax: blocks without points of a line change no bit of its result. So a line's result does not
depend on how long the lines beside it are.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["BLOCK", "Block", "CacheState", "CachedLine", "CachedStep", "copied"]

BLOCK = 64
"""Points a block."""

Block = tuple[Tensor, Tensor]
"""Keys and values of 64 points, (R, heads, 64, size) each."""


class CacheState(NamedTuple):
    """What a model remembers of R sequences.

    num_read: (R,) int64, points read so far.
    caches: for each attention of the model its blocks.
    """

    num_read: Tensor
    caches: tuple[tuple[Block, ...], ...]

    def forget(self, rows: Tensor) -> CacheState:
        """The state in which new sequences begin in rows (R,) bool."""
        return self._replace(num_read=self.num_read.masked_fill(rows, 0))


class CachedStep:
    """Attention of the newest row of R sequences to their earlier rows and itself, in the place of `Sequences`.

    Its attentions come in the order in which the model calls them. Blocks are written in place.
    """

    def __init__(self, num_read: Tensor, caches: Sequence[Sequence[Block]]) -> None:
        self.positions = num_read
        self._caches = [list(blocks) for blocks in caches]
        self._called = 0
        num_blocks = int(num_read.max()) // BLOCK + 1
        block = num_read // BLOCK
        self._rows = [(block == number).nonzero()[:, 0] for number in range(num_blocks)]
        self._columns = [num_read[rows] % BLOCK for rows in self._rows]
        first = torch.arange(0, num_blocks * BLOCK, BLOCK, device=num_read.device)
        last = num_read[:, None] - first  # of each block the last column that may be read
        self._hidden = torch.arange(BLOCK, device=num_read.device) > last[..., None]  # (R, blocks, 64)

    @property
    def state(self) -> CacheState:
        """The state after the step."""
        return CacheState(self.positions + 1, tuple(tuple(blocks) for blocks in self._caches))

    def attend(self, projected: Tensor, *, num_heads: int, dropout_rate: float) -> Tensor:
        """Attend to what is cached and to the rows themselves: (R, d) from queries, keys and values (R, 3 d)."""
        assert dropout_rate == 0, "a cache is for tracking, in evaluation mode"
        query, key, value = projected.unflatten(1, (3, num_heads, -1)).unbind(1)
        if self._called == len(self._caches):
            self._caches.append([])
        blocks = self._caches[self._called]
        self._called += 1
        while len(blocks) < len(self._rows):
            shape = (*key.shape[:2], BLOCK, key.shape[2])
            blocks.append((key.new_zeros(shape), value.new_zeros(shape)))
        query = (query / math.sqrt(query.shape[2]))[..., None]
        total = query.new_zeros(*query.shape[:2], 1)
        highest, result = torch.full_like(total, -math.inf), torch.zeros_like(query[..., 0])
        for number, (keys, values) in enumerate(blocks[: len(self._rows)]):
            rows, columns = self._rows[number], self._columns[number]
            keys[rows, :, columns] = key[rows]
            values[rows, :, columns] = value[rows]
            scores = (keys @ query)[..., 0].masked_fill(self._hidden[:, None, number], -math.inf)
            new_highest = torch.maximum(highest, scores.amax(dim=2, keepdim=True))
            weights, scale = (scores - new_highest).exp(), (highest - new_highest).exp()
            total = total * scale + weights.sum(dim=2, keepdim=True)
            result = result * scale + (weights[:, :, None] @ values)[:, :, 0]
            highest = new_highest
        return (result / total).flatten(1)


class CachedLine:
    """Attention of all rows of one new sequence, in the place of `Sequences`, which keeps keys and values in row `row`.

    Blocks are written in place.
    """

    def __init__(self, state: CacheState, row: int, num: int) -> None:
        self._row, self._called = row, 0
        self.positions = torch.arange(num, device=state.num_read.device)
        num_read = state.num_read.clone()
        num_read[row] = num
        caches = []
        for blocks in state.caches:
            more = blocks[:1] * (-(-num // BLOCK) - len(blocks))
            caches.append(blocks + tuple((torch.zeros_like(keys), torch.zeros_like(values)) for keys, values in more))
        self.state = CacheState(num_read, tuple(caches))  # in which the row has read the sequence

    def attend(self, projected: Tensor, *, num_heads: int, dropout_rate: float) -> Tensor:
        """Attend to the rows up to and including one's own: (N, d) from queries, keys and values (N, 3 d)."""
        assert dropout_rate == 0, "a cache is for tracking, in evaluation mode"
        heads = projected.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)  # (3, heads, N, size)
        for number, parts in enumerate(heads[1:].split(BLOCK, dim=2)):
            for cache, part in zip(self.state.caches[self._called][number], parts, strict=True):
                cache[self._row, :, : part.shape[1]] = part
        self._called += 1
        query, key, value = heads[:, None]
        return scaled_dot_product_attention(query, key, value, is_causal=True)[0].transpose(0, 1).flatten(1)


def copied(state: CacheState) -> CacheState:
    """A state in other memory."""
    caches = (tuple((keys.clone(), values.clone()) for keys, values in blocks) for blocks in state.caches)
    return state._replace(caches=tuple(caches))
