"""Read a few rows of a large dataset of points, quickly."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import h5py

__all__ = ["RowReader", "address_of", "read_bytes"]


def address_of(file: h5py.File, points: Any) -> int | None:
    """Where a dataset begins in the file, if it lies there as the bytes of a float32 array; else None."""
    plain = (
        file.driver == "sec2"
        and file.userblock_size == 0
        and points.file.filename == file.filename
        and points.external is None
        and points.dtype == np.float32
        and points.dtype.isnative
    )
    return points.id.get_offset() if plain else None


def read_bytes(
    file: h5py.File, descriptor: int, address: int, out: np.ndarray, start: int, num: int, place: int
) -> None:
    """Read rows of 12 bytes past the HDF5 library, which takes several times as long to find them."""
    wanted: Any = out[place : place + num]  # contiguous, so the bytes of the rows are one piece
    if os.preadv(descriptor, [wanted], address + 12 * start) != 12 * num:
        raise ValueError(f"The HDF5 file is truncated or damaged: {file.filename}. Copy or create it anew")


class RowReader:
    """Reads rows of points that are compressed, or of another type, as float32 into an array.

    By h5py's low level, as its slicing costs several times the read.

    Args:
        points: the (P, 3) dataset.
        out: (N, 3) float32, contiguous.
    """

    def __init__(self, points: Any, out: np.ndarray) -> None:
        from h5py import h5s, h5t

        self._dataset = points.id
        self._stored = points.id.get_space()
        self._wanted = h5s.create_simple(out.shape)
        self._type = h5t.py_create(out.dtype)
        self._out = out

    def read(self, start: int, num: int, place: int) -> None:
        """Read `num` rows from `start` on to the rows of the array from `place` on."""
        self._stored.select_hyperslab((start, 0), (num, 3))
        self._wanted.select_hyperslab((place, 0), (num, 3))
        self._dataset.read(self._wanted, self._stored, self._out, self._type)
