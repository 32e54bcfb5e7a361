"""Look at one group of one subject: measure it, and say everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwiml_func.data.grid import Grid, grid_of
from dwiml_func.data.resampling import lengths_mm

if TYPE_CHECKING:
    import h5py

__all__ = ["Report", "Steps", "StreamlineSummary", "VolumeSummary", "inspect_streamlines", "inspect_volume"]

Report = Callable[[str], None]
"""Takes a problem in words."""

_EDGE = 1e-3  # voxels: float32 cannot place a point on a voxel's face any better


class VolumeSummary(NamedTuple):
    """What a volume group holds.

    Args:
        shape: (X, Y, Z, F); None when it cannot be told.
        grid: where it lies; None when it cannot be told.

    Example:
        >>> VolumeSummary((9, 9, 9, 28), None).shape[3]
        28
    """

    shape: tuple[int, ...] | None
    grid: Grid | None


class Steps(NamedTuple):
    """The distances between points of a group's streamlines; not kept themselves, as there are as many as points.

    Args:
        number: how many there are.
        total: their sum in mm.
        median: in mm.
        least: in mm.
        greatest: in mm.

    Example:
        >>> Steps(2, 3.0, 1.5, 1.0, 2.0).median
        1.5
    """

    number: int
    total: float
    median: float
    least: float
    greatest: float


class StreamlineSummary(NamedTuple):
    """What a streamline group holds.

    Args:
        num_streamlines: S.
        num_points: P.
        lengths: (S,) in mm; None when they cannot be told.
        steps: distances between points; None when they cannot be told.
        grid: where it lies; None when it cannot be told.
        extras: names of data per streamline, and of the connectivity matrix.

    Example:
        >>> StreamlineSummary(0, 0, None, None, None, ()).num_streamlines
        0
    """

    num_streamlines: int
    num_points: int
    lengths: NDArray[np.float64] | None
    steps: Steps | None
    grid: Grid | None
    extras: tuple[str, ...]


def inspect_volume(group: h5py.Group, report: Report) -> VolumeSummary:
    """Look at a volume, one slab of voxels after the other.

    Args:
        group: the group, in an open file.
        report: told what is wrong.

    Returns:
        What it holds.

    Example:
        >>> import h5py
        >>> from dwiml_func.data.hdf5.write import write_volume
        >>> with h5py.File("any", "w", driver="core", backing_store=False) as file:
        ...     write_volume(file, "input", np.full((2, 2, 2, 1), np.nan), np.eye(4))
        ...     inspect_volume(file["input"], print).shape
        8 of 8 values are NaN or infinite
        (2, 2, 2, 1)
    """
    data = _dataset(group, "data", "fiu", report)
    if data is None:
        return VolumeSummary(None, None)
    if data.ndim != 4 or data.size == 0:
        report(f"data of shape {data.shape}, expected (X, Y, Z, features)")
        return VolumeSummary(data.shape, None)
    num_bad = sum(slab.size - int(np.count_nonzero(np.isfinite(slab))) for slab in (data[x] for x in range(len(data))))
    if num_bad:
        report(f"{num_bad} of {data.size} values are NaN or infinite")
    if "nb_features" in group.attrs and group.attrs["nb_features"] != data.shape[3]:
        report(f"attribute nb_features is {group.attrs['nb_features']}, but the data has {data.shape[3]} features")
    return VolumeSummary(data.shape, _grid(group, data.shape[:3], report))


def inspect_streamlines(group: h5py.Group, report: Report) -> StreamlineSummary:
    """Look at the streamlines of a subject.

    Args:
        group: the group, in an open file.
        report: told what is wrong.

    Returns:
        What it holds.

    Example:
        >>> import h5py
        >>> from dwiml_func.data.hdf5.write import write_streamlines
        >>> points, offsets = np.array([[1.0, 1, 1], [3, 1, 1]]), np.array([0, 2])
        >>> with h5py.File("any", "w", driver="core", backing_store=False) as file:
        ...     write_streamlines(file, "lines", points, offsets, affine=np.eye(4), dimensions=(2, 2, 2))
        ...     inspect_streamlines(file["lines"], print).lengths.tolist()
        1 of 1 streamlines leave the grid of 2 x 2 x 2 voxels
        [2.0]
    """
    grid = _streamline_grid(group, report)
    extras = _extras(group)
    stored = [
        _dataset(group, name, kinds, report) for name, kinds in (("data", "fiu"), ("offsets", "iu"), ("lengths", "iu"))
    ]
    data, starts, counts = (None if dataset is None else np.asarray(dataset[()]) for dataset in stored)
    if data is None or starts is None or counts is None:
        return StreamlineSummary(0, 0, None, None, grid, extras)
    num = len(counts)
    unknown = StreamlineSummary(num, len(data), None, None, grid, extras)
    if starts.ndim != 1 or starts.shape != counts.shape:
        report(
            f"offsets of shape {starts.shape} and lengths of shape {counts.shape}, expected one of each a streamline"
        )
        return unknown
    if num == 0:
        report("no streamlines")
        return unknown
    if data.ndim != 2 or data.shape[1] != 3:
        report(f"points of shape {data.shape}, expected (points, 3)")
        return unknown
    starts, counts = starts.astype(np.int64), counts.astype(np.int64)
    if _report_count(report, counts < 2, "have fewer than two points"):
        return unknown
    if _report_count(
        report, (starts < 0) | (starts > len(data) - counts), f"lie outside the {len(data)} points stored"
    ):
        return unknown
    offsets = np.concatenate([[0], np.cumsum(counts)])
    points = data[np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)].astype(np.float64)
    unknown = unknown._replace(num_points=len(points))
    not_finite = ~np.isfinite(points).all(axis=1)
    if _report_count(report, np.logical_or.reduceat(not_finite, offsets[:-1]), "have NaN or infinite points"):
        return unknown
    _check_tables(group, num, report)
    if grid is None:
        return unknown
    leaves = ((points < -_EDGE) | (points > np.array(grid.shape) + _EDGE)).any(axis=1)
    size = " x ".join(map(str, grid.shape))
    _report_count(report, np.logical_or.reduceat(leaves, offsets[:-1]), f"leave the grid of {size} voxels")
    in_mm = np.einsum("pj,ij->pi", points, grid.affine[:3, :3])
    lengths = lengths_mm(in_mm, offsets)
    _report_count(report, lengths == 0, "have no length: all points in one place")
    _check_lengths(group, lengths, report)
    steps = np.delete(np.sqrt((np.diff(in_mm, axis=0) ** 2).sum(axis=1)), offsets[1:-1] - 1)
    measured = Steps(len(steps), *(float(f(steps)) for f in (np.sum, np.median, np.min, np.max)))
    return unknown._replace(lengths=lengths, steps=measured)


def _report_count(report: Report, wrong: NDArray[np.bool_], what: str) -> bool:
    if wrong.any():
        report(f"{np.count_nonzero(wrong)} of {len(wrong)} streamlines {what}")
    return bool(wrong.any())


def _dataset(group: h5py.Group, name: str, kinds: str, report: Report) -> h5py.Dataset | None:
    import h5py

    dataset = group.get(name)
    if not isinstance(dataset, h5py.Dataset):
        report(f"no dataset {name!r}")
        return None
    if dataset.dtype.kind not in kinds:
        report(f"dataset {name!r} is of dtype {dataset.dtype}, expected {'numbers' if 'f' in kinds else 'integers'}")
        return None
    stored = dataset.id.get_storage_size()
    if dataset.chunks is None and dataset.nbytes > stored:  # a corrupt shape could make reading it endless
        report(f"dataset {name!r} of shape {dataset.shape} has {stored} of its {dataset.nbytes} bytes")
        return None
    return dataset


def _grid(group: h5py.Group, shape: object, report: Report) -> Grid | None:
    if "affine" not in group.attrs:
        report("no attribute 'affine'")
        return None
    try:
        return grid_of(np.asarray(group.attrs["affine"]), np.asarray(shape))
    except (ValueError, TypeError) as error:
        report(f"attribute 'affine' or the shape is wrong: {error}")
        return None


def _streamline_grid(group: h5py.Group, report: Report) -> Grid | None:
    for name, accepted in (("space", ("space.vox", "vox")), ("origin", ("origin.trackvis", "trackvis", "corner"))):
        received = group.attrs.get(name)
        if str(received).lower() not in accepted:
            report(
                f"attribute {name!r} is {received}, expected {'Space.VOX' if name == 'space' else 'Origin.TRACKVIS'}"
            )
    if "dimensions" not in group.attrs:
        report("no attribute 'dimensions'")
        return None
    return _grid(group, group.attrs["dimensions"], report)


def _extras(group: Any) -> tuple[str, ...]:
    names = [f"data per streamline {key!r}" for key in group.get("data_per_streamline") or ()]
    if "connectivity_matrix" in group:
        kind = str(group.attrs.get("connectivity_matrix_type", "of no type")).replace("_", " ")
        names.append(f"connectivity matrix {kind}")
    return tuple(names)


def _check_tables(group: Any, num: int, report: Report) -> None:
    for key, table in (group.get("data_per_streamline") or {}).items():
        if getattr(table, "ndim", 0) != 2 or len(table) != num:
            report(f"data per streamline {key!r} has shape {getattr(table, 'shape', '()')}, expected ({num}, values)")


def _check_lengths(group: h5py.Group, lengths: NDArray[np.float64], report: Report) -> None:
    stored = _dataset(group, "euclidean_lengths", "fiu", report)
    if stored is None:
        return
    if stored.shape != lengths.shape:
        report(f"euclidean_lengths of shape {stored.shape}, expected {lengths.shape}")
    else:
        wrong = ~np.isclose(stored[()], lengths, rtol=1e-3, atol=1e-2)
        _report_count(report, wrong, "have another length in mm than euclidean_lengths says")
