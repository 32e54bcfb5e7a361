"""The HDF5 layout of scil-vital/dwi_ml, read piece by piece and checked, see `problems`.

File attributes name the subjects of each subset. Each subject is a group that holds groups of type `volume` and of type
`streamlines` (written by its `src/dwi_ml/general/data/hdf5/hdf5_creation.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from dwiml_func._checks import truncated_repr
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.hdf5.problems import Checked, Problem, attribute_of, dataset_of, location, present, scalar
from dwiml_func.data.resampling import Resampling
from dwiml_func.files.paths import other_spelling

if TYPE_CHECKING:
    import h5py

__all__ = [
    "Subset",
    "Table",
    "group_of",
    "named_subject",
    "per_streamline",
    "read_bundles",
    "read_lengths_mm",
    "read_points",
    "read_resampling",
    "read_table",
    "read_volume",
    "streamlines_that",
    "subject_group",
    "volume_shape",
]

Subset = Literal["training", "validation", "testing"]
"""A subset of a dataset's subjects, by name."""

_SLAB_VALUES = 1 << 22  # how many values are checked at once: no copy of a whole volume


def subject_group(file: h5py.File, subject: str) -> Checked[h5py.Group]:
    """A subject's group."""
    import h5py

    group = file.get(subject)
    if isinstance(group, h5py.Group):
        return group
    yield Problem(f"subject {subject!r}", "listed, but not in the file")


def named_subject(file: h5py.File, subject: str) -> h5py.Group:
    """The group of a subject that was asked for by name; ValueError where there is none."""
    import h5py

    group = file.get(subject)
    if not isinstance(group, h5py.Group):
        there = present(file) + other_spelling([subject], file)
        raise ValueError(f"{file.filename}: expected a subject among {there}. Received: {truncated_repr(subject)}.")
    return group


def group_of(subject: h5py.Group, name: str, kind: str) -> Checked[h5py.Group]:
    """A subject's group of the type asked for."""
    import h5py

    group = subject.get(name)
    if isinstance(group, h5py.Group) and scalar(group.attrs.get("type")) == kind:
        return group
    # A name that is corrupt, or links to nothing, has None behind it.
    kinds = {key: scalar(item.attrs.get("type", "no type")) for key, item in subject.items() if item is not None}
    received = f"has type {kinds[name]!r}" if name in kinds else "does not exist"
    others = present(f"{key} ({type_})" for key, type_ in kinds.items())
    yield Problem(
        f"subject {str(subject.name).strip('/')!r}",
        f"group {name!r} {received}. Expected a group of type {kind!r}. Present: {others}",
    )


def read_resampling(file: h5py.File) -> Checked[Resampling]:
    """How the streamlines were sampled when the file was made; dwi_ml writes "Not defined by user" for no option."""
    found = {}
    for name in ("step_size", "nb_points", "compress"):
        value = scalar(file.attrs.get(name))
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            found[name] = value
    try:
        return Resampling(**found) if len(found) == 1 else Resampling()
    except ValueError as error:
        yield Problem("", f"attribute {error}")


def volume_shape(group: h5py.Group) -> Checked[tuple[int, int, int, int]]:
    """The (X, Y, Z, F) of a volume; only its header is read."""
    data = yield from dataset_of(group, "data", "fiu")
    if data is None:
        return None
    if len(data.shape) == 4 and 0 not in data.shape:
        return data.shape
    yield Problem(location(group), f"data of shape {data.shape}. Expected (X, Y, Z, features)")


def read_volume(group: h5py.Group) -> Checked[NDArray[np.float32]]:
    """The (X, Y, Z, F) float32 values of a volume, all finite."""
    shape = yield from volume_shape(group)
    if shape is None:
        return None
    data = np.empty(shape, dtype=np.float32)
    cast("h5py.Dataset", group["data"]).read_direct(data)
    flat = data.reshape(-1)
    slabs = (flat[start : start + _SLAB_VALUES] for start in range(0, flat.size, _SLAB_VALUES))
    num_bad = sum(slab.size - np.count_nonzero(np.isfinite(slab)) for slab in slabs)
    if num_bad == 0:
        return data
    yield Problem(location(group), f"{num_bad} of {data.size} values are NaN or infinite")


