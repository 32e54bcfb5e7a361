"""The HDF5 layout of scil-vital/dwi_ml, read piece by piece and checked; errors name file, subject and group.

The layout, as written by its `src/dwi_ml/general/data/hdf5/hdf5_creation.py`: file attributes name the subjects of each
subset; one group a subject; in it groups of type `volume` and of type `streamlines`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dwiml_func.data.resampling import Resampling

if TYPE_CHECKING:
    import h5py  # at run time only once a file is opened: `import dwiml_func.data` stays light

__all__ = [
    "check_no_problem",
    "check_same_space",
    "group_of",
    "location",
    "open_hdf5",
    "read_lengths_mm",
    "read_points",
    "read_resampling",
    "read_table",
    "read_volume",
    "subjects_of",
    "to_python",
    "volume_shape",
    "voxel_sizes_of",
]

_SPACES = ("space.vox", "vox")  # as dipy's Space.VOX prints, and its value
_ORIGINS = ("origin.trackvis", "trackvis", "corner")  # as dipy's Origin.TRACKVIS prints, its name and its value
_AFFINE_TOLERANCE = 1e-3  # in dipy's is_header_compatible too
_SLAB_VALUES = 1 << 22  # how many values are checked at once: no copy of a whole volume


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
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
        raise ValueError(f"The HDF5 file is truncated or corrupt: {path} ({reason}). Copy or create it anew") from error


def location(group: h5py.Group) -> str:
    """Where an error is, for people: file, subject and group."""
    subject, _, name = str(group.name).strip("/").partition("/")
    return f"{group.file.filename}: group {name!r} of subject {subject!r}"


def _names(members: Iterable[object]) -> str:
    """Names for people; a corrupt name that is no text comes as bytes."""
    return ", ".join(map(str, members)) or "none"


def to_python(value: object) -> object:
    """An attribute as plain Python, or as an array of numbers."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray) and value.dtype.kind in "SO":
        return [to_python(element) for element in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def subjects_of(file: h5py.File, subset: str) -> tuple[str, ...]:
    """The names of a subset's subjects, each once."""
    names = to_python(np.atleast_1d(file.attrs.get(f"{subset}_subjs", [])))
    subjects = tuple(str(name) for name in names) if isinstance(names, list) else ()  # no names: an array of floats
    if len(set(subjects)) < len(subjects):
        raise ValueError(f"{file.filename} lists a {subset} subject twice: {', '.join(subjects)}")
    return subjects


def _attribute(group: h5py.Group, name: str) -> object:
    if name not in group.attrs:
        raise ValueError(f"{location(group)} has no attribute {name!r}. It has: {_names(group.attrs)}")
    return to_python(group.attrs[name])


def group_of(file: h5py.File, subject: str, name: str, kind: str) -> h5py.Group:
    """A subject's group of the type asked for."""
    import h5py

    parent = file.get(subject)
    if not isinstance(parent, h5py.Group):
        raise ValueError(f"{file.filename} lists subject {subject!r}, but holds no group of that name")
    group = parent.get(name)
    if isinstance(group, h5py.Group) and to_python(group.attrs.get("type")) == kind:
        return group
    # A name that is corrupt, or links to nothing, has None behind it.
    kinds = {key: to_python(item.attrs.get("type", "no type")) for key, item in parent.items() if item is not None}
    received = f"has type {kinds[name]!r}" if name in kinds else "does not exist"
    known = _names(f"{key} ({type_})" for key, type_ in kinds.items())
    raise ValueError(
        f"{file.filename}: group {name!r} of subject {subject!r} {received}. "
        f"Expected one of type {kind!r}. Its groups: {known}"
    )


def read_resampling(file: h5py.File) -> Resampling:
    """How the streamlines were sampled when the file was made; what is no number was "Not defined by user"."""
    found = {}
    for name in ("step_size", "nb_points", "compress"):
        value = to_python(file.attrs.get(name))
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            found[name] = value
    return Resampling(**found) if len(found) == 1 else Resampling()


def volume_shape(group: h5py.Group) -> tuple[int, int, int, int]:
    """The (X, Y, Z, F) of a volume; only its header is read."""
    shape = _dataset(group, "data", "fiu").shape
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"{location(group)} holds data of shape {shape}. Expected (X, Y, Z, features)")
    return shape


def read_volume(group: h5py.Group) -> NDArray[np.float32]:
    """The (X, Y, Z, F) float32 values of a volume, all finite."""
    data = np.empty(volume_shape(group), dtype=np.float32)
    _dataset(group, "data", "fiu").read_direct(data)
    flat = data.reshape(-1)
    slabs = (flat[start : start + _SLAB_VALUES] for start in range(0, flat.size, _SLAB_VALUES))
    num_bad = sum(slab.size - np.count_nonzero(np.isfinite(slab)) for slab in slabs)
    if num_bad > 0:
        raise ValueError(f"{location(group)} has {num_bad} NaN or infinite values. Expected finite values only")
    return data


