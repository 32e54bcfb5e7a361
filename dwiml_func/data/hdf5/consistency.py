"""What belongs together in a dataset: its subsets and subjects, features and their harmonics, matrices and labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dwiml_func.data.grid import Grid, orientation_difference
from dwiml_func.data.hdf5.problems import Checked, Problem, attribute_of, collect, dataset_of, location, to_python
from dwiml_func.data.spherical_harmonics import HARMONICS, harmonics_fault

if TYPE_CHECKING:
    import h5py
from numpy.typing import NDArray

__all__ = [
    "Volume",
    "connectivity_fits",
    "copied_streamlines",
    "disjoint_subsets",
    "matrix_fault",
    "same_volumes",
    "separate_streamlines",
    "subjects_of",
    "volume_attributes",
]

_FEW_POINTS = 16  # which tell most subjects apart


def subjects_of(file: h5py.File, subset: str, *, required: bool = False) -> Checked[tuple[str, ...]]:
    """The names of a subset's subjects, each once."""
    names = to_python(np.atleast_1d(file.attrs.get(f"{subset}_subjs", [])))
    names = [names] if isinstance(names, str) else names
    subjects = tuple(str(name) for name in names) if isinstance(names, list) else ()  # no names: an array of floats
    for name, number in Counter(subjects).items():
        if "/" in name or name in ("", ".", ".."):  # HDF5 would take it for a path, perhaps to another subject
            yield Problem(f"subject {name!r}", f"expected a name without '/' in the {subset} subset")
        if number > 1:
            yield Problem(f"subject {name!r}", f"listed twice in the {subset} subset")
    if required and not subjects:
        yield Problem("", f"no {subset} subjects: the attribute {subset}_subjs is missing or empty")
    return subjects


def disjoint_subsets(subsets: Mapping[str, Sequence[str]]) -> Checked[None]:
    """Each subject is in one subset: a model is judged on subjects that it has not seen."""
    subset_of: dict[str, str] = {}
    for subset, names in subsets.items():
        for name in dict.fromkeys(names):
            first = subset_of.setdefault(name, subset)
            if first != subset:
                yield Problem(f"subject {name!r}", f"in two subsets, {first} and {subset}")


def separate_streamlines(file: h5py.File, subsets: Mapping[str, Sequence[str]], group_name: str) -> Checked[None]:
    """No link leads from two subsets to the same stored streamlines: they would be one subject under two names."""
    from h5py import h5o  # pyright: ignore[reportAttributeAccessIssue]

    found: dict[tuple[int, int], tuple[str, str]] = {}
    for subset, names in subsets.items():
        for name in dict.fromkeys(names):
            try:
                stored = h5o.get_info(file.id, f"{name}/{group_name}/data".encode())
            except (KeyError, OSError, RuntimeError):  # told where it is read
                continue
            other, first = found.setdefault((stored.fileno, stored.addr), (name, subset))
            if first != subset:
                yield Problem(f"subject {name!r}", f"in {subset}, has the same streamlines as {other!r}, in {first}")


def copied_streamlines(file: h5py.File, subsets: Mapping[str, Sequence[str]], group_name: str) -> Iterator[Problem]:
    """Subjects with the same points as another one: perhaps one subject under two names. No error, but told."""
    found: dict[tuple[object, ...], tuple[str, str, h5py.Dataset]] = {}
    for subset, names in subsets.items():
        for name in dict.fromkeys(names):
            try:
                group: Any = file[f"{name}/{group_name}"]
                data = collect(dataset_of(group, "data", "f"), [])
                if data is None or data.size == 0:
                    continue
                start = data.shape, data[:_FEW_POINTS].tobytes()
                other, first, same = found.setdefault(start, (name, subset, data))
                is_copy = other != name and np.array_equal(data[()], same[()])
            except (AttributeError, KeyError, OSError, RuntimeError):  # told where it is read
                continue
            if is_copy:
                yield Problem(f"subject {name!r}", f"in {subset}, has the same points as {other!r}, in {first}")


class Volume(NamedTuple):
    """What the volumes of one group have in common over subjects; the grid is None where it cannot be read."""

    num_features: int
    grid: Grid | None
    attributes: Mapping[str, Any]


