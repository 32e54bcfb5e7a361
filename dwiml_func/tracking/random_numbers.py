"""Random numbers for many lines at once: each row's depend on the key and on the row's own address alone.

`torch_rng` seeds a generator, whose numbers depend on how many rows were asked for before. Here a row is a counter of
a block cipher, so it is the same alone and among others, on the CPU and on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwiml_func.core.rng import Key, key_hash

__all__ = ["philox", "uniforms"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


def uniforms(key: Key, row: Tensor, step: Tensor) -> Tensor:
    """Four uniform random numbers a row.

    Args:
        key: the stream's address.
        row: (N,) int64, 0 <= row < 2**63: the number of a line or of a seed.
        step: (N,) int64, 0 <= step < 2**63: where on the line.

    Returns:
        (N, 4) float64, each 0 < u < 1, with 32 random bits.

    Example:
        >>> rows = torch.arange(5)
        >>> whole = uniforms(Key(1), rows, torch.zeros_like(rows))
        >>> torch.equal(uniforms(Key(1), rows[3:4], rows[:1]), whole[3:4])
        True
    """
    seed = key_hash(key)
    counters = torch.stack([row & _WORD, row >> 32, step & _WORD, step >> 32])
    return (philox(counters, (seed & _WORD, seed >> 32)).t().double() + 0.5) / 2.0**32


def philox(counters: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox 4x32 with ten rounds: (4, N) int64 random words of (4, N) int64 counters, all 0 <= word < 2**32.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    device = counters.device
    even, odd = counters[[0, 2]], counters[[1, 3]]
    multipliers = torch.tensor(_MULTIPLIERS, device=device)[:, None]
    words = [
        [(word + number * add) & _WORD for word, add in zip(key, _INCREMENTS, strict=True)] for number in range(10)
    ]
    for round_key in torch.tensor(words, device=device)[:, :, None].unbind():
        product = even * multipliers  # of 64 bits, wrapped into int64
        even = ((product >> 32) & _WORD).flip(0) ^ odd ^ round_key
        odd = (product & _WORD).flip(0)
    return torch.stack([even[0], odd[0], even[1], odd[1]])
