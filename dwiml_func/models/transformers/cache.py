"""Keys and values of the points read so far: what tracking needs to read one more point of every line.

The cache of an attention is a list of blocks of 32 points, with keys and values (2, R, heads, 32, size). Each block is
attended to by itself, and the results are joined as in an online softmax: blocks without points of a line change no bit
of its result. So a line's result does not depend on how long the lines beside it are.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["BLOCK", "CacheState", "CachedLine", "CachedStep", "copied"]

BLOCK = 32
"""Points a block."""


class CacheState(NamedTuple):
    """What a model remembers of R sequences.

    num_read: (R,) int64, points read so far.
    caches: for each attention of the model its blocks.
    """

    num_read: Tensor
    caches: tuple[tuple[Tensor, ...], ...]

    def forget(self, rows: Tensor) -> CacheState:
        """The state in which new sequences begin in rows (R,) bool."""
        return self._replace(num_read=self.num_read.masked_fill(rows, 0))


class CachedStep:
    """Attention of the newest row of R sequences to their earlier rows and itself, in the place of `Sequences`.

    Its attentions come in the order in which the model calls them. Blocks are written in place.
    """

    def __init__(self, num_read: Tensor, caches: Sequence[Sequence[Tensor]]) -> None:
        self.positions = num_read
        self._caches = [list(blocks) for blocks in caches]
        self._called = 0
        num_blocks = int(num_read.max()) // BLOCK + 1
        block = num_read // BLOCK
        self._rows = [(block == number).nonzero()[:, 0] for number in range(num_blocks)]
        self._columns = [num_read[rows] % BLOCK for rows in self._rows]
        first = torch.arange(0, num_blocks * BLOCK, BLOCK, device=num_read.device)[:, None]
        steps = torch.arange(BLOCK, device=num_read.device)
        hidden = steps > (num_read - first)[..., None]  # (blocks, R, 32), after the newest point
        self._hidden = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, -math.inf)[:, :, None]

    @property
    def state(self) -> CacheState:
        """The state after the step."""
        return CacheState(self.positions + 1, tuple(tuple(blocks) for blocks in self._caches))

    def attend(self, projected: Tensor, *, num_heads: int, dropout_rate: float) -> Tensor:
        """Attend to what is cached and to the rows themselves: (R, d) from queries, keys and values (R, 3 d)."""
        assert dropout_rate == 0, "a cache is for tracking, in evaluation mode"
        parts = projected.unflatten(1, (3, num_heads, -1))
        new, shape = parts[:, 1:], (2, len(parts), num_heads, BLOCK, parts.shape[3])
        query = (parts[:, 0] / math.sqrt(shape[-1])).flatten(0, 1)[:, None]
        if self._called == len(self._caches):
            self._caches.append([])
        blocks = self._caches[self._called]
        self._called += 1
        while len(blocks) < len(self._rows):
            blocks.append(projected.new_zeros(shape))
        total = query.new_zeros(len(query), 1, 1)
        highest, result = torch.full_like(total, -math.inf), torch.zeros_like(query)
        for block, rows, columns, hidden in zip(blocks, self._rows, self._columns, self._hidden, strict=False):
            block[:, rows, :, columns] = new[rows]
            keys, values = block.flatten(1, 2)
            scores = torch.bmm(query, keys.mT)  # three times as fast as keys by columns
            scores.view(len(parts), num_heads, BLOCK).add_(hidden)
            new_highest = torch.maximum(highest, scores.amax(2, keepdim=True))
            weights, scale = (scores - new_highest).exp_(), (highest - new_highest).exp_()
            total = total * scale + weights.sum(2, keepdim=True)
            result = result * scale + torch.bmm(weights, values)
            highest = new_highest
        return (result / total).view(len(parts), -1)


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
            caches.append(blocks + tuple(map(torch.zeros_like, more)))
        self.state = CacheState(num_read, tuple(caches))  # in which the row has read the sequence

    def attend(self, projected: Tensor, *, num_heads: int, dropout_rate: float) -> Tensor:
        """Attend to the rows up to and including one's own: (N, d) from queries, keys and values (N, 3 d)."""
        assert dropout_rate == 0, "a cache is for tracking, in evaluation mode"
        heads = projected.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)  # (3, heads, N, size)
        for block, part in zip(self.state.caches[self._called], heads[1:].split(BLOCK, dim=2), strict=False):
            block[:, self._row, :, : part.shape[2]] = part
        self._called += 1
        query, key, value = heads[:, None]
        return scaled_dot_product_attention(query, key, value, is_causal=True)[0].transpose(0, 1).flatten(1)


def copied(state: CacheState) -> CacheState:
    """A state in other memory."""
    return state._replace(caches=tuple(tuple(block.clone() for block in blocks) for blocks in state.caches))