def volume_attributes(group: h5py.Group, num_features: int) -> Checked[dict[str, Any]]:
    """A volume's attributes, plain; those of spherical harmonics and of the standardisation fit its features."""
    attributes = {name: to_python(value) for name, value in group.attrs.items()}
    fault = harmonics_fault(attributes, num_features)
    if fault is not None:
        yield Problem(location(group), fault)
    return attributes


def same_volumes(group: str, first: str, expected: Volume, subject: str, volume: Volume) -> Checked[None]:
    """A subject's volume has the features, the orientation and the harmonics of the first subject's."""
    where = f"subject {subject!r}, group {group!r}"
    if volume.num_features != expected.num_features:
        yield Problem(where, f"{volume.num_features} features, but subject {first!r} has {expected.num_features}")
    if volume.grid is not None and expected.grid is not None:
        difference = orientation_difference(volume.grid, expected.grid)
        if difference is not None:
            yield Problem(where, f"{difference}, as subject {first!r} has. Reorient all volumes and streamlines alike")
    for name in HARMONICS:
        received, wanted = volume.attributes.get(name), expected.attributes.get(name)
        if str(received) != str(wanted):
            yield Problem(where, f"attribute {name!r} is {received}, but that of subject {first!r} is {wanted}")


def connectivity_fits(group: h5py.Group, shape: Sequence[int] | None) -> Checked[None]:
    """A connectivity matrix, if there is one, fits its blocs or labels, and the labels the grid."""
    if "connectivity_matrix" not in group:
        return
    matrix = yield from dataset_of(group, "connectivity_matrix", "biuf")
    if matrix is None:
        return
    blocs, labels = None, None
    if "connectivity_nb_blocs" in group.attrs:
        received = np.atleast_1d(np.asarray((yield from attribute_of(group, "connectivity_nb_blocs"))))
        if received.dtype.kind not in "iu" or received.shape != (3,) or received.min() < 1:
            sentence = f"attribute 'connectivity_nb_blocs' is {received.tolist()}. Expected three numbers from 1"
            yield Problem(location(group), sentence)
            return
        blocs = received.tolist()
    if "connectivity_label_volume" in group:
        stored = yield from dataset_of(group, "connectivity_label_volume", "fiu")
        if stored is not None and shape is not None and stored.shape != tuple(shape):
            yield Problem(location(group), f"labels of shape {stored.shape}. Expected {tuple(shape)}, the grid's")
            return
        labels = None if stored is None else np.asarray(stored[()])
        if labels is not None and not ((labels >= 0) & (labels < 1 << 63) & (labels == np.rint(labels))).all():
            yield Problem(location(group), "labels that are no whole numbers of at least 0")
            return
    if not np.isfinite(matrix[()]).all():
        yield Problem(location(group), "connectivity: the matrix holds NaN or infinite values")
    fault = matrix_fault(matrix.shape, blocs, None if labels is None else labels.astype(np.int64))
    if fault is not None:
        yield Problem(location(group), f"connectivity: {fault}")


def matrix_fault(shape: Sequence[int], blocs: Sequence[int] | None, labels: NDArray[np.integer] | None) -> str | None:
    """Why a matrix of this shape does not fit its blocs or its (X, Y, Z) labels, in words; None where it fits.

    Rows are blocs, or labels: all labels in rising order, with the background 0 or without, or else labels that are
    numbers of rows, from 1.
    """
    if len(shape) != 2 or shape[0] != shape[1]:
        return f"a matrix of shape {tuple(shape)}. Expected a square one"
    if blocs is not None and shape[0] != np.prod(blocs):
        text = " x ".join(map(str, blocs))
        return f"a matrix of {shape[0]} rows. Expected {np.prod(blocs)}, one for each of {text} blocs"
    if labels is not None:
        found = np.unique(labels[labels > 0])
        if len(found) == 0:
            return "labels without any region: all voxels are 0"
        num_labels = len(np.unique(labels))  # the background too, as dwi_ml counts
        if shape[0] not in (len(found), num_labels) and found[-1] > shape[0]:
            return f"a matrix of {shape[0]} rows. Expected {len(found)}, one for each label (up to {found[-1]})"
    return None
