"""Changes to training streamlines that teach a model more than the data hold: splitting, reversing, noise.

All of it works on flat arrays. Each kind has its own stream of random numbers, `fold_in(key, epoch, batch, kind)`:
switching one on does not change another, and a batch is the same in whichever process it is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from dwiml_func._checks import check_number
from dwiml_func.core.rng import Key, fold_in, numpy_rng
from dwiml_func.data.streamlines import Streamlines

__all__ = ["Augmentation", "Kind", "normal_noise", "reverse_streamlines", "rng_of", "split_streamlines"]

_LEAST_HALF = 6  # points of a half of a split streamline, as in dwi_ml
_CLIP = 2.0  # noise ends at this many standard deviations


class Kind(IntEnum):
    """The kinds of augmentation. A number is never given to another kind: old runs must replay."""

    SPLIT = 0
    REVERSE = 1
    NOISE_FORWARD = 2
    NOISE_LOSS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """What is done to training streamlines; by default nothing.

    Args:
        noise_gaussian_size_forward: standard deviation, in voxels (in mm where voxels are not cubes), of the noise on
            the points from which the model computes previous directions. The input volume is read at the points without
            noise.
        noise_gaussian_size_loss: the same for the points that the targets are computed from.
        split_ratio: share of a batch's streamlines that are split in two, 0 to 1.
        reverse_ratio: share of a batch's streamlines (after splitting) that are reversed, 0 to 1.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> Augmentation() == Augmentation(split_ratio=0.0), Augmentation(reverse_ratio=0.5).needs_key
        (True, True)
    """

    noise_gaussian_size_forward: float = 0.0
    noise_gaussian_size_loss: float = 0.0
    split_ratio: float = 0.0
    reverse_ratio: float = 0.0

    def __post_init__(self) -> None:
        for name in ("noise_gaussian_size_forward", "noise_gaussian_size_loss"):
            check_number(name, getattr(self, name), at_least=0)
        for name in ("split_ratio", "reverse_ratio"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1. Received: {value}")

    @property
    def needs_key(self) -> bool:
        """Whether anything is done: everything here takes random numbers."""
        return self != Augmentation()

    def too_large_for(self, step: float, unit: str = "voxels") -> str | None:
        """Name the noise of the targets that could flip a direction: it reaches 2 standard deviations, at both ends of
        a step. Noise of the points that the model sees is another matter: a voxel of it teaches to track.

        Args:
            step: distance between two points in voxels, or in mm where voxels are not cubes.
            unit: that of the step, "voxels" or "mm".

        Returns:
            One line where the noise reaches beyond half a step; else None.

        Example:
            >>> Augmentation(noise_gaussian_size_loss=0.1).too_large_for(1.0) is None
            True
        """
        size = self.noise_gaussian_size_loss
        if _CLIP * size <= step / 2:
            return None
        return (
            f"noise_gaussian_size_loss {size:g}: noise may flip directions. It reaches {_CLIP:g} standard deviations, "
            f"more than half a step of {step:.3g} {unit}"
        )


def rng_of(key: Key, epoch: int, batch: int, kind: Kind) -> np.random.Generator:
    """A fresh generator of one kind of augmentation of one batch; `key` is of the stream `Stream.TRAIN_AUGMENT`."""
    return numpy_rng(fold_in(key, epoch, batch, kind))


def split_streamlines(lines: Streamlines, ratio: float, rng: np.random.Generator) -> tuple[Streamlines, Tensor]:
    """Cut a share of the streamlines in two at a random point, the end of one half and the start of the other.

    Both halves keep at least 6 points; streamlines too short for that stay whole. Returns the streamlines, halves side
    by side, and (S',) int64, the number in `lines` that each came from.
    """
    offsets = lines.offsets.numpy()
    lengths = np.diff(offsets)
    chosen = _choose(len(lines), ratio, rng)
    # Random numbers for short ones too: whether one splits depends on no other streamline's length.
    position = rng.random(len(chosen))
    num_cuts = lengths[chosen] - (2 * _LEAST_HALF - 2)
    fits = num_cuts > 0
    chosen, position, num_cuts = chosen[fits], position[fits], num_cuts[fits]
    cuts = offsets[chosen] + _LEAST_HALF - 1 + np.floor(position * num_cuts).astype(np.int64)

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
    """Reverse a share of the streamlines, in place in their order."""
    offsets = lines.offsets.numpy()
    reversed_ = np.zeros(len(lines), dtype=bool)
    reversed_[_choose(len(lines), ratio, rng)] = True
    rows = np.arange(len(lines.points))
    mirrored = np.repeat(offsets[:-1] + offsets[1:] - 1, np.diff(offsets)) - rows
    rows = np.where(np.repeat(reversed_, np.diff(offsets)), mirrored, rows)
    return Streamlines(lines.points.index_select(0, torch.from_numpy(rows)), lines.offsets)


def normal_noise(num_points: int, size: float, rng: np.random.Generator) -> Tensor:
    """(num_points, 3) normal noise clipped at two standard deviations; `size` is one of them, before clipping."""
    noise = rng.standard_normal((num_points, 3), dtype=np.float32)
    return torch.from_numpy(np.clip(noise, -_CLIP, _CLIP) * np.float32(size))


def _choose(num: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Numbers of `ratio * num` chosen streamlines, rising; rounded at random, as small batches would else get none."""
    count = min(num, math.floor(ratio * num + rng.random()))
    return np.sort(rng.permutation(num)[:count])
