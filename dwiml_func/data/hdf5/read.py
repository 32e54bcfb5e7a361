"""Read datasets in the HDF5 layout of scil-vital/dwi_ml, checked on the way in: what is read is finite and in place.

The layout, as written by its `src/dwi_ml/general/data/hdf5/hdf5_creation.py`: file attributes name the subjects of each
subset; one group a subject; in it groups of type `volume` and of type `streamlines`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dwiml_func.data.dataset import DatasetIndex, StreamlineDataset
from dwiml_func.data.hdf5.layout import (
    check_same_space,
    group_of,
    location,
    open_hdf5,
    read_lengths_mm,
    read_points,
    read_resampling,
    read_table,
    read_volume,
    subjects_of,
    to_python,
    volume_shape,
    voxel_sizes_of,
)
from dwiml_func.data.hdf5.lazy import LazyStreamlines, LazyVolumes, parse_bytes
from dwiml_func.data.streamlines import Streamlines, offsets_of

__all__ = ["Subset", "open_dataset", "read_subsets"]

Subset = Literal["training", "validation", "testing"]
"""A subset of a dataset's subjects, by name."""


def read_subsets(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Read which subjects are for training, validation and testing.

    Args:
        path: the HDF5 file.

    Returns:
        Subject names under "training", "validation" and "testing"; empty where the file lists none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not HDF5, or it is corrupt.

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
        return {subset: subjects_of(file, subset) for subset in get_args(Subset)}


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
    if subset not in get_args(Subset):
        raise ValueError(f"Expected a subset among {', '.join(get_args(Subset))}. Received: {subset!r}")
    budget = parse_bytes(cache_size)
    with open_hdf5(path) as file:
        subjects = subjects_of(file, subset)
        if not subjects and subset == "training":
            raise ValueError(f"{path} lists no training subjects: its attribute training_subjs is missing or empty")
        shapes: list[tuple[int, int, int, int]] = []
        volumes: list[NDArray[np.float32]] = []
        points: list[NDArray[np.float32]] = []
        starts: list[NDArray[np.int64]] = []
        lengths: list[NDArray[np.int64]] = []
        lengths_mm: list[NDArray[np.float64] | None] = []
        voxel_sizes: list[NDArray[np.float32]] = []
        input_attributes: dict[str, object] = {}
        resampling = read_resampling(file)
        for subject in subjects:
            input_group = group_of(file, subject, input_group_name, "volume")
            streamline_group = group_of(file, subject, streamline_group_name, "streamlines")
            shapes.append(volume_shape(input_group))
            if shapes[-1][3] != shapes[0][3]:
                raise ValueError(
                    f"{location(input_group)} has {shapes[-1][3]} features, but subject {subjects[0]} has "
                    f"{shapes[0][3]}. Expected the same number for all subjects"
                )
            if not lazy:
                volumes.append(read_volume(input_group))
            check_same_space(input_group, shapes[-1][:3], streamline_group)
            voxel_sizes.append(voxel_sizes_of(streamline_group))
            starts_of_subject, lengths_of_subject = read_table(streamline_group)
            starts.append(starts_of_subject)
            lengths.append(lengths_of_subject)
            lengths_mm.append(read_lengths_mm(streamline_group, len(lengths_of_subject)))
            if not lazy:
                points.append(read_points(streamline_group, starts_of_subject, lengths_of_subject))
            if subject == subjects[0]:
                input_attributes = {name: to_python(value) for name, value in input_group.attrs.items()}
    num_streamlines = np.array([len(of_subject) for of_subject in lengths], dtype=np.int64)
    if subset == "training" and num_streamlines.sum() == 0:
        raise ValueError(f"{path}: the training subjects have no streamlines in group {streamline_group_name!r}")
    known_lengths = [of_subject for of_subject in lengths_mm if of_subject is not None]
    index = DatasetIndex(
        subjects, num_streamlines, np.concatenate(known_lengths) if 0 < len(known_lengths) == len(subjects) else None
    )
    all_lengths = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *lengths]))
    if lazy:
        all_starts = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *starts]))
        stored_volumes = LazyVolumes(path, subjects, input_group_name, tuple(shapes), budget)
        stored_streamlines = LazyStreamlines(path, index, streamline_group_name, all_starts, all_lengths)
    else:
        all_points = torch.from_numpy(np.concatenate([np.empty((0, 3), dtype=np.float32), *points]))
        stored_volumes = tuple(torch.from_numpy(volume) for volume in volumes)
        stored_streamlines = Streamlines(all_points, offsets_of(all_lengths))
    return StreamlineDataset(
        path=path,
        subset=subset,
        index=index,
        volumes=stored_volumes,
        streamlines=stored_streamlines,
        voxel_sizes=torch.from_numpy(np.array(voxel_sizes, dtype=np.float32).reshape(-1, 3)),
        input_attributes=input_attributes,
        resampling=resampling,
    )
