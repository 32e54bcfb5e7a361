"""From TRK, TCK and TRX files to the streamlines of one group of one subject, on the grid of its volumes.

`dwiml_func.data.tractogram_writers` writes these formats.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwiml_func._checks import one_line
from dwiml_func.data.bundles import Bundles, bundles_of_files
from dwiml_func.data.creation.files import Source
from dwiml_func.data.creation.trx import read_trx
from dwiml_func.data.grid import Grid, grid_difference, grid_of, to_voxel
from dwiml_func.data.resampling import Resampling, resample_points

__all__ = ["Tractogram", "load_streamlines"]

_EDGE = 1e-3  # voxels by which a point may leave the grid: what files of float32 make of a point on its face


class Tractogram(NamedTuple):
    """Streamlines, flat: (P, 3) float64 points, (S + 1,) offsets, (S, K) data by name, and from which file each is.

    Points are in RAS mm when read from a file, in voxel space with corner origin from `load_streamlines`. The grid is
    the file's own (None for TCK), then the one of the points.
    """

    points: NDArray[np.float64]
    offsets: NDArray[np.int64]
    per_streamline: dict[str, NDArray]
    grid: Grid | None
    bundles: Bundles | None = None


def load_streamlines(
    files: Sequence[Source],
    *,
    expected: Grid | None = None,
    dps_keys: Sequence[str] = (),
    resampling: Resampling | None = None,
    remove_invalid: bool = False,
    allow_empty: bool = False,
    note: Callable[[str], None] = lambda line: None,
) -> Tractogram:
    """Read the tractograms of a group, one after the other, into voxel space with corner origin.

    A streamline is invalid when it leaves the grid, has a point that is NaN or infinite, or has no length: there is no
    direction to learn. Invalid ones are removed, with a line to `note`, or refused; so are files without streamlines,
    which `allow_empty` and `remove_invalid` pass over. Without an `expected` grid, the first file's grid counts.
    Resampling is in mm. Each file is a bundle.
    """
    parts: list[Tractogram] = []
    filled: list[Source] = []
    for source in files:
        tractogram = _read(source, note)
        if len(tractogram.offsets) == 1:
            if not (allow_empty or remove_invalid):
                raise ValueError(
                    f"{source}: an empty tractogram. Expected streamlines. Pass it over with --allow-empty"
                )
            note(f"{source}: an empty tractogram. It is passed over")
            continue
        filled.append(source)
        tractogram = _with_keys(source, tractogram, dps_keys)
        expected = grid = _common_grid(source, tractogram.grid, expected)
        tractogram = _valid_only(source, tractogram, grid, remove_invalid=remove_invalid, note=note)
        tractogram = _resampled(tractogram, resampling or Resampling())
        parts.append(tractogram._replace(points=to_voxel(tractogram.points, grid.affine)))
    if sum(len(part.offsets) - 1 for part in parts) == 0:
        raise ValueError(f"{files[0]}: no valid streamline is left in the group. Correct the files")
    for key in dps_keys:
        widths = [part.per_streamline[key].shape[1] for part in parts]
        if len(set(widths)) > 1:
            raise ValueError(f"{files[0]}: data per streamline {key!r} has {widths} values in the group's files")
    ends = np.cumsum([0, *(len(part.points) for part in parts)])
    return Tractogram(
        np.concatenate([part.points for part in parts]),
        np.concatenate([[0], *(part.offsets[1:] + end for part, end in zip(parts, ends[:-1], strict=True))]),
        {key: np.concatenate([part.per_streamline[key] for part in parts]) for key in dps_keys},
        expected,
        bundles_of_files([source.path for source in filled], [len(part.offsets) - 1 for part in parts]),
    )


def _read(source: Source, note: Callable[[str], None]) -> Tractogram:
    suffix = source.path.suffix.lower()
    readers = {".trk": _read_nibabel, ".tck": _read_nibabel, ".trx": _read_trx}
    if suffix not in readers:
        raise ValueError(f"{source}: expected a tractogram, .trk, .tck or .trx")
    try:
        with (
            np.errstate(all="ignore"),
            warnings.catch_warnings(record=True) as caught,
        ):  # a corrupt header is told below
            warnings.simplefilter("always")
            tractogram = readers[suffix](source)
    except Exception as error:  # the readers raise of many kinds about corrupt files
        reason = one_line(error) or type(error).__name__
        raise ValueError(f"{source}: cannot be read as {suffix[1:].upper()} ({reason})") from error
    for text in dict.fromkeys(str(warning.message).rstrip(".") for warning in caught):
        note(f"{source}: {text}")
    return tractogram


def _with_keys(source: Source, tractogram: Tractogram, dps_keys: Sequence[str]) -> Tractogram:
    """The tractogram with the data per streamline that are asked for."""
    missing = [key for key in dps_keys if key not in tractogram.per_streamline]
    if missing:
        known = ", ".join(tractogram.per_streamline) or "none"
        raise ValueError(f"{source}: no data per streamline named {', '.join(missing)}. The file has: {known}")
    return tractogram._replace(per_streamline={key: tractogram.per_streamline[key] for key in dps_keys})


def _read_nibabel(source: Source) -> Tractogram:
    import nibabel as nib

    is_trk = source.path.suffix.lower() == ".trk"
    if is_trk:
        _check_trk_header(source.path)
    opened: Any = source.path
    # Reading to the end overwrites the number in the header by what was found, however early the file ends.
    try:
        header = nib.streamlines.load(opened, lazy_load=True).header
    except UnicodeDecodeError:  # of a TCK with names or comments in Latin-1
        head, end, points = source.path.read_bytes().partition(b"\nEND\n")
        opened = io.BytesIO(head.decode("latin-1").encode("ascii", "replace") + end + points)
        header = nib.streamlines.load(opened, lazy_load=True).header
    if opened is not source.path:
        opened.seek(0)
    file = nib.streamlines.load(opened)
    found = len(file.streamlines)
    declared = int(header.get("nb_streamlines", 0)) if is_trk else int(header.get("count", found))
    if declared not in ((0, found) if is_trk else (found,)):  # 0 in TRK: the number is not stored
        raise ValueError(f"the header promises {declared} streamlines, the file holds {found}")
    if is_trk and _trk_size(header, file) != source.path.stat().st_size:
        raise ValueError(f"the header promises {declared or found} streamlines, the file continues after them")
    if not is_trk:
        _check_tck_offset(source.path, header["_offset_data"])
    grid = grid_of(file.header["voxel_to_rasmm"], file.header["dimensions"]) if is_trk else None
    return _flat(file.streamlines, file.tractogram.data_per_streamline, grid)


def _check_trk_header(path: Path) -> None:
    """What nibabel takes as it is, or replaces by the identity."""
    from nibabel.streamlines.trk import header_2_dtype

    with path.open("rb") as file:
        content = file.read(header_2_dtype.itemsize)
    if len(content) < header_2_dtype.itemsize or not content.startswith(b"TRACK"):
        raise ValueError("it does not begin with the 1000 bytes of a header of TRACK")
    header: Any = np.frombuffer(content, header_2_dtype.newbyteorder("<"))[0]
    if header["hdr_size"] != header_2_dtype.itemsize:
        header = np.frombuffer(content, header_2_dtype.newbyteorder(">"))[0]
    affine, sizes = header["voxel_to_rasmm"].astype(np.float64), header["voxel_sizes"].astype(np.float64)
    if affine[3, 3] == 0 or header["version"] < 2:
        raise ValueError("its header has no vox_to_ras, which says where the voxels lie")
    if not np.allclose(np.sqrt((affine[:3, :3] ** 2).sum(axis=0)), sizes, rtol=1e-2):
        raise ValueError(f"its header has voxels of {sizes.tolist()} mm, and an affine of others: {affine.tolist()}")


def _check_tck_offset(path: Path, offset: int) -> None:
    """Between the header and where it says that the points begin is nothing but padding."""
    with path.open("rb") as file:
        _, _, between = file.read(offset).partition(b"\nEND\n")
    if between.strip(b"\0 \r\n"):
        raise ValueError(f"its header says that the points begin at byte {offset}, and there are others before")


def _trk_size(header: Any, file: Any) -> int:
    """The bytes of a TRK file with the streamlines that were read."""
    columns = 3 + int(header.get("nb_scalars_per_point", 0))
    num, properties = len(file.streamlines), int(header.get("nb_properties_per_streamline", 0))
    return 1000 + 4 * (num + columns * int(file.streamlines._lengths.sum()) + num * properties)


def _read_trx(source: Source) -> Tractogram:
    trx = read_trx(source.path)
    return Tractogram(trx.points.astype(np.float64), trx.offsets, trx.per_streamline, trx.grid)


def _flat(sequence: Any, per_streamline: Any, grid: Grid | None) -> Tractogram:
    packed = sequence.copy()  # back to back and in order
    lengths = np.asarray(packed._lengths, dtype=np.int64)
    points = np.asarray(packed._data, dtype=np.float64).reshape(-1, 3)
    tables = {key: np.array(per_streamline[key]).reshape(len(lengths), -1) for key in per_streamline}
    return Tractogram(points, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), tables, grid)


def _common_grid(source: Source, own: Grid | None, expected: Grid | None) -> Grid:
    if own is not None and expected is not None:
        difference = grid_difference(own, expected)
        if difference is not None:
            raise ValueError(f"{source}: {difference}, as the subject's volumes (or its first tractogram) have")
    grid = expected or own
    if grid is None:
        raise ValueError(f"{source}: a TCK file does not say on which grid it lies. Add a group of type 'volume'")
    return grid


def _valid_only(
    source: Source, tractogram: Tractogram, grid: Grid, *, remove_invalid: bool, note: Callable[[str], None]
) -> Tractogram:
    num = len(tractogram.offsets) - 1
    streamline = np.repeat(np.arange(num), np.diff(tractogram.offsets))
    with np.errstate(all="ignore"):
        voxel = to_voxel(tractogram.points, grid.affine)
    not_finite = ~np.isfinite(voxel).all(axis=1)
    leaves = ((voxel < -_EDGE) | (voxel > np.array(grid.shape) + _EDGE)).any(axis=1)
    moves = np.zeros(len(voxel), dtype=bool)
    moves[1:] = (np.diff(tractogram.points, axis=0) != 0).any(axis=1)
    moves[tractogram.offsets[:-1][np.diff(tractogram.offsets) > 0]] = False  # the way from one streamline to the next
    corrupt = np.bincount(streamline, not_finite, num) > 0
    outside = (np.bincount(streamline, leaves, num) > 0) & ~corrupt
    short = (np.bincount(streamline, moves, num) == 0) & ~corrupt & ~outside
    invalid = corrupt | outside | short
    if not invalid.any():
        return tractogram
    size = " x ".join(map(str, grid.shape))
    reasons = [
        f"{np.count_nonzero(which)} {what}"
        for which, what in (
            (outside, f"outside the volume of {size} voxels"),
            (corrupt, "with NaN or infinite points"),
            (short, "of no length"),
        )
        if which.any()
    ]
    found = f"{np.count_nonzero(invalid)} of {num} streamlines are invalid: {', '.join(reasons)}"
    if not remove_invalid:
        raise ValueError(f"{source}: {found}. Correct the file, or leave them out with --remove-invalid")
    note(f"{source}: {found}. They are left out")
    kept = ~invalid
    return Tractogram(
        tractogram.points[kept[streamline]],
        np.concatenate([[0], np.cumsum(np.diff(tractogram.offsets)[kept])]),
        {key: values[kept] for key, values in tractogram.per_streamline.items()},
        tractogram.grid,
    )


def _resampled(tractogram: Tractogram, resampling: Resampling) -> Tractogram:
    if len(tractogram.offsets) == 1:
        return tractogram
    points, offsets = resample_points(tractogram.points, tractogram.offsets, resampling)
    return tractogram._replace(points=points, offsets=offsets)
