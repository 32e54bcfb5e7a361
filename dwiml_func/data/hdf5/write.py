"""Write datasets in the HDF5 layout of scil-vital/dwi_ml, so that a file appears whole or not at all.

The layout is that of `layout`. In this order: the dataset file; its volumes and streamlines; the file below HDF5 that
keeps write errors (HDF5 itself cannot close a file whose disk is full, and crashes the interpreter at exit).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import h5py
import numpy as np
from nibabel.affines import voxel_sizes

from dwiml_func.data.bundles import Bundles
from dwiml_func.data.grid import orientation_of
from dwiml_func.data.hdf5.consistency import disjoint_subsets
from dwiml_func.data.resampling import Resampling
from dwiml_func.files.atomic import remove_leftovers, temporary_beside

__all__ = ["WatchedFile", "new_dataset", "write_streamlines", "write_volume"]


_MOST_IN_HEADER = 4000  # values of an attribute in HDF5's first format; objects that track order store larger ones
_NOT_DEFINED = "Not defined by user"  # dwi_ml's words for an option that was left out


@contextmanager
def new_dataset(
    path: str | os.PathLike[str],
    *,
    training: Sequence[str],
    validation: Sequence[str] = (),
    testing: Sequence[str] = (),
    groups_config: Mapping[str, Mapping[str, object]],
    date: str,
    resampling: Resampling | None = None,
    overwrite: bool = False,
) -> Iterator[h5py.File]:
    """Make a dataset file: open inside the `with` block, under its name once the block ends without an error.

    Inside the block the file lies in the same folder under a hidden name. When the block raises, it is removed, and an
    existing file stays unchanged. `groups_config` is group name -> `type`, `files`, ...; `resampling` says how the
    streamlines were sampled; the same content with the same `date` gives the same bytes. The file's `flush`, and
    the end of the block, raise OSError where a write has failed.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"Expected a file name for the HDF5 dataset. Received a folder: {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"The folder of the HDF5 dataset does not exist: {path.parent}. Create it, or choose another path"
        )
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"The file exists: {path}. Choose another name, or ask to overwrite it")

    subjects = list(dict.fromkeys([*training, *validation, *testing]))
    for name in subjects:
        _check_name("subject", name)
    for problem in disjoint_subsets({"training": training, "validation": validation, "testing": testing}):
        raise ValueError(f"{problem}. Expected each subject in one subset")
    remove_leftovers(path.parent, path.name)  # as large as the dataset
    partial = temporary_beside(path)
    try:
        with closing(WatchedFile(partial, has_large_attributes=len(subjects) > _MOST_IN_HEADER)) as file:
            file.attrs["data_and_time"] = date
            file.attrs["chosen_subjs"] = subjects
            file.attrs["groups_config"] = str({name: dict(config) for name, config in groups_config.items()})
            file.attrs["training_subjs"] = list(training)
            file.attrs["validation_subjs"] = list(validation)
            file.attrs["testing_subjs"] = list(testing)
            for name in ("step_size", "nb_points", "compress"):
                option = getattr(resampling, name, None)
                file.attrs[name] = _NOT_DEFINED if option is None else option
            yield file
            file.close_and_sync()  # the rename must not reach the disk before the content
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_volume(
    subject: h5py.Group,
    name: str,
    data: np.ndarray,
    affine: np.ndarray,
    *,
    attributes: Mapping[str, object] | None = None,
    compression: int | None = None,
) -> None:
    """Write an (X, Y, Z, F) volume as float32 into a group of a subject; `affine` maps voxel centres to RAS mm.

    `compression` is a gzip level, 1 to 9; None stores the values as they are, as dwi_ml does.
    """
    if data.ndim != 4:
        raise ValueError(f"Expected a volume of shape (X, Y, Z, F) for group '{name}'. Received: {data.shape}")
    affine = _check_affine(affine, name)
    _check_name("group", name)
    is_large = any(np.asarray(value).size > _MOST_IN_HEADER for value in (attributes or {}).values())
    group = subject.create_group(name, track_order=is_large or None)
    group.attrs["type"] = "volume"
    group.attrs["affine"] = affine
    group.attrs["voxres"] = voxel_sizes(affine).astype(np.float32)
    group.attrs["nb_features"] = data.shape[-1]
    for attribute, value in (attributes or {}).items():
        group.attrs[attribute] = value
    group.create_dataset(
        "data",
        data=np.asarray(data, dtype=np.float32),
        compression=None if compression is None else "gzip",
        compression_opts=compression,
        shuffle=compression is not None,  # bytes of equal weight side by side: floats compress better
    )


