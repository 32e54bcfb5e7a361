"""Volumes and streamlines that stay in the HDF5 file until a batch needs them.

In this order: the two lazy sources of a dataset; how rows of points are read; what a process holds (a few open files,
and volumes up to a number of bytes). Sources that are pickled, or inherited by a fork, carry only where the data are.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dwiml_func._checks import pluralize
from dwiml_func.data.dataset import DatasetIndex
from dwiml_func.data.hdf5.layout import read_volume, streamlines_that
from dwiml_func.data.hdf5.problems import corrupt_file, raise_first
from dwiml_func.data.streamlines import Streamlines, as_ids, offsets_of

if TYPE_CHECKING:
    import h5py

__all__ = ["FileVersion", "LazyStreamlines", "LazyVolumes"]

_MOST_OPEN_FILES = 8


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LazyVolumes:
    """The input volumes of all subjects, by row. A process keeps the last used ones.

    `shapes` has (X, Y, Z, F) of each subject. `cache_bytes` is how many bytes of volumes a process keeps, for all lazy
    datasets together; a larger volume is read again for every batch.
    """

    version: FileVersion
    subjects: tuple[str, ...]
    group_name: str
    shapes: tuple[tuple[int, int, int, int], ...]
    cache_bytes: int

    def __repr__(self) -> str:
        return f"<LazyVolumes: {pluralize(len(self), 'volume')}, {pluralize(self.num_features, 'feature')}>"

    @property
    def num_features(self) -> int:
        """F, the same for all; 0 without subjects."""
        return self.shapes[0][3] if self.shapes else 0

    def __len__(self) -> int:
        return len(self.subjects)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> Tensor:
        num_bytes = 4 * int(np.prod(self.shapes[row], dtype=np.int64))
        return _store.volume(self.version, self.subjects[row], self.group_name, num_bytes, self.cache_bytes)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LazyStreamlines:
    """The streamlines of all subjects, by id. `select` reads those it is asked for and no others.

    `starts` (S,) int64 is each streamline's first row among its subject's stored points, `lengths` (S,) int64 its
    number of points.
    """

    version: FileVersion
    index: DatasetIndex
    group_name: str
    starts: Tensor
    lengths: Tensor
    addresses: dict[int, int | None] = field(default_factory=dict)  # by subject, where its points lie as plain bytes

    def __repr__(self) -> str:
        num_points = int(self.lengths.sum())
        return f"<LazyStreamlines: {pluralize(len(self), 'streamline')}, {pluralize(num_points, 'point')}>"

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def offsets(self) -> Tensor:
        """(S + 1,) int64, of the points of all streamlines."""
        return offsets_of(self.lengths)

    @property
    def points(self) -> Tensor:
        """(P, 3) float32: all points, read now."""
        return self.select(np.arange(len(self))).points

    def to_list(self) -> list[Tensor]:
        """One (N_i, 3) tensor a streamline, read now."""
        return self.select(np.arange(len(self))).to_list()

    def select(self, ids: Tensor | ArrayLike) -> Streamlines:
        """Read streamlines, in the order asked for: the same bytes as those of a dataset in memory.

        Raises:
            IndexError: an id is out of range.
            ValueError: a point is NaN or infinite; the file is corrupt, or has changed since the dataset was opened.
        """
        numbers = as_ids(ids).numpy()
        lengths = self.lengths.index_select(0, torch.from_numpy(numbers))
        offsets = offsets_of(lengths)
        points = np.empty((int(offsets[-1]), 3), dtype=np.float32)
        subjects = self.index.subject_of(numbers)
        starts = self.starts.numpy()[numbers]
        rows, sizes = offsets.tolist(), lengths.tolist()
        # In the order of the file, and each subject's group is looked up once.
        order = np.lexsort([starts, subjects]).tolist()
        with _store.open(self.version) as file:
            readers = {subject: self._reader(file, subject, points) for subject in np.unique(subjects).tolist()}
            for i in order:
                readers[subjects[i]](int(starts[i]), sizes[i], rows[i])
            if not np.isfinite(points).all():
                self._raise_not_finite(file, numbers, subjects, offsets.numpy(), points)
        return Streamlines(torch.from_numpy(points), offsets)

    def _reader(self, file: h5py.File, subject: int, out: np.ndarray) -> _ReadRows:
        group = partial(_known_group, file, self.index.subjects[subject], self.group_name)
        if subject not in self.addresses:
            self.addresses[subject] = _address_of(file, group()["data"])
        address = self.addresses[subject]
        return _hdf5_reader(group()["data"], out) if address is None else _byte_reader(file, address, out)

    def _raise_not_finite(self, file: h5py.File, ids: Any, subjects: Any, offsets: Any, points: Any) -> None:
        """Name the first streamline that is not finite: its subject, and its number among the subject's."""
        bad = np.logical_or.reduceat(~np.isfinite(points).all(axis=1), offsets[:-1])
        subject = int(subjects[np.argmax(bad)])
        numbers = self.index.num_streamlines
        marked = np.zeros(numbers[subject], dtype=bool)
        marked[(ids - numbers[:subject].sum())[bad & (subjects == subject)]] = True
        group = _known_group(file, self.index.subjects[subject], self.group_name)
        raise_first(streamlines_that(group, marked, "have NaN or infinite points"), file.filename)


