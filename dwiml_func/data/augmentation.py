"""Changes to training streamlines that teach a model more than the data hold: splitting, reversing, noise.

All of it works on flat arrays. Each kind draws from a stream of its own, `fold_in(key, epoch, batch, kind)`, so that
switching one on does not change what another draws, and a batch is the same whoever loads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from dwiml_func.core.rng import Key, fold_in, numpy_rng
from dwiml_func.data.streamlines import Streamlines

__all__ = ["Augmentation", "Kind", "add_noise", "reverse_streamlines", "rng_of", "split_streamlines"]

_LEAST_HALF = 6  # points of a half of a split streamline, as in dwi_ml
_CLIP = 2.0  # noise ends at this many standard deviations


class Kind(IntEnum):
    """The kinds of augmentation. A number, once given, is never given to another kind: old runs must replay.

    Example:
        >>> int(Kind.SPLIT)
        0
    """

    SPLIT = 0
    REVERSE = 1
    NOISE_FORWARD = 2
    NOISE_LOSS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """What is done to training streamlines; by default nothing.

    Args:
        noise_gaussian_size_forward: standard deviation, in voxels, of the noise on the points from which the model
            computes previous directions. The input volume is read at the points without noise.
        noise_gaussian_size_loss: the same for the points that the targets are computed from.
        split_ratio: share of a batch's streamlines that are split in two, 0 to 1.
        reverse_ratio: share of a batch's streamlines (after splitting) that are reversed, 0 to 1.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> Augmentation() == Augmentation(split_ratio=0.0), Augmentation(reverse_ratio=0.5).draws
        (True, True)
    """

    noise_gaussian_size_forward: float = 0.0
    noise_gaussian_size_loss: float = 0.0
    split_ratio: float = 0.0
    reverse_ratio: float = 0.0

    def __post_init__(self) -> None:
        for name in ("noise_gaussian_size_forward", "noise_gaussian_size_loss"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise ValueError(f"{name}: expected a finite number of at least 0 voxels. Received: {value}")
        for name in ("split_ratio", "reverse_ratio"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1. Received: {value}")

    @property
    def draws(self) -> bool:
        """Whether anything is done, so that a key is needed."""
        return self != Augmentation()

    def too_large_for(self, step: float) -> str | None:
        """Say which noise could turn a step around: it reaches 2 standard deviations, at both ends of a step.

        Args:
            step: distance between two points in voxels.

        Returns:
            One line where a noise reaches beyond half a step; else None.

        Example:
            >>> Augmentation(noise_gaussian_size_loss=0.1).too_large_for(1.0) is None
            True
        """
        sizes = {"forward": self.noise_gaussian_size_forward, "loss": self.noise_gaussian_size_loss}
        large = [f"noise_gaussian_size_{kind} {size:g}" for kind, size in sizes.items() if _CLIP * size > step / 2]
        if not large:
            return None
        return (
            f"{' and '.join(large)}: noise reaches twice that many voxels, which is more than half a step of "
            f"{step:.3g} voxels and may turn directions around. A tenth of the step is usual"
        )


def rng_of(key: Key, epoch: int, batch: int, kind: Kind) -> np.random.Generator:
    """Make the generator of one kind of augmentation of one batch.

    Args:
        key: of the stream `Stream.TRAIN_AUGMENT`.
        epoch: 0 for the first.
        batch: the batch's position in the epoch.
        kind: which kind.

    Returns:
        A fresh generator.

    Example:
        >>> a, b = (rng_of(Key(1), 0, 7, kind).random() for kind in (Kind.SPLIT, Kind.REVERSE))
        >>> a == b
        False
    """
    return numpy_rng(fold_in(key, epoch, batch, kind))


def split_streamlines(lines: Streamlines, ratio: float, rng: np.random.Generator) -> tuple[Streamlines, Tensor]:
    """Cut some streamlines in two at a random point, which becomes the end of one half and the start of the other.

    Both halves keep at least 6 points. A streamline too short for that stays whole.

    Args:
        lines: S streamlines.
        ratio: share of streamlines that are chosen, 0 to 1.
        rng: draws.

    Returns:
        S' >= S streamlines, halves side by side in the place of the whole; (S',) int64, the number in `lines` that each
        came from. No segment is lost: P' - S' = P - S.

    Example:
        >>> halves, origin = split_streamlines(Streamlines.from_list([np.ones((20, 3))]), 1.0, np.random.default_rng(1))
        >>> len(halves), origin.tolist(), int(halves.lengths.sum())
        (2, [0, 0], 21)
    """
    offsets = lines.offsets.numpy()
    lengths = np.diff(offsets)
    chosen = _choose(len(lines), ratio, rng)
    # Drawn for short ones too: whether one splits depends on no other streamline's length.
    place = rng.random(len(chosen))
    num_places = lengths[chosen] - (2 * _LEAST_HALF - 2)
    fits = num_places > 0
    chosen, place, num_places = chosen[fits], place[fits], num_places[fits]
    cuts = offsets[chosen] + _LEAST_HALF - 1 + np.floor(place * num_places).astype(np.int64)

    repeats = np.ones(len(lines.points), dtype=np.int64)
    repeats[cuts] = 2
    times = np.ones(len(lines), dtype=np.int64)
    times[chosen] = 2
    new_lengths = np.repeat(lengths, times)
    first = (np.cumsum(times) - times)[chosen]
    new_lengths[first] = cuts - offsets[chosen] + 1
    new_lengths[first + 1] = offsets[chosen + 1] - cuts
    rows = torch.from_numpy(np.repeat(np.arange(len(repeats)), repeats))
    new_offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(new_lengths)]))
    return Streamlines(lines.points.index_select(0, rows), new_offsets), torch.from_numpy(
        np.repeat(np.arange(len(lines)), times)
    )


def reverse_streamlines(lines: Streamlines, ratio: float, rng: np.random.Generator) -> Streamlines:
    """Turn some streamlines around.

    Args:
        lines: S streamlines.
        ratio: share of streamlines that are chosen, 0 to 1.
        rng: draws.

    Returns:
        The same streamlines in the same order, some of them from their last point to their first.

    Example:
        >>> lines = Streamlines.from_list([[[0, 0, 0], [1, 0, 0], [3, 0, 0]]])
        >>> reverse_streamlines(lines, 1.0, np.random.default_rng(1)).points[:, 0].tolist()
        [3.0, 1.0, 0.0]
    """
    offsets = lines.offsets.numpy()
    reversed_ = np.zeros(len(lines), dtype=bool)
    reversed_[_choose(len(lines), ratio, rng)] = True
    rows = np.arange(len(lines.points))
    mirrored = np.repeat(offsets[:-1] + offsets[1:] - 1, np.diff(offsets)) - rows
    rows = np.where(np.repeat(reversed_, np.diff(offsets)), mirrored, rows)
    return Streamlines(lines.points.index_select(0, torch.from_numpy(rows)), lines.offsets)


def add_noise(points: Tensor, size: float, rng: np.random.Generator) -> Tensor:
    """Move points by normal noise that is clipped at two standard deviations.

    Args:
        points: (P, 3) float32, voxel space.
        size: standard deviation before clipping, in voxels; after it, it is 0.959 times that.
        rng: draws.

    Returns:
        (P, 3) float32, new memory.

    Example:
        >>> noisy = add_noise(torch.zeros(1000, 3), 0.5, np.random.default_rng(1))
        >>> noisy.abs().max().item()
        1.0
    """
    noise = rng.standard_normal(tuple(points.shape), dtype=np.float32)
    return points + torch.from_numpy(np.clip(noise, -_CLIP, _CLIP) * np.float32(size))


def _choose(num: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Numbers of the streamlines that are chosen, in rising order: `ratio * num` of them, rounded by chance.

    Always rounding down would never choose any of a small batch.
    """
    count = min(num, math.floor(ratio * num + rng.random()))
    return np.sort(rng.permutation(num)[:count])
