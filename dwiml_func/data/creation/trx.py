"""TRX tractograms: a zip archive, or a folder, of a JSON header and arrays whose names say what they hold.

Format: https://github.com/tee-ar-ex/trx-spec (specifications.md). Everything is read to its end: zip checks the CRC of
each array, and the header's numbers must be those of the arrays.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwiml_func.data.grid import Grid, grid_of
from dwiml_func.files.archive import is_bomb
from dwiml_func.files.json import parse_json

__all__ = ["Trx", "read_trx"]

_KINDS = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_MOST_HEADER_BYTES = 1 << 24
_IN_HEADER = ("VOXEL_TO_RASMM", "DIMENSIONS", "NB_VERTICES", "NB_STREAMLINES")
_END_BYTES = 22  # of the record that ends a zip archive, without its comment


class Trx(NamedTuple):
    """(P, 3) points in RAS mm, (S + 1,) offsets, (S, K) data per streamline by name, and the grid."""

    points: NDArray
    offsets: NDArray[np.int64]
    per_streamline: dict[str, NDArray]
    grid: Grid


class _Archive(NamedTuple):
    """The members of an archive or a folder: name -> bytes, and a function that reads one."""

    sizes: dict[str, int]
    read: Callable[[str], bytes]


def read_trx(path: Path) -> Trx:
    """Read a TRX, packed or not. ValueError (or an error of zipfile) where it is corrupt."""
    if path.is_dir():
        files = {str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if file.is_file()}
        archive = _Archive({name: f.stat().st_size for name, f in files.items()}, lambda name: files[name].read_bytes())
        return _read(archive)
    with path.open("rb") as file, zipfile.ZipFile(file) as packed:
        _check_end(file, len(packed.comment))
        entries = [info for info in packed.infolist() if not info.is_dir()]
        members = {info.filename: info.file_size for info in entries}
        if len(members) < len(entries):
            raise ValueError("the archive has two files of one name")
        if is_bomb(sum(members.values()), path.stat().st_size):
            raise ValueError(f"it unpacks to {sum(members.values())} bytes, from {path.stat().st_size}")
        return _read(_Archive(members, packed.read))


def _check_end(file: BinaryIO, num_comment_bytes: int) -> None:
    """The record that ends an archive is at the end of the file."""
    file.seek(-_END_BYTES - num_comment_bytes, os.SEEK_END)
    if file.read(4) != b"PK\5\6":
        raise ValueError("the file continues after the end of the archive")


def _read(archive: _Archive) -> Trx:
    if archive.sizes.get("header.json", _MOST_HEADER_BYTES) >= _MOST_HEADER_BYTES:
        raise ValueError("no header.json of less than 16 MB")
    header = parse_json(archive.read("header.json"), source="header.json")
    missing = [name for name in _IN_HEADER if not isinstance(header, dict) or name not in header]
    if missing:
        raise ValueError(f"no {', '.join(missing)} in header.json")
    if np.shape(header["DIMENSIONS"]) != (3,):
        raise ValueError(f"DIMENSIONS of {header['DIMENSIONS']}, expected three numbers")
    grid = grid_of(header["VOXEL_TO_RASMM"], header["DIMENSIONS"])
    num_points, num_streamlines = (header[name] for name in ("NB_VERTICES", "NB_STREAMLINES"))
    if type(num_points) is not int or type(num_streamlines) is not int:
        raise ValueError(f"{num_points!r} points of {num_streamlines!r} streamlines, expected whole numbers")
    tables = _members(archive.sizes, "dps/")
    if num_streamlines == 0 and num_points == 0:
        return Trx(np.empty((0, 3)), np.zeros(1, np.int64), {}, grid)
    positions = _only(archive, "positions", "float")
    points = _array(archive, positions, num_points, "NB_VERTICES", columns=3)
    offsets = _offsets(archive, num_streamlines, num_points)
    if len({_name_of(member) for member in tables}) < len(tables):
        raise ValueError("two arrays in dps/ have one name")
    per_streamline = {_name_of(member): _array(archive, member, num_streamlines, "NB_STREAMLINES") for member in tables}
    for member in _members(archive.sizes, "dpv/"):
        _check_size(archive, member, num_points, "NB_VERTICES")
    for member in _members(archive.sizes, "groups/"):
        ids = np.frombuffer(archive.read(member), np.dtype(_kind_of(member)).newbyteorder("<"))
        if ids.size and not 0 <= ids.min() <= ids.max() < num_streamlines:
            raise ValueError(f"{member} has streamlines {ids.min()} to {ids.max()} of {num_streamlines}")
    return Trx(points, offsets, per_streamline, grid)


def _offsets(archive: _Archive, num_streamlines: int, num_points: int) -> NDArray[np.int64]:
    """The (S + 1,) offsets; older files leave out the last, which is the number of points."""
    member = _only(archive, "offsets", "int")
    size = np.dtype(_kind_of(member)).itemsize
    has_last = archive.sizes[member] != num_streamlines * size
    stored = _array(archive, member, num_streamlines + has_last, "NB_STREAMLINES, and one more,", columns=1)[:, 0]
    offsets = stored.astype(np.int64) if has_last else np.append(stored.astype(np.int64), num_points)
    is_rising = (np.diff(offsets) >= 0).all() and (has_last or offsets[-2] < num_points)
    if offsets[0] != 0 or offsets[-1] != num_points or not is_rising:
        raise ValueError(f"its offsets do not rise from 0 to the {num_points} points of the header")
    return offsets


def _array(archive: _Archive, member: str, rows: int, promised: str, *, columns: int | None = None) -> NDArray:
    """An array of the archive, (rows, columns); the name says the columns and the type."""
    named, kind = _check_size(archive, member, rows, promised, columns=columns)
    return np.frombuffer(archive.read(member), kind).reshape(rows, named).astype(kind.newbyteorder("="))


def _check_size(
    archive: _Archive, member: str, rows: int, promised: str, *, columns: int | None = None
) -> tuple[int, np.dtype]:
    """The columns and the type of an array that has this many rows."""
    parts = member.rpartition("/")[2].split(".")
    named = int(parts[1]) if len(parts) == 3 else 1
    kind = np.dtype(_kind_of(member)).newbyteorder("<")
    expected = rows * named * kind.itemsize
    if archive.sizes[member] != expected or (columns is not None and named != columns):
        raise ValueError(f"{member} holds {archive.sizes[member]} bytes, {promised} of the header promises {expected}")
    return named, kind


def _only(archive: _Archive, name: str, kind: str) -> str:
    found = [member for member in archive.sizes if member.split(".")[0] == name]
    if len(found) != 1:
        raise ValueError(f"{len(found)} arrays of {name}. Expected one")
    if kind not in _kind_of(found[0]):
        raise ValueError(f"{found[0]}: expected {kind} numbers")
    return found[0]


def _members(names: Iterable[str], folder: str) -> list[str]:
    return [name for name in names if name.startswith(folder) and name.count("/") == 1]


def _name_of(member: str) -> str:
    return member.rpartition("/")[2].split(".")[0]


def _kind_of(member: str) -> Any:
    parts = member.rpartition("/")[2].split(".")
    if len(parts) not in (2, 3) or parts[-1] not in _KINDS:
        raise ValueError(f"{member}: expected a name such as weight.float32 or color.3.uint8")
    return parts[-1]