def write_streamlines(
    subject: h5py.Group,
    name: str,
    points: np.ndarray,
    offsets: np.ndarray,
    *,
    affine: np.ndarray,
    dimensions: Sequence[int],
    data_per_streamline: Mapping[str, np.ndarray] | None = None,
    bundles: Bundles | None = None,
) -> None:
    """Write streamlines, (P, 3) points in voxel space with corner origin, as float32 into a group of a subject.

    `affine` maps voxel centres to RAS mm, `dimensions` is the grid's (X, Y, Z), `data_per_streamline` has (S, K)
    arrays. The lengths in mm (`euclidean_lengths`) are computed here. `bundles` become the dataset `bundle_ids` and the
    attribute `bundle_names`, which dwi_ml ignores.
    """
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"Expected points of shape (P, 3) for group '{name}'. Received: {points.shape}")
    offsets = np.asarray(offsets, dtype=np.int64)
    lengths = np.diff(offsets)
    if offsets.size == 0 or offsets[0] != 0 or offsets[-1] != len(points) or (lengths < 0).any():
        raise ValueError(
            f"Expected offsets that rise from 0 to the number of points, {len(points)}, for group '{name}'. "
            f"Received: {np.array2string(offsets, threshold=6)}"
        )
    affine = _check_affine(affine, name)
    tables = data_per_streamline or {}
    for key in tables:
        for part in key.split("/"):  # HDF5 keeps 'a/b' as 'b' in a group 'a'
            _check_name("part of a key of data per streamline", part)
        if any(other.startswith(f"{key}/") for other in tables):
            raise ValueError(f"HDF5 cannot keep data per streamline of both names {key!r} and {key}/... Rename one")
    _check_name("group", name)
    is_large = bundles is not None and len(bundles.names) > _MOST_IN_HEADER
    group = subject.create_group(name, track_order=is_large or None)
    group.attrs["type"] = "streamlines"
    group.attrs["space"] = "Space.VOX"
    group.attrs["origin"] = "Origin.TRACKVIS"  # the corner
    group.attrs["affine"] = affine.astype(np.float32)
    group.attrs["dimensions"] = np.asarray(dimensions, dtype=np.int16)
    group.attrs["voxel_sizes"] = voxel_sizes(affine).astype(np.float32)
    group.attrs["voxel_order"] = orientation_of(affine)
    per_streamline = group.create_group("data_per_streamline")
    for key, values in tables.items():
        per_streamline.create_dataset(key, data=values)
    group.create_dataset("data", data=np.asarray(points, dtype=np.float32))
    group.create_dataset("offsets", data=offsets[:-1])
    group.create_dataset("lengths", data=lengths)
    group.create_dataset("euclidean_lengths", data=_lengths_mm(points, offsets, affine))
    if bundles is not None:
        group.attrs["bundle_names"] = list(bundles.names)
        group.create_dataset("bundle_ids", data=bundles.ids.astype(np.int32))


def _check_name(what: str, name: str) -> None:
    """HDF5 takes names with '/' for paths, and cuts names at a zero byte."""
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise ValueError(f"Expected a name without '/' for a {what}, nor a zero byte. Received: {name!r}. Rename it")


def _check_affine(affine: np.ndarray, name: str) -> np.ndarray:
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4):
        raise ValueError(f"Expected an affine of shape (4, 4) for group '{name}'. Received: {affine.shape}")
    return affine


def _lengths_mm(points: np.ndarray, offsets: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(S,) float32 mm. Not `resampling.lengths_mm`, whose sums round differently: files keep their bytes."""
    steps = np.einsum("pj,ij->pi", np.diff(np.asarray(points, dtype=np.float64), axis=0), affine[:3, :3])
    travelled = np.concatenate([[0.0], np.cumsum(np.sqrt((steps**2).sum(axis=1)))])
    filled = offsets[1:] > offsets[:-1]
    lengths = np.zeros(len(offsets) - 1, dtype=np.float32)
    lengths[filled] = travelled[offsets[1:][filled] - 1] - travelled[offsets[:-1][filled]]
    return lengths


class _Sink(io.RawIOBase):
    """An unbuffered file that keeps the first error of a write and ignores all further writes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb+", buffering=0)
        self.error: OSError | None = None

    def write(self, data) -> int:
        view, done = memoryview(data).cast("B"), 0
        try:
            while done < len(view) and self.error is None:
                done += self._file.write(view[done:])
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size) if self.error is None else size or 0
        except OSError as error:
            self.error = error
            return size or 0

    def readinto(self, buffer) -> int:
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        super().close()


class WatchedFile(h5py.File):
    """A new HDF5 file. `flush` and `close_and_sync` raise the first error of any write before."""

    def __init__(self, path: Path, *, has_large_attributes: bool) -> None:
        self._sink = _Sink(path)
        super().__init__(self._sink, "w", libver=("v108", "latest") if has_large_attributes else None)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        super().flush()
        if self._sink.error is not None:
            raise self._sink.error

    def close(self) -> None:
        """Close the file; errors of writes are not raised."""
        super().close()
        self._sink.close()

    def close_and_sync(self) -> None:
        """Close the file once its bytes are on the disk."""
        super().close()
        try:
            if self._sink.error is not None:
                raise self._sink.error
            self._sink.sync()
        finally:
            self._sink.close()
