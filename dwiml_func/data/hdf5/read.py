"""Open a dataset: volumes and streamlines of one subset, in memory or lazily, checked on the way in."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dwiml_func._checks import at_most_three, check_choice
from dwiml_func.data.bundles import Bundles, join_bundles
from dwiml_func.data.dataset import DatasetIndex, StreamlineDataset
from dwiml_func.data.grid import Grid, shear_of
from dwiml_func.data.hdf5.cache_size import parse_bytes
from dwiml_func.data.hdf5.consistency import (
    Volume,
    connectivity_fits,
    copied_streamlines,
    disjoint_subsets,
    same_volumes,
    separate_streamlines,
    subjects_of,
    volume_attributes,
)
from dwiml_func.data.hdf5.grid import read_grid, same_grid, streamline_grid, voxel_sizes_of
from dwiml_func.data.hdf5.layout import (
    Subset,
    Table,
    group_of,
    read_bundles,
    read_lengths_mm,
    read_points,
    read_resampling,
    read_table,
    read_volume,
    subject_group,
    volume_shape,
)
from dwiml_func.data.hdf5.lazy import FileVersion, LazyStreamlines, LazyVolumes
from dwiml_func.data.hdf5.problems import open_hdf5, raise_first, source_files
from dwiml_func.data.streamlines import Streamlines, offsets_of

if TYPE_CHECKING:
    import h5py

__all__ = ["Subset", "open_dataset", "read_subsets"]

_log = logging.getLogger(__name__)


def read_subsets(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Read which subjects are for training, validation and testing.

    Args:
        path: the HDF5 file.

    Returns:
        Subject names under "training", "validation" and "testing"; empty where the file lists none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not HDF5, or it is corrupt, or a subset lists a subject twice.

    Example:
        >>> import tempfile
        >>> from dwiml_func.data.hdf5.write import new_dataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "data.hdf5"
        ...     with new_dataset(path, training=["anna"], groups_config={}, date="today"):
        ...         pass
        ...     read_subsets(path)
        {'training': ('anna',), 'validation': (), 'testing': ()}
    """
    with open_hdf5(Path(path)) as file:
        return _subsets(file)


def _subsets(file: h5py.File) -> dict[str, tuple[str, ...]]:
    return {subset: raise_first(subjects_of(file, subset), file.filename) for subset in get_args(Subset)}


def open_dataset(
    path: str | os.PathLike[str],
    subset: Subset = "training",
    *,
    input_group_name: str = "input",
    streamline_group_name: str = "streamlines",
    lazy: bool = False,
    cache_size: str | int = "2GB",
) -> StreamlineDataset:
    """Read the input volumes and the streamlines of one subset into memory, or find out where they are.

    Args:
        path: the HDF5 file.
        subset: "training", "validation" or "testing".
        input_group_name: the subjects' group of type `volume` that models take as input.
        streamline_group_name: the subjects' group of type `streamlines`.
        lazy: read only the tables that say where each streamline is; volumes and points are read, and checked for NaN
            and infinity, when a batch needs them. The batches have the same bytes.
        cache_size: how much memory the volumes of lazy datasets may keep in each process, in bytes or as text.

    Returns:
        The dataset; without subjects where the file lists none for validation or testing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not HDF5, or corrupt; there are no training subjects, or no training streamlines; a subject,
            group, dataset or attribute is missing or of another kind; streamlines are not in voxel space with corner
            origin, or not on the volume's grid; a value is NaN or infinite; a streamline has fewer than two points.

    Example:
        >>> import tempfile
        >>> from dwiml_func.data.hdf5.write import new_dataset, write_streamlines, write_volume
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "data.hdf5"
        ...     with new_dataset(path, training=["anna"], groups_config={}, date="today") as file:
        ...         anna = file.create_group("anna")
        ...         write_volume(anna, "input", np.ones((9, 9, 9, 28)), np.eye(4))
        ...         points, offsets = np.ones((5, 3)), np.array([0, 3, 5])
        ...         write_streamlines(
        ...             anna, "streamlines", points, offsets, affine=np.eye(4), dimensions=(9, 9, 9)
        ...         )
        ...     dataset = open_dataset(path)
        >>> dataset.index.subjects, dataset.num_features, dataset.streamlines.lengths.tolist()
        (('anna',), 28, [3, 2])
    """
    path = Path(path)
    check_choice("subset", subset, get_args(Subset))
    budget = parse_bytes(cache_size)
    with open_hdf5(path) as file:
        subjects = raise_first(subjects_of(file, subset, required=subset == "training"), path)
        subsets = _subsets(file)
        raise_first(disjoint_subsets(subsets), path)
        raise_first(separate_streamlines(file, subsets, streamline_group_name), path)
        for copied in copied_streamlines(file, subsets, streamline_group_name) if subset == "training" else ():
            _log.warning("%s: %s", path, copied)
        read = partial(_read_subject, file, input_group_name=input_group_name, streamlines=streamline_group_name)
        parts = [read(subject) for subject in subjects]
        # All subjects are compared with one: those of other subsets then agree with these too.
        first = next(iter([*subsets["training"], *subjects]), "")
        if parts and first in file:
            expected = parts[0] if first == subjects[0] else read(first)
            for subject, part in zip(subjects, parts, strict=True):
                raise_first(same_volumes(input_group_name, first, expected.common, subject, part.common), path)
        if sheared := [
            f"subject {name!r}: {fault}"
            for name, part in zip(subjects, parts, strict=True)
            if (fault := shear_of(part.grid))
        ]:
            _log.warning("%s: %s", path, at_most_three(sheared))
        index = _index(subjects, parts)
        if subset == "training" and index.num_total == 0:
            raise ValueError(f"{path}: the training subjects have no streamlines in group {streamline_group_name!r}")
        lengths = _joined([part.table.lengths for part in parts])
        if lazy:
            starts = _joined([part.table.starts for part in parts])
            version, shapes = FileVersion.of(path), tuple(part.shape for part in parts)
            volumes = LazyVolumes(version, subjects, input_group_name, shapes, budget)
            streamlines = LazyStreamlines(version, index, streamline_group_name, starts, lengths)
        else:
            volumes = tuple(torch.from_numpy(raise_first(read_volume(part.volume), path)) for part in parts)
            points = [raise_first(read_points(part.streamlines, part.table), path) for part in parts]
            all_points = torch.from_numpy(np.concatenate([np.empty((0, 3), dtype=np.float32), *points]))
            streamlines = Streamlines(all_points, offsets_of(lengths))
        linked = {name for part in parts for name in linked_files(part.volume, part.streamlines)} - {file.filename}
        return StreamlineDataset(
            path=path,
            linked=tuple(sorted(Path(name).absolute() for name in linked)),
            subset=subset,
            index=index,
            volumes=volumes,
            streamlines=streamlines,
            affine=parts[0].grid.affine if parts else None,
            voxel_sizes=torch.from_numpy(np.array([part.voxel_sizes for part in parts], np.float32).reshape(-1, 3)),
            input_attributes=_attributes([part.attributes for part in parts]),
            resampling=raise_first(read_resampling(file), path),
            bundles=_all_bundles(parts),
        )


