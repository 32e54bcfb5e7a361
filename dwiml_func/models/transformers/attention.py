"""Causal attention over flat rows: sequences of like lengths are padded together, only for the attention itself.

Everything else of a transformer works on single rows and needs no padding. Rows are padded at the right, where causal
attention never reads them for a real row: so no padding mask is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

from dwiml_func._transforms import is_transformed

__all__ = ["Bucket", "Sequences", "sequences_of"]

_SHORTEST = 0.8  # of a bucket's sequences, relative to the longest: padding then costs a fifth at most


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """B sequences of like lengths.

    rows: (B * L,) int64, the flat row of each padded row; a padded one repeats the last row of its sequence.
    real: the padded rows that are real, int64, sequence by sequence.
    """

    rows: Tensor
    real: Tensor
    num_sequences: int


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """N flat rows as S sequences.

    positions: (N,) int64, each row's place in its sequence, from 0.
    buckets: of the sequences that have rows.
    flat: (N,) int64, for each flat row its place among the real rows of all buckets, one bucket after the other.
    """

    positions: Tensor
    buckets: tuple[Bucket, ...]
    flat: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, num_heads: int, dropout_rate: float) -> Tensor:
        """Attend to the rows of the same sequence up to and including one's own: (N, d) from three of (N, d).

        Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2, with dropout on the weights.
        """
        joined = torch.cat([query, key, value], dim=1)  # one gather and one gradient for the three
        results = []
        for bucket in self.buckets:
            padded = joined.index_select(0, bucket.rows)
            heads = padded.reshape(bucket.num_sequences, -1, 3, num_heads, query.shape[1] // num_heads)
            heads = heads.permute(2, 0, 3, 1, 4)  # (3, B, heads, L, size)
            rows = _attend(heads[0], heads[1], heads[2], dropout_rate).transpose(1, 2).reshape(-1, query.shape[1])
            results.append(rows.index_select(0, bucket.real))
        return torch.cat(results).index_select(0, self.flat)


def sequences_of(offsets: Tensor, num_rows: int, padded_length: int | None = None) -> Sequences:
    """The sequences s with the flat rows offsets[s] to offsets[s + 1] - 1; `offsets` is (S + 1,) int64.

    With `padded_length`, all are in one bucket, padded to so many rows, and no accelerator is asked for lengths.
    """
    device = offsets.device
    rows = torch.arange(num_rows, device=device)
    positions = rows - offsets[:-1].repeat_interleave(offsets.diff(), output_size=num_rows)
    if torch.compiler.is_compiling():
        padded, real, flat = _one_bucket(offsets, num_rows)
        return Sequences(positions, (Bucket(padded.flatten(), real, offsets.shape[0] - 1),), flat)
    lengths = offsets.diff()
    if padded_length is not None:
        steps = torch.arange(padded_length, device=device)
        starts = offsets[:-1, None].clamp(max=num_rows - 1)
        padded = starts + torch.minimum(steps, (lengths[:, None] - 1).clamp(min=0))
        sequence = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=num_rows)
        real = sequence * padded_length + positions
        return Sequences(positions, (Bucket(padded.flatten(), real, len(lengths)),), rows)
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    buckets, real_rows, first = [], [], 0
    while first < len(sizes) and sizes[first] > 0:
        last = first
        while last < len(sizes) and sizes[last] >= max(_SHORTEST * sizes[first], 1):
            last += 1
        bucket = _bucket(offsets, lengths, order[first:last], sizes[first])
        buckets.append(bucket)
        real_rows.append(bucket.rows.index_select(0, bucket.real))
        first = last
    flat = torch.empty_like(rows)
    if real_rows:
        flat[torch.cat(real_rows)] = rows
    return Sequences(positions, tuple(buckets), flat)


def _bucket(offsets: Tensor, lengths: Tensor, members: Tensor, longest: int) -> Bucket:
    steps = torch.arange(longest, device=offsets.device)
    ends = lengths[members][:, None]
    rows = offsets[members][:, None] + torch.minimum(steps, ends - 1)
    return Bucket(rows.flatten(), (steps < ends).flatten().nonzero()[:, 0], len(members))


@torch.library.custom_op("dwiml_func::one_bucket", mutates_args=())
def _one_bucket(offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """All sequences in one bucket, as an operator: the longest is not known when a graph is traced."""
    lengths = offsets.diff().clamp(min=1)
    starts = offsets[:-1].clamp(max=max(num_rows - 1, 0))
    longest = int(lengths.max())
    steps = torch.arange(longest, device=offsets.device)
    rows = starts[:, None] + torch.minimum(steps, lengths[:, None] - 1)
    real = (steps < offsets.diff()[:, None]).flatten().nonzero()[:, 0]
    return rows, real, torch.arange(num_rows, device=offsets.device)


@_one_bucket.register_fake
def _(offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    longest = torch.library.get_ctx().new_dynamic_size(min=1)
    padded = offsets.new_empty(offsets.shape[0] - 1, longest)
    return padded, offsets.new_empty(num_rows), offsets.new_empty(num_rows)


def _attend(query: Tensor, key: Tensor, value: Tensor, dropout_rate: float) -> Tensor:
    if dropout_rate == 0 and not is_transformed():
        # Twice as fast on a CPU. It has no second gradients and no vmap: under torch.func the plain operations run.
        return scaled_dot_product_attention(query, key, value, is_causal=True)
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2)
    steps = torch.arange(query.shape[-2], device=query.device)
    weights = scores.masked_fill(steps > steps[:, None], -math.inf).softmax(dim=-1)
    return dropout(weights, dropout_rate) @ value
