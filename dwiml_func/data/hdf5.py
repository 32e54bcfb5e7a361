"""Read datasets in the HDF5 layout of scil-vital/dwi_ml, checked on the way in: what is read is finite and in place.

The layout, as written by its `src/dwi_ml/general/data/hdf5/hdf5_creation.py`: file attributes name the subjects of each
subset; one group a subject; in it groups of type `volume` and of type `streamlines`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dwiml_func.data.dataset import DatasetIndex, StreamlineDataset
from dwiml_func.data.streamlines import Streamlines, offsets_of

if TYPE_CHECKING:
    import h5py  # at run time only once a file is opened: `import dwiml_func.data` stays light

__all__ = ["Subset", "open_dataset", "read_subsets"]

Subset = Literal["training", "validation", "testing"]
"""A subset of a dataset's subjects, by name."""

_SPACES = ("space.vox", "vox")  # as dipy's Space.VOX prints, and its value
_ORIGINS = ("origin.trackvis", "trackvis", "corner")  # as dipy's Origin.TRACKVIS prints, its name and its value
_AFFINE_TOLERANCE = 1e-3  # in dipy's is_header_compatible too


def read_subsets(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Read which subjects are for training, validation and testing.

    Args:
        path: the HDF5 file.

    Returns:
        Subject names under "training", "validation" and "testing"; empty where the file lists none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not HDF5, or it is damaged.

    Example:
        >>> import tempfile
        >>> from dwiml_func.data.hdf5_write import new_dataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "data.hdf5"
        ...     with new_dataset(path, training=["anna"], groups_config={}, date="today"):
        ...         pass
        ...     read_subsets(path)
        {'training': ('anna',), 'validation': (), 'testing': ()}
    """
    with _opened(Path(path)) as file:
        return {subset: _subjects(file, subset) for subset in get_args(Subset)}


def open_dataset(
    path: str | os.PathLike[str],
    subset: Subset = "training",
    *,
    input_group_name: str = "input",
    streamline_group_name: str = "streamlines",
) -> StreamlineDataset:
    """Read the input volumes and the streamlines of one subset into memory.

    Args:
        path: the HDF5 file.
        subset: "training", "validation" or "testing".
        input_group_name: the subjects' group of type `volume` that models take as input.
        streamline_group_name: the subjects' group of type `streamlines`.

    Returns:
        The dataset; without subjects where the file lists none for validation or testing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not HDF5, or damaged; there are no training subjects, or no training streamlines; a subject,
            group, dataset or attribute is missing or of another kind; streamlines are not in voxel space with corner
            origin, or not on the volume's grid; a value is NaN or infinite; a streamline has fewer than two points.

    Example:
        >>> import tempfile
        >>> from dwiml_func.data.hdf5_write import new_dataset, write_streamlines, write_volume
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
    with _opened(path) as file:
        subjects = _subjects(file, subset)
        if not subjects and subset == "training":
            raise ValueError(f"{path} lists no training subjects: its attribute training_subjs is missing or empty")
        volumes: list[NDArray[np.float32]] = []
        points: list[NDArray[np.float32]] = []
        lengths: list[NDArray[np.int64]] = []
        voxel_sizes: list[NDArray[np.float32]] = []
        input_attributes: dict[str, object] = {}
        for subject in subjects:
            input_group = _group(file, subject, input_group_name, "volume")
            streamline_group = _group(file, subject, streamline_group_name, "streamlines")
            volumes.append(_volume(input_group))
            if volumes[-1].shape[3] != volumes[0].shape[3]:
                raise ValueError(
                    f"{_place(input_group)} has {volumes[-1].shape[3]} features, but subject {subjects[0]} has "
                    f"{volumes[0].shape[3]}. Expected the same number for all subjects"
                )
            _require_same_space(input_group, volumes[-1].shape[:3], streamline_group)
            voxel_sizes.append(np.asarray(_attribute(streamline_group, "voxel_sizes"), dtype=np.float32))
            subject_points, subject_lengths = _streamlines(streamline_group)
            points.append(subject_points)
            lengths.append(subject_lengths)
            if subject == subjects[0]:
                input_attributes = {name: _plain(value) for name, value in input_group.attrs.items()}
    if subset == "training" and sum(map(len, lengths)) == 0:
        raise ValueError(f"{path}: the training subjects have no streamlines in group {streamline_group_name!r}")
    return StreamlineDataset(
        path=path,
        subset=subset,
        index=DatasetIndex(subjects, np.array([len(of_subject) for of_subject in lengths], dtype=np.int64)),
        volumes=tuple(torch.from_numpy(volume) for volume in volumes),
        streamlines=Streamlines(
            torch.from_numpy(np.concatenate([np.empty((0, 3), dtype=np.float32), *points])),
            offsets_of(torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *lengths]))),
        ),
        voxel_sizes=torch.from_numpy(np.array(voxel_sizes, dtype=np.float32).reshape(-1, 3)),
        input_attributes=input_attributes,
    )


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """The open file; what h5py raises inside, about whatever part of it, becomes one line that names the file."""
    import h5py

    if not path.exists():
        raise FileNotFoundError(f"The HDF5 file does not exist: {path}")
    if not path.is_file():
        raise ValueError(f"Expected an HDF5 file. Received: {path}, which is not a file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        if not h5py.is_hdf5(path):
            raise ValueError(f"Expected an HDF5 file. Received: {path}, which is not one ({reason})") from error
        raise ValueError(f"The HDF5 file is truncated or damaged: {path} ({reason}). Copy or create it anew") from error


def _place(group: h5py.Group) -> str:
    """Where an error is, for people: file, subject and group."""
    subject, _, name = str(group.name).strip("/").partition("/")
    return f"{group.file.filename}: group {name!r} of subject {subject!r}"


def _names(members: Iterable[object]) -> str:
    """Names for people; a damaged name that is no text comes as bytes."""
    return ", ".join(map(str, members)) or "none"


def _plain(value: object) -> object:
    """An attribute as plain Python, or as an array of numbers."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray) and value.dtype.kind in "SO":
        return [_plain(element) for element in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def _subjects(file: h5py.File, subset: str) -> tuple[str, ...]:
    names = _plain(np.atleast_1d(file.attrs.get(f"{subset}_subjs", [])))
    subjects = tuple(str(name) for name in names) if isinstance(names, list) else ()  # no names: an array of floats
    if len(set(subjects)) < len(subjects):
        raise ValueError(f"{file.filename} lists a {subset} subject twice: {', '.join(subjects)}")
    return subjects


def _attribute(group: h5py.Group, name: str) -> object:
    if name not in group.attrs:
        raise ValueError(f"{_place(group)} has no attribute {name!r}. It has: {_names(group.attrs)}")
    return _plain(group.attrs[name])


def _group(file: h5py.File, subject: str, name: str, kind: str) -> h5py.Group:
    """A subject's group of the type asked for."""
    import h5py

    parent = file.get(subject)
    if not isinstance(parent, h5py.Group):
        raise ValueError(f"{file.filename} lists subject {subject!r}, but holds no group of that name")
    # A name that is damaged, or links to nothing, has None behind it.
    kinds = {key: _plain(item.attrs.get("type", "no type")) for key, item in parent.items() if item is not None}
    if name not in kinds or kinds[name] != kind:
        received = f"has type {kinds[name]!r}" if name in kinds else "does not exist"
        known = _names(f"{key} ({type_})" for key, type_ in kinds.items())
        raise ValueError(
            f"{file.filename}: group {name!r} of subject {subject!r} {received}. "
            f"Expected one of type {kind!r}. Its groups: {known}"
        )
    group = parent[name]
    assert isinstance(group, h5py.Group)
    return group


def _dataset(group: h5py.Group, name: str, kinds: str, dtype: type[np.generic]) -> NDArray:
    """A dataset of numbers, converted to a dtype. `kinds` are numpy's: f float, i and u integers."""
    import h5py

    dataset = group.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{_place(group)} has no dataset {name!r}. It has: {_names(group)}")
    if dataset.dtype.kind not in kinds:
        expected = "numbers" if "f" in kinds else "integers"
        raise ValueError(f"{_place(group)}: dataset {name!r} is of dtype {dataset.dtype}. Expected {expected}")
    return dataset.astype(dtype)[()]


def _volume(group: h5py.Group) -> NDArray[np.float32]:
    data = _dataset(group, "data", "fiu", np.float32)
    if data.ndim != 4 or data.size == 0:
        raise ValueError(f"{_place(group)} holds data of shape {data.shape}. Expected (X, Y, Z, features)")
    num_bad = data.size - np.count_nonzero(np.isfinite(data))
    if num_bad > 0:
        raise ValueError(f"{_place(group)} has {num_bad} NaN or infinite values. Expected finite values only")
    return data


def _require_same_space(input_group: h5py.Group, shape: tuple[int, ...], streamline_group: h5py.Group) -> None:
    """Streamlines must be in voxel space, corner origin, of the input volume's own grid."""
    for name, accepted, expected in (
        ("space", _SPACES, "Space.VOX"),
        ("origin", _ORIGINS, "Origin.TRACKVIS (the corner)"),
    ):
        received = _attribute(streamline_group, name)
        if str(received).lower() not in accepted:
            raise ValueError(f"{_place(streamline_group)} has {name} {received}. Expected {expected}")
    dimensions = tuple(np.asarray(_attribute(streamline_group, "dimensions")).tolist())
    if dimensions != shape:
        raise ValueError(
            f"{_place(streamline_group)} is on a grid of {dimensions} voxels, but {input_group.name} has {shape}. "
            "Expected one grid for both"
        )
    affines = [np.asarray(_attribute(group, "affine")) for group in (input_group, streamline_group)]
    if affines[0].shape != affines[1].shape or not np.allclose(*affines, rtol=0, atol=_AFFINE_TOLERANCE):
        raise ValueError(
            f"{_place(streamline_group)} has another affine than {input_group.name}. Expected one grid for both"
        )


def _streamlines(group: h5py.Group) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The (P, 3) points of a subject's streamlines back to back, and their (S,) lengths."""
    data = _dataset(group, "data", "fiu", np.float32)
    starts = _dataset(group, "offsets", "iu", np.int64)
    lengths = _dataset(group, "lengths", "iu", np.int64)
    if starts.ndim != 1 or starts.shape != lengths.shape:
        raise ValueError(f"{_place(group)} has offsets of shape {starts.shape} and lengths of shape {lengths.shape}")
    if len(starts) == 0:  # nibabel's empty set has no second axis
        return np.empty((0, 3), dtype=np.float32), lengths
    if data.ndim != 2 or data.shape[1] != 3:
        raise ValueError(f"{_place(group)} holds points of shape {data.shape}. Expected (points, 3)")
    _refuse_any(group, lengths < 2, "with fewer than two points")
    _refuse_any(group, (starts < 0) | (starts > len(data) - lengths), f"outside the {len(data)} points stored")

    # Not every file stores its streamlines back to back and in order: nibabel keeps selections as views.
    new_starts = np.cumsum(lengths) - lengths
    points = data
    if not np.array_equal(starts, new_starts) or lengths.sum() != len(data):
        points = data[np.arange(lengths.sum()) + np.repeat(starts - new_starts, lengths)]
    bad_points = ~np.isfinite(points).all(axis=1)
    _refuse_any(group, np.logical_or.reduceat(bad_points, new_starts), "with NaN or infinite points")
    return points, lengths


def _refuse_any(group: h5py.Group, refused: NDArray[np.bool_], what: str) -> None:
    """Refuse the group if it has streamlines that are marked."""
    if refused.any():
        raise ValueError(
            f"{_place(group)} has {np.count_nonzero(refused)} of {len(refused)} streamlines {what}, "
            f"the first is number {np.argmax(refused)} (from 0). Remove them from the dataset"
        )