_ReadRows = Callable[[int, int, int], None]
"""`read(start, num, row)` reads `num` rows from `start` of the file on to the rows of an array from `row` on."""


def _address_of(file: h5py.File, points: Any) -> int | None:
    """Where a dataset begins in the file, if it lies there as the bytes of a float32 array; else None."""
    plain = (
        file.driver == "sec2"
        and points.file.filename == file.filename
        and points.external is None
        and points.dtype == np.float32  # of this machine's byte order
    )
    return points.id.get_offset() if plain else None


def _byte_reader(file: h5py.File, address: int, out: np.ndarray) -> _ReadRows:
    """Read rows of 12 bytes past the HDF5 library, which takes several times as long to find them."""
    descriptor = file.id.get_vfd_handle()

    def read(start: int, num: int, row: int) -> None:
        wanted: Any = out[row : row + num]  # contiguous, so the bytes of the rows are one piece
        if os.preadv(descriptor, [wanted], address + 12 * start) != 12 * num:
            raise corrupt_file(file.filename, "the file ends before its points")

    return read


def _hdf5_reader(points: Any, out: np.ndarray) -> _ReadRows:
    """Read rows that are compressed, or of another type, by h5py's low level, several times faster than its slicing."""
    from h5py import h5s, h5t

    stored, wanted, dtype = points.id.get_space(), h5s.create_simple(out.shape), h5t.py_create(out.dtype)

    def read(start: int, num: int, row: int) -> None:
        stored.select_hyperslab((start, 0), (num, 3))
        wanted.select_hyperslab((row, 0), (num, 3))
        points.id.read(wanted, stored, out, dtype)

    return read


def _known_group(file: h5py.File, subject: str, name: str) -> Any:
    """A group that was checked when the dataset was opened."""
    return file[f"{subject}/{name}"]


class FileVersion(NamedTuple):
    """A file as it was when the dataset was opened: another process must not read another one under its name."""

    path: Path
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileVersion:
        path = path.absolute()
        status = path.stat()
        return cls(path, status.st_ino, status.st_size, status.st_mtime_ns)


class _ProcessStore:
    """What one process holds: open files, and volumes in the order of their last use."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.files: OrderedDict[FileVersion, h5py.File] = OrderedDict()
        self.volumes: OrderedDict[tuple[FileVersion, str, str], Tensor] = OrderedDict()
        self.volume_bytes = 0

    @contextmanager
    def open(self, version: FileVersion) -> Iterator[h5py.File]:
        """The open file; no other thread reads meanwhile."""
        import h5py

        with self.lock:
            if version not in self.files:
                if FileVersion.of(version.path) != version:
                    raise ValueError(f"The HDF5 file has changed since it was opened: {version.path}. Open it again")
                while len(self.files) >= _MOST_OPEN_FILES:
                    self.files.popitem(last=False)[1].close()
                self.files[version] = h5py.File(version.path, "r")
            self.files.move_to_end(version)
            try:
                yield self.files[version]
            except (OSError, RuntimeError, KeyError) as error:
                raise corrupt_file(version.path, error) from error

    def volume(self, version: FileVersion, subject: str, group: str, num_bytes: int, budget: int) -> Tensor:
        """A volume, from memory or read; the least recently used ones are dropped to keep within the budget."""
        key = (version, subject, group)
        with self.lock:
            if key not in self.volumes:
                while self.volumes and self.volume_bytes + num_bytes > budget:
                    self.volume_bytes -= self.volumes.popitem(last=False)[1].nbytes
                with self.open(version) as file:
                    volume = torch.from_numpy(
                        raise_first(read_volume(_known_group(file, subject, group)), version.path)
                    )
                if num_bytes > budget:
                    return volume
                self.volumes[key] = volume
                self.volume_bytes += num_bytes
            self.volumes.move_to_end(key)
            return self.volumes[key]


_store = _ProcessStore()
_inherited: list[_ProcessStore] = []


def _reset_store() -> None:
    """In a forked child: the parent's HDF5 handles must be neither used nor closed, and its lock may be held."""
    global _store
    _inherited.append(_store)
    _store.volumes = OrderedDict()
    _store = _ProcessStore()


os.register_at_fork(after_in_child=_reset_store)