class Table(NamedTuple):
    """Where a subject's streamlines lie among its stored points: (S,) int64 first rows and numbers of points."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]


_MOST_OVERLAP = 16


def read_table(group: h5py.Group) -> Checked[Table]:
    """The table of a subject's streamlines; the points are not read."""
    data = yield from dataset_of(group, "data", "fiu")
    columns = []
    for name in ("offsets", "lengths"):
        column = yield from dataset_of(group, name, "iu")
        columns.append(None if column is None else column.astype(np.int64)[()])
    starts, lengths = columns
    if data is None or starts is None or lengths is None:
        return None
    if starts.ndim != 1 or starts.shape != lengths.shape:
        sentence = f"offsets of shape {starts.shape} and lengths of shape {lengths.shape}. Expected (S,) for both"
        yield Problem(location(group), sentence)
        return None
    if len(starts) == 0:  # nibabel's empty set has no second axis
        return Table(starts, lengths)
    if len(data.shape) != 2 or data.shape[1] != 3:
        yield Problem(location(group), f"points of shape {data.shape}. Expected (points, 3)")
        return None
    short = yield from streamlines_that(group, lengths < 2, "have fewer than two points")
    outside = (starts < 0) | (starts > len(data) - lengths)
    outside = yield from streamlines_that(group, outside, f"lie outside the {len(data)} points stored")
    if int(lengths.sum()) > _MOST_OVERLAP * len(data):
        sentence = f"{int(lengths.sum())} points of overlapping streamlines are made of the {len(data)} points stored"
        yield Problem(location(group), f"{sentence}. Expected at most {_MOST_OVERLAP} times as many")
        return None
    return None if short or outside else Table(starts, lengths)


def read_points(group: h5py.Group, table: Table) -> Checked[NDArray[np.float32]]:
    """The (P, 3) points of all of a subject's streamlines back to back, all finite."""
    starts, lengths = table
    if len(starts) == 0:
        return np.empty((0, 3), dtype=np.float32)
    points = cast("h5py.Dataset", group["data"]).astype(np.float32)[()]
    # Not every file stores its streamlines back to back and in order: nibabel keeps selections as views.
    new_starts = np.cumsum(lengths) - lengths
    if not np.array_equal(starts, new_starts) or lengths.sum() != len(points):
        points = points[np.arange(lengths.sum()) + np.repeat(starts - new_starts, lengths)]
    bad = np.logical_or.reduceat(~np.isfinite(points).all(axis=1), new_starts)
    return None if (yield from streamlines_that(group, bad, "have NaN or infinite points")) else points


def read_lengths_mm(group: h5py.Group, num_streamlines: int) -> Checked[NDArray[np.float64]]:
    """(S,) mm; None where the file holds no such length for each streamline."""
    if "euclidean_lengths" not in group:
        return None
    stored = yield from dataset_of(group, "euclidean_lengths", "fiu")
    if stored is None or stored.shape != (num_streamlines,):
        return None
    lengths = stored.astype(np.float64)[()]
    bad = ~(np.isfinite(lengths) & (lengths >= 0))
    return None if (yield from streamlines_that(group, bad, "have a length in mm that is no length")) else lengths


def read_bundles(group: h5py.Group, num_streamlines: int) -> Checked[Bundles]:
    """The bundle of each streamline; None where the file does not say it."""
    if "bundle_ids" not in group:
        return None
    stored = yield from dataset_of(group, "bundle_ids", "iu")
    received = yield from attribute_of(group, "bundle_names")
    if stored is None or received is None:
        return None
    names = tuple(map(str, received)) if isinstance(received, list) else ()
    if not names or len(set(names)) < len(names):
        sentence = f"attribute 'bundle_names' is {truncated_repr(received)}. Expected names, each once"
        yield Problem(location(group), sentence)
        return None
    if stored.shape != (num_streamlines,):
        yield Problem(location(group), f"bundle_ids of shape {stored.shape}. Expected ({num_streamlines},)")
        return None
    ids = stored.astype(np.int64)[()]
    unknown = (ids < 0) | (ids >= len(names))
    fault = f"are of a bundle that is none of the {len(names)} named"
    return None if (yield from streamlines_that(group, unknown, fault)) else Bundles(names, ids)


def per_streamline(group: Any) -> dict[str, Any]:
    """Data per streamline by name; a name with '/' is a group in a group, which is read once however links lead."""
    found: dict[str, Any] = {}
    waiting, seen = [("", group.get("data_per_streamline") or {})], set()
    while waiting:
        prefix, parent = waiting.pop()
        for name, item in parent.items():
            if not hasattr(item, "items"):
                found[prefix + name] = item
            elif item.id not in seen:
                seen.add(item.id)
                waiting.append((f"{prefix}{name}/", item))
    return found


def streamlines_that(group: h5py.Group, wrong: NDArray[np.bool_], have_a_fault: str) -> Checked[bool]:
    """Whether streamlines are marked, which is a problem."""
    if not wrong.any():
        return False
    count = f"{np.count_nonzero(wrong)} of {len(wrong)} streamlines {have_a_fault}"
    yield Problem(location(group), f"{count}; the first is number {np.argmax(wrong)} (from 0)")
    return True