def linked_files(*groups: h5py.Group) -> set[str]:
    """The files that hold the values of groups: their own, and the sources of virtual and of external datasets."""
    datasets: list[Any] = [group[name] for group in groups for name in ("data", "offsets", "lengths") if name in group]
    found = {entry.file.filename for entry in (*groups, *datasets)}
    return found | {str(path) for dataset in datasets for path in source_files(dataset)}


class _Subject(NamedTuple):
    """What is read of a subject before its values and points."""

    volume: h5py.Group
    streamlines: h5py.Group
    shape: tuple[int, int, int, int]
    grid: Grid
    attributes: dict[str, Any]
    voxel_sizes: NDArray[np.float32]
    table: Table
    lengths_mm: NDArray[np.float64] | None
    bundles: Bundles | None

    @property
    def common(self) -> Volume:
        """What all subjects share."""
        return Volume(self.shape[3], self.grid, self.attributes)


def _read_subject(file: h5py.File, subject: str, *, input_group_name: str, streamlines: str) -> _Subject:
    path = file.filename
    parent = raise_first(subject_group(file, subject), path)
    volume = raise_first(group_of(parent, input_group_name, "volume"), path)
    lines = raise_first(group_of(parent, streamlines, "streamlines"), path)
    shape = raise_first(volume_shape(volume), path)
    grid = raise_first(read_grid(volume, shape[:3]), path)
    attributes = raise_first(volume_attributes(volume, shape[3]), path)
    raise_first(same_grid(lines, raise_first(streamline_grid(lines), path), input_group_name, grid), path)
    sizes = raise_first(voxel_sizes_of(lines, grid), path)
    raise_first(connectivity_fits(lines, shape[:3]), path)
    table = raise_first(read_table(lines), path)
    lengths_mm = raise_first(read_lengths_mm(lines, len(table.lengths)), path)
    bundles = raise_first(read_bundles(lines, len(table.lengths)), path)
    return _Subject(volume, lines, shape, grid, attributes, sizes, table, lengths_mm, bundles)


def _attributes(of_subjects: list[dict[str, Any]]) -> dict[str, Any]:
    """Those of the first subject; what undoes the standardisation is an array of a row per subject where it differs."""
    if not of_subjects:
        return {}
    result = dict(of_subjects[0])
    for name in ("standardization_mean", "standardization_std"):
        default = 0.0 if name.endswith("mean") else 1.0
        rows = [np.atleast_1d(attributes.get(name, default)) for attributes in of_subjects]
        if any(not np.array_equal(row, rows[0]) for row in rows):
            width = max(map(len, rows))
            result[name] = np.stack([np.broadcast_to(row, width) for row in rows])
    return result


def _index(subjects: tuple[str, ...], parts: list[_Subject]) -> DatasetIndex:
    """Lengths in mm are known only where every subject has them."""
    lengths_mm = [part.lengths_mm for part in parts if part.lengths_mm is not None]
    num_streamlines = np.array([len(part.table.lengths) for part in parts], dtype=np.int64)
    all_known = 0 < len(lengths_mm) == len(parts)
    return DatasetIndex(subjects, num_streamlines, np.concatenate(lengths_mm) if all_known else None)


def _all_bundles(parts: list[_Subject]) -> Bundles | None:
    """Bundles are known only where every subject has them."""
    known = [part.bundles for part in parts if part.bundles is not None]
    return join_bundles(known) if 0 < len(known) == len(parts) else None


def _joined(tables: list[NDArray[np.int64]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *tables]))
