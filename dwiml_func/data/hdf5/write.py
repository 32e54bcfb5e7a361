"""A file for HDF5 to write that never fails under it, and tells afterwards.

HDF5 cannot close a file whose disk is full: what it could not write stays in its cache, and it tries again until the
interpreter crashes at exit. So errors are kept here, and raised where Python can act on them.

Write datasets in the HDF5 layout of scil-vital/dwi_ml, so that a file appears whole or not at all.

The layout (its `src/dwi_ml/general/data/hdf5/hdf5_creation.py`): file attributes name the subjects of each subset
and how the file was made; one group a subject; in it one group for each volume and for each tractogram.
"""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import h5py
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import aff2axcodes

__all__ = ["WatchedFile", "new_dataset", "write_streamlines", "write_volume"]


class _Sink(io.RawIOBase):
    """An unbuffered file that keeps the first error of a write, and takes all further writes as done."""

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
    """A new HDF5 file. `flush`, and `close_and_sync`, raise what went wrong in any write before.

    Args:
        path: where; nothing may be there.

    Raises:
        OSError: a file is there, or cannot be made.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = WatchedFile(Path(folder) / "a.hdf5")
        ...     file["numbers"] = [1, 2, 3]
        ...     file.flush()
        ...     file.close_and_sync()
        ...     h5py.is_hdf5(Path(folder) / "a.hdf5")
        True
    """

    def __init__(self, path: Path) -> None:
        self._sink = _Sink(path)
        super().__init__(self._sink, "w")

    def flush(self) -> None:
        """Hand everything to the operating system.

        Raises:
            OSError: this write or one before failed.
        """
        super().flush()
        if self._sink.error is not None:
            raise self._sink.error

    def close(self) -> None:
        """Close the file, without a word about what went wrong."""
        super().close()
        self._sink.close()

    def close_and_sync(self) -> None:
        """Close the file once its bytes are on the disk.

        Raises:
            OSError: this write or one before failed.
        """
        super().close()
        try:
            if self._sink.error is not None:
                raise self._sink.error
            self._sink.sync()
        finally:
            self._sink.close()


_NOT_DEFINED = "Not defined by user"  # the reference's words for an option that was left out


