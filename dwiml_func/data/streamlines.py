"""Streamlines as flat arrays: all points in one tensor, and offsets that say where each streamline starts.

Streamline `s` is `points[offsets[s]:offsets[s + 1]]`. Everything computed along streamlines is index
arithmetic on these two tensors, on any device. Lists of streamlines exist only in `Streamlines.from_list` and
`Streamlines.to_list`.

Two lengths appear everywhere: `P` points, and `P - S` rows that belong to *all points but the last of each
streamline*, the points that have a next direction to learn. `input_offsets` turns the offsets of arrays of
the first length into offsets of the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dwiml_func._checks import pluralize

__all__ = [
    "Streamlines",
    "as_ids",
    "consecutive_rows",
    "directions",
    "input_offsets",
    "input_rows",
    "join_streamlines",
    "offsets_of",
    "pieces",
    "previous_directions",
    "scale_streamlines",
]


def offsets_of(lengths: Tensor) -> Tensor:
    """(S + 1,) int64 offsets of streamlines of these lengths. Counted in int64, as short dtypes overflow."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int64, out=offsets[1:])
    return offsets


def as_ids(ids: Tensor | ArrayLike) -> Tensor:
    """(S,) int64 numbers; TypeError for a mask or fractions, which are no numbers of streamlines."""
    given = ids if isinstance(ids, Tensor) else np.array(ids)  # copied: torch warns when it wraps a read-only array
    kind = str(given.dtype).removeprefix("torch.")
    if len(given) > 0 and not kind.startswith(("int", "uint")):
        hint = ". A mask is made into numbers by `mask.nonzero()[0]`" if kind == "bool" else ""
        raise TypeError(f"Expected integers as numbers of streamlines. Received: {kind}{hint}")
    return (given if isinstance(given, Tensor) else torch.from_numpy(given.astype(np.int64))).to(torch.int64)


def input_offsets(offsets: Tensor) -> Tensor:
    """Offsets of the flat arrays that hold all points but the last of each streamline.

    Args:
        offsets: (S + 1,) int64, of arrays with a row for every point.

    Returns:
        (S + 1,) int64, of arrays with P - S rows.

    Example:
        >>> input_offsets(torch.tensor([0, 3, 5]))
        tensor([0, 2, 3])
    """
    return offsets - torch.arange(len(offsets), device=offsets.device)


def input_rows(offsets: Tensor, num_points: int) -> Tensor:
    """(P - S,) int64 rows of all points but the last of each streamline, in flat order.

    `num_points` is P: reading it from an accelerator's `offsets` would wait for the device.
    """
    num_rows = num_points - (len(offsets) - 1)
    return torch.arange(num_rows, device=offsets.device) + _streamline_of(input_offsets(offsets), num_rows)


def directions(points: Tensor, offsets: Tensor) -> Tensor:
    """Differences between each point and the next one of the same streamline.

    Args:
        points: (P, 3) float, any space.
        offsets: (S + 1,) int64; every streamline has at least one point.

    Returns:
        (P - S, 3), in the points' own space and dtype, not normalised.

    Example:
        >>> points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 2, 0], [5, 5, 5], [5, 5, 6]])
        >>> directions(points, torch.tensor([0, 3, 5])).tolist()
        [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]
    """
    differences = points[1:] - points[:-1]  # also from each streamline to the next one: these are left out
    return differences.index_select(0, input_rows(offsets, len(points)))