def check_same_space(input_group: h5py.Group, shape: tuple[int, ...], streamline_group: h5py.Group) -> None:
    """Streamlines must be in voxel space, corner origin, of the input volume's own grid."""
    for name, accepted, expected in (
        ("space", _SPACES, "Space.VOX"),
        ("origin", _ORIGINS, "Origin.TRACKVIS (the corner)"),
    ):
        received = _attribute(streamline_group, name)
        if str(received).lower() not in accepted:
            raise ValueError(f"{location(streamline_group)} has {name} {received}. Expected {expected}")
    dimensions = tuple(np.asarray(_attribute(streamline_group, "dimensions")).tolist())
    if dimensions != shape:
        raise ValueError(
            f"{location(streamline_group)} is on a grid of {dimensions} voxels, but {input_group.name} has {shape}. "
            "Expected one grid for both"
        )
    affines = [np.asarray(_attribute(group, "affine")) for group in (input_group, streamline_group)]
    if affines[0].shape != affines[1].shape or not np.allclose(*affines, rtol=0, atol=_AFFINE_TOLERANCE):
        raise ValueError(
            f"{location(streamline_group)} has another affine than {input_group.name}. Expected one grid for both"
        )


def voxel_sizes_of(streamline_group: h5py.Group) -> NDArray[np.float32]:
    """(3,) mm."""
    sizes = np.asarray(_attribute(streamline_group, "voxel_sizes"))
    if sizes.dtype.kind not in "fiu" or sizes.shape != (3,) or not (np.isfinite(sizes) & (sizes > 0)).all():
        raise ValueError(
            f"{location(streamline_group)} has voxel_sizes {sizes.tolist()}. Expected three numbers above 0, in mm"
        )
    return sizes.astype(np.float32)


def read_table(group: h5py.Group) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The (S,) starts and lengths of a subject's streamlines among its stored points; these are not read."""
    data = _dataset(group, "data", "fiu")
    starts = _integers(group, "offsets")
    lengths = _integers(group, "lengths")
    if starts.ndim != 1 or starts.shape != lengths.shape:
        raise ValueError(f"{location(group)} has offsets of shape {starts.shape} and lengths of shape {lengths.shape}")
    if len(starts) == 0:  # nibabel's empty set has no second axis
        return starts, lengths
    if len(data.shape) != 2 or data.shape[1] != 3:
        raise ValueError(f"{location(group)} holds points of shape {data.shape}. Expected (points, 3)")
    check_no_problem(group, lengths < 2, "with fewer than two points")
    check_no_problem(group, (starts < 0) | (starts > len(data) - lengths), f"outside the {len(data)} points stored")
    return starts, lengths


def read_points(group: h5py.Group, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
    """The (P, 3) points of all of a subject's streamlines back to back, all finite."""
    if len(starts) == 0:
        return np.empty((0, 3), dtype=np.float32)
    points = _dataset(group, "data", "fiu").astype(np.float32)[()]
    # Not every file stores its streamlines back to back and in order: nibabel keeps selections as views.
    new_starts = np.cumsum(lengths) - lengths
    if not np.array_equal(starts, new_starts) or lengths.sum() != len(points):
        points = points[np.arange(lengths.sum()) + np.repeat(starts - new_starts, lengths)]
    bad_points = ~np.isfinite(points).all(axis=1)
    check_no_problem(group, np.logical_or.reduceat(bad_points, new_starts), "with NaN or infinite points")
    return points


def read_lengths_mm(group: h5py.Group, num_streamlines: int) -> NDArray[np.float64] | None:
    """(S,) mm, or None where the file holds no such length for each streamline."""
    if "euclidean_lengths" not in group:
        return None
    lengths = _dataset(group, "euclidean_lengths", "fiu").astype(np.float64)[()]
    if lengths.shape != (num_streamlines,):
        return None
    check_no_problem(group, ~(np.isfinite(lengths) & (lengths >= 0)), "with a length in mm that is no length")
    return lengths


def _dataset(group: h5py.Group, name: str, kinds: str) -> h5py.Dataset:
    """A dataset of numbers, not read. `kinds` are numpy's: f float, i and u integers."""
    import h5py

    dataset = group.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{location(group)} has no dataset {name!r}. It has: {_names(group)}")
    if dataset.dtype.kind not in kinds:
        expected = "numbers" if "f" in kinds else "integers"
        raise ValueError(f"{location(group)}: dataset {name!r} is of dtype {dataset.dtype}. Expected {expected}")
    return dataset


def _integers(group: h5py.Group, name: str) -> NDArray[np.int64]:
    return _dataset(group, name, "iu").astype(np.int64)[()]


def check_no_problem(group: h5py.Group, refused: NDArray[np.bool_], what: str) -> None:
    """Refuse the group if it has streamlines that are marked."""
    if refused.any():
        raise ValueError(
            f"{location(group)} has {np.count_nonzero(refused)} of {len(refused)} streamlines {what}, "
            f"the first is number {np.argmax(refused)} (from 0). Remove them from the dataset"
        )