@contextmanager
def new_dataset(
    path: str | os.PathLike[str],
    *,
    training: Sequence[str],
    validation: Sequence[str] = (),
    testing: Sequence[str] = (),
    groups_config: Mapping[str, Mapping[str, object]],
    date: str,
    step_size: float | None = None,
    nb_points: int | None = None,
    compress: float | None = None,
    overwrite: bool = False,
) -> Iterator[h5py.File]:
    """Make a dataset file: open inside the `with` block, in place under its name once the block ends without an error.

    Inside the block the file lies in the same folder under a hidden name. When the block raises, it is removed, and a
    file that was there before stays as it was.

    Args:
        path: where the file shall appear.
        training: names of the training subjects.
        validation: names of the validation subjects.
        testing: names of the testing subjects.
        groups_config: what each group was made from: group name -> `type`, `files`, `standardization`, ...
        date: text for the attribute `data_and_time` (the reference's spelling). The same content with the same date
            gives the same bytes.
        step_size: resampling step in mm, None when streamlines were not resampled to a step.
        nb_points: points a streamline, None when streamlines were not resampled to a number of points.
        compress: maximal error of compression in mm, None when streamlines were not compressed.
        overwrite: replace an existing file.

    Yields:
        The open file; the subset attributes are written, the subjects' groups are for the caller to add. Its `flush`
        raises OSError when something could not be written, e.g. on a full disk; so does the end of the block.

    Raises:
        FileNotFoundError: the folder does not exist.
        FileExistsError: the file exists and `overwrite` is False.
        IsADirectoryError: the path is a folder.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "data.hdf5"
        ...     with new_dataset(path, training=["anna"], groups_config={}, date="today") as file:
        ...         write_volume(file.create_group("anna"), "t1", np.ones((2, 2, 2, 1)), np.eye(4))
        ...     with h5py.File(path) as file:
        ...         list(file["anna"])
        ['t1']
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

    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with closing(WatchedFile(partial)) as file:
            file.attrs["data_and_time"] = date
            file.attrs["chosen_subjs"] = list(dict.fromkeys([*training, *validation, *testing]))
            file.attrs["groups_config"] = str({name: dict(config) for name, config in groups_config.items()})
            file.attrs["training_subjs"] = list(training)
            file.attrs["validation_subjs"] = list(validation)
            file.attrs["testing_subjs"] = list(testing)
            options = {"step_size": step_size, "nb_points": nb_points, "compress": compress}
            for name, option in options.items():
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
    """Write one volume group of a subject.

    Args:
        subject: the subject's group in an open file.
        name: the volume group's name, e.g. "input".
        data: (X, Y, Z, F), written as float32.
        affine: (4, 4) from voxel indices (a voxel's centre at integers) to RAS mm.
        attributes: further attributes of the group, beside the layout's own.
        compression: gzip level 1..9; None stores the volume plainly, as the reference does.

    Raises:
        ValueError: the volume does not have four dimensions, or the affine is not (4, 4).

    Example:
        >>> with h5py.File("any", "w", driver="core", backing_store=False) as file:
        ...     write_volume(file.create_group("anna"), "input", np.zeros((5, 4, 3, 2)), np.diag([2.0, 2, 2, 1]))
        ...     int(file["anna/input"].attrs["nb_features"]), file["anna/input"].attrs["voxres"].tolist()
        (2, [2.0, 2.0, 2.0])
    """
    if data.ndim != 4:
        raise ValueError(f"Expected a volume of shape (X, Y, Z, F) for group '{name}'. Received: {data.shape}")
    affine = _check_affine(affine, name)
    group = subject.create_group(name)
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
) -> None:
    """Write one streamline group of a subject.

    The lengths in mm (`euclidean_lengths`) are computed here: sums of the distances between points, with the
    affine's linear part applied.

    Args:
        subject: the subject's group in an open file.
        name: the streamline group's name, e.g. "streamlines".
        points: (P, 3), voxel space, corner origin (voxel i covers [i, i + 1)); written as float32.
        offsets: (S + 1,) integers; streamline s is points[offsets[s]:offsets[s + 1]].
        affine: (4, 4) from voxel indices (a voxel's centre at integers) to RAS mm.
        dimensions: (X, Y, Z) of the grid.
        data_per_streamline: name -> (S, K) array.

    Raises:
        ValueError: points or affine of a wrong shape, or offsets that do not run from 0 to P without a step back.

    Example:
        >>> points = np.array([[1.0, 1, 1], [2, 1, 1], [3, 1, 1], [5, 5, 5], [5, 6, 5]])
        >>> with h5py.File("any", "w", driver="core", backing_store=False) as file:
        ...     write_streamlines(file.create_group("anna"), "streamlines", points, np.array([0, 3, 5]),
        ...                       affine=np.diag([2.0, 2, 2, 1]), dimensions=(9, 9, 9))
        ...     file["anna/streamlines/lengths"][:].tolist()
        ...     file["anna/streamlines/euclidean_lengths"][:].tolist()
        [3, 2]
        [4.0, 2.0]
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
    group = subject.create_group(name)
    group.attrs["type"] = "streamlines"
    group.attrs["space"] = "Space.VOX"
    group.attrs["origin"] = "Origin.TRACKVIS"  # the corner
    group.attrs["affine"] = affine.astype(np.float32)
    group.attrs["dimensions"] = np.asarray(dimensions, dtype=np.int16)
    group.attrs["voxel_sizes"] = voxel_sizes(affine).astype(np.float32)
    group.attrs["voxel_order"] = "".join(aff2axcodes(affine))
    per_streamline = group.create_group("data_per_streamline")
    for key, values in (data_per_streamline or {}).items():
        per_streamline.create_dataset(key, data=values)
    group.create_dataset("data", data=np.asarray(points, dtype=np.float32))
    group.create_dataset("offsets", data=offsets[:-1])
    group.create_dataset("lengths", data=lengths)
    group.create_dataset("euclidean_lengths", data=_lengths_mm(points, offsets, affine))


def _check_affine(affine: np.ndarray, name: str) -> np.ndarray:
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4):
        raise ValueError(f"Expected an affine of shape (4, 4) for group '{name}'. Received: {affine.shape}")
    return affine


def _lengths_mm(points: np.ndarray, offsets: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(S,) float32: travel along all points at once, then take each streamline's end less its start."""
    steps = np.einsum("pj,ij->pi", np.diff(np.asarray(points, dtype=np.float64), axis=0), affine[:3, :3])
    travelled = np.concatenate([[0.0], np.cumsum(np.sqrt((steps**2).sum(axis=1)))])
    filled = offsets[1:] > offsets[:-1]
    lengths = np.zeros(len(offsets) - 1, dtype=np.float32)
    lengths[filled] = travelled[offsets[1:][filled] - 1] - travelled[offsets[:-1][filled]]
    return lengths