def previous_directions(dirs: Tensor, dir_offsets: Tensor, num: int) -> Tensor:
    """The directions that led to each point, zeros where the streamline had not begun.

    Args:
        dirs: (P - S, 3) float, as made by `directions`: row i is the direction that *leaves* its point.
        dir_offsets: (S + 1,) int64, as made by `input_offsets`.
        num: number of previous directions, at least 0.

    Returns:
        (P - S, 3 * num), in the dtype of `dirs`: the direction that arrives at the point first, then the one
        before it, and so on.

    Raises:
        ValueError: `num` is negative.

    Example:
        >>> dirs = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 1]])
        >>> previous_directions(dirs, torch.tensor([0, 2, 3]), 1).tolist()
        [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    if num < 0:
        raise ValueError(f"Expected a number of previous directions of at least 0. Received: {num}")
    rows = torch.arange(len(dirs), device=dirs.device)
    streamline_starts = dir_offsets[:-1][_streamline_of(dir_offsets, len(dirs))]
    wanted = rows[:, None] - torch.arange(1, num + 1, device=dirs.device)
    exists = wanted >= streamline_starts[:, None]
    gathered = dirs[wanted.clamp(min=0)]
    return torch.where(exists[:, :, None], gathered, torch.zeros_like(gathered)).reshape(len(dirs), 3 * num)


@dataclass(frozen=True, slots=True, eq=False)
class Streamlines:
    """A set of streamlines, flat.

    Args:
        points: (P, 3) float32; in a dataset: voxel space, corner origin.
        offsets: (S + 1,) int64, the first is 0 and the last is P.

    Example:
        >>> lines = Streamlines.from_list([[[0, 0, 0], [1, 0, 0]], [[5, 5, 5], [5, 5, 6], [5, 5, 7]]])
        >>> len(lines), lines.lengths.tolist()
        (2, [2, 3])
    """

    points: Tensor
    offsets: Tensor

    def __repr__(self) -> str:
        kind = f"{str(self.points.dtype).removeprefix('torch.')}, {self.points.device}"
        return f"<Streamlines: {pluralize(len(self), 'streamline')}, {pluralize(len(self.points), 'point')}, {kind}>"

    @classmethod
    def from_list(cls, streamlines: Iterable[ArrayLike]) -> Streamlines:
        """Join streamlines into one flat set.

        Args:
            streamlines: array-likes of shape (N_i, 3); they are copied to float32.

        Returns:
            The set, in the list's order.

        Raises:
            ValueError: an element is not of shape (N, 3).

        Example:
            >>> Streamlines.from_list([[[0, 0, 0], [1, 0, 0]]]).offsets
            tensor([0, 2])
        """
        arrays = [np.asarray(streamline, dtype=np.float32) for streamline in streamlines]
        for number, array in enumerate(arrays):
            if array.ndim != 2 or array.shape[1] != 3:
                raise ValueError(f"Expected streamlines of shape (N, 3). Received: {array.shape} at {number}")
        points = np.concatenate([np.empty((0, 3), dtype=np.float32), *arrays])
        lengths = torch.tensor([len(array) for array in arrays], dtype=torch.int64)
        return cls(torch.from_numpy(points), offsets_of(lengths))

    def to_list(self) -> list[Tensor]:
        """Cut the flat set into one tensor a streamline.

        Returns:
            S tensors of shape (N_i, 3) that share the set's memory.

        Example:
            >>> [len(line) for line in Streamlines.from_list([[[0, 0, 0]], [[1, 1, 1], [2, 2, 2]]]).to_list()]
            [1, 2]
        """
        return list(self.points.split(self.lengths.tolist()))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """(S,) int64, points a streamline."""
        return self.offsets.diff()

    def select(self, ids: Tensor | ArrayLike) -> Streamlines:
        """Gather streamlines by number, in the given order; a number may come twice.

        Args:
            ids: (S',) integers, each 0 <= id < S.

        Returns:
            A new set of S' streamlines with its own memory.

        Raises:
            IndexError: an id is out of range.
            TypeError: the ids are a mask, or fractions.

        Example:
            >>> lines = Streamlines.from_list([[[0, 0, 0]], [[1, 1, 1], [2, 2, 2]]])
            >>> lines.select([1, 0]).points.tolist()
            [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]
        """
        numbers = as_ids(ids).to(self.offsets.device)
        starts = self.offsets[:-1].index_select(0, numbers)  # unlike brackets, it refuses negative numbers
        return pieces(self.points, starts, self.lengths.index_select(0, numbers))


def consecutive_rows(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The rows from each start on, as many as its length: (P,) int64 and their (S + 1,) offsets."""
    offsets = offsets_of(lengths)
    num_rows = int(offsets[-1])
    shift = (starts - offsets[:-1])[_streamline_of(offsets, num_rows)]
    return torch.arange(num_rows, device=shift.device) + shift, offsets


def pieces(points: Tensor, starts: Tensor, lengths: Tensor) -> Streamlines:
    """Gather streamlines, each of the `consecutive_rows` from its start on."""
    rows, offsets = consecutive_rows(starts, lengths)
    return Streamlines(points[rows], offsets)


def scale_streamlines(lines: Streamlines, factors: Tensor) -> Streamlines:
    """Multiply points by factors, such as voxel sizes: (3,) for all, or (S, 3) with a row for each streamline."""
    factors = factors if factors.dim() == 1 else factors.repeat_interleave(lines.lengths, dim=0)
    return Streamlines(lines.points * factors, lines.offsets)


def join_streamlines(parts: Sequence[Streamlines]) -> Streamlines:
    """One set of several, one after the other."""
    return Streamlines(torch.cat([p.points for p in parts]), offsets_of(torch.cat([p.lengths for p in parts])))


def _streamline_of(offsets: Tensor, num_rows: int) -> Tensor:
    """(num_rows,) int64: the streamline of each row; with its size given, torch waits for no accelerator."""
    numbers = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(numbers, offsets.diff(), output_size=num_rows)
