"""Where lines start."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dwiml_func._checks import check_number
from dwiml_func.core.rng import Key, Stream, fold_in, numpy_rng
from dwiml_func.tracking.random_numbers import uniforms

__all__ = ["load_seeds", "seeds_in_mask"]

_ORDER, _PLACE = 0, 1  # of the stream's random numbers


def seeds_in_mask(mask: Tensor, *, npv: int | None = None, nt: int | None = None, key: Key, first: int = 0) -> Tensor:
    """Place seeds at random in the voxels of a mask.

    Seed k lies in voxel k modulo V of the V voxels in a random order. So every voxel has one seed before any has two,
    and a seed is the same however many others are asked for.

    Args:
        mask: (X, Y, Z); its voxels are those above 0.
        npv: seeds for each voxel.
        nt: seeds in all. Give one of both.
        key: the run's key.
        first: number of the first seed that is returned.

    Returns:
        (N, 3) float32, voxel space, corner origin.

    Raises:
        ValueError: the mask has no voxels, or neither or both of `npv` and `nt` are given.

    Source: scilpy, `SeedGenerator` (the order of voxels, one seed a voxel in turn).

    Example:
        >>> mask = torch.ones(2, 2, 2)
        >>> torch.equal(seeds_in_mask(mask, nt=100, key=Key(1))[90:], seeds_in_mask(mask, nt=10, first=90, key=Key(1)))
        True
    """
    if (npv is None) == (nt is None):
        raise ValueError(f"Expected one of npv and nt. Received: npv {npv}, nt {nt}.")
    voxels = (mask > 0).nonzero()
    if len(voxels) == 0:
        raise ValueError("The seeding mask has no voxel above 0. Choose another mask.")
    if npv is not None:
        check_number("npv", npv, at_least=1)
    else:
        check_number("nt", nt or 0, at_least=1)
    num = nt if nt is not None else (npv or 0) * len(voxels)
    key = fold_in(key, Stream.TRACK)
    order = torch.from_numpy(numpy_rng(fold_in(key, _ORDER)).permutation(len(voxels)))
    number = torch.arange(first, first + num)
    place = uniforms(fold_in(key, _PLACE), number, torch.zeros_like(number))[:, :3]
    lower = voxels.cpu()[order[number % len(voxels)]]
    # Rounding must not carry a seed into the next voxel.
    return torch.minimum((lower + place).float(), torch.nextafter((lower + 1).float(), lower.float()))


def load_seeds(path: str | os.PathLike[str]) -> Tensor:
    """Read seeds of one's own: (S, 3) numbers in numpy's format, voxel space, corner origin; as float32."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"The file of seeds does not exist: {path}.")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: expected an array in numpy's format .npy. It cannot be read ({error}).") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != 3:
        shape = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise ValueError(f"{path}: expected numbers of shape (S, 3). Received: {shape}.")
    return torch.from_numpy(array.astype(np.float32))
