"""Tractograms of any length on disk: TRK, TCK or TRX, written as lines come and complete under their name or not there.

The bytes depend on the lines alone, not on the groups in which they came, nor on the time.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from dwiml_func.data.grid import Grid, orientation_of
from dwiml_func.files.atomic import atomic_file, remove_leftovers

__all__ = ["FORMATS", "TractogramFile", "check_name", "new_tractogram", "write_trk"]

_MOST_TABLES = 10  # of a TRK's header
Points = NDArray[np.float32]
Offsets = NDArray[np.int64]


class TractogramFile(Protocol):
    """A tractogram that is being written."""

    def write(self, points: Points, offsets: Offsets, tables: Mapping[str, NDArray] | None = None) -> None:
        """Append lines: points (P, 3), voxel space, corner origin, offsets (S + 1,), and data per streamline (S, K)."""
        ...


@contextmanager
def new_tractogram(
    path: str | os.PathLike[str],
    grid: Grid,
    *,
    facts: Mapping[str, str] | None = None,
    columns: Mapping[str, int] | None = None,
    overwrite: bool = False,
) -> Iterator[TractogramFile]:
    """Write a tractogram inside a `with` block; it appears under its name once the block ends without an error.

    `facts` are texts for the header; TRK has no room for them. `columns` are those of data per streamline, by name,
    which are stored as float32; TCK has no room for them.
    """
    path = Path(path)
    columns = dict(columns or {})
    kind = check_name(path, columns=columns)
    if path.is_dir():
        raise IsADirectoryError(f"Expected a file name for the tractogram. Received a folder: {path}.")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"The file exists: {path}. Choose another name, or overwrite it with --overwrite.")
    remove_leftovers(path.parent, path.name)
    with atomic_file(path) as file:
        tractogram = FORMATS[kind](file, grid, dict(facts or {}), columns)
        try:
            yield tractogram
            tractogram.finish()
        finally:
            tractogram.close()


def write_trk(path: str | Path, grid: Grid, points: Points, offsets: Offsets, data: Mapping[str, Points]) -> None:
    """Write lines, (P, 3) and (S + 1,), voxel space, corner origin, with data per point: arrays (P, C) by name.

    Data that are called "color", of three columns from 0 to 255, are the colours that viewers show.
    """
    with atomic_file(path) as file:
        trk = _Trk(file, grid, {}, {}, {name: values.shape[1] for name, values in data.items()})
        trk.write(points, offsets, data=np.concatenate(list(data.values()), axis=1))
        trk.finish()


def check_name(path: Path, *, columns: Mapping[str, int]) -> str:
    """The kind of file that a name asks for; ValueError where there is none, or none that can hold these data."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"Expected a tractogram {', '.join(FORMATS)}. Received: {str(path)!r}.")
    kind, names = path.suffix.lower(), ", ".join(map(repr, columns))
    if columns and kind == ".tck":
        raise ValueError(f"{path}: a TCK file has no room for data per streamline: {names}. Write a TRK or TRX file.")
    if kind == ".trk" and (len(columns) > _MOST_TABLES or any(_is_long(name, num) for name, num in columns.items())):
        raise ValueError(
            f"{path}: a TRK file has room for {_MOST_TABLES} tables of data per streamline of at most 255 "
            f"columns, with names of at most 16 ASCII letters. Received: {names}. Write a TRX file."
        )
    return kind


def _is_long(name: str, num: int) -> bool:
    """Whether the 20 bytes of a TRK's header have no room for a name and its number of columns."""
    return not name.isascii() or num > 255 or len(name) + (0 if num == 1 else 1 + len(str(num))) > 20


class _Trk:
    """Records of a number of points, the points in mm from the grid's corner with their data, and the properties."""

    def __init__(
        self,
        file: BinaryIO,
        grid: Grid,
        facts: dict[str, str],
        columns: Mapping[str, int],
        data_columns: Mapping[str, int] | None = None,
    ) -> None:
        from nibabel.affines import voxel_sizes
        from nibabel.streamlines.trk import TrkFile, encode_value_in_name, header_2_dtype

        self._file, self._count = file, 0
        self._sizes = voxel_sizes(grid.affine)
        header: Any = np.zeros((), header_2_dtype.newbyteorder("<"))
        empty: Any = TrkFile.create_empty_header(endianness="<")
        for name, value in empty.items():
            header[name] = value
        header["dimensions"], header["voxel_sizes"], header["voxel_to_rasmm"] = grid.shape, self._sizes, grid.affine
        header["voxel_order"] = orientation_of(grid.affine)
        self._columns = columns
        header["nb_properties_per_streamline"] = sum(columns.values())
        for number, (name, num) in enumerate(columns.items()):
            header["property_name"][number] = encode_value_in_name(num, name)
        for number, (name, num) in enumerate((data_columns or {}).items()):
            header["nb_scalars_per_point"] += num
            header["scalar_name"][number] = encode_value_in_name(num, name)
        self._header = header
        file.write(header.tobytes())

    def write(
        self,
        points: Points,
        offsets: Offsets,
        tables: Mapping[str, NDArray] | None = None,
        data: Points | None = None,
    ) -> None:
        rows = (points * self._sizes).astype("<f4")
        if data is not None:
            rows = np.concatenate([rows, data.astype("<f4")], axis=1)
        lengths, num_properties, width = np.diff(offsets), sum(self._columns.values()), rows.shape[1]
        starts = width * offsets[:-1] + np.arange(len(lengths)) * (1 + num_properties)
        words = np.empty(rows.size + len(lengths) * (1 + num_properties), "<f4")
        is_point = np.ones(len(words), bool)
        words[starts] = lengths.astype("<i4").view("<f4")
        is_point[starts] = False
        if tables:
            places = (starts + 1 + width * lengths)[:, None] + np.arange(num_properties)
            words[places] = np.concatenate([tables[name] for name in self._columns], axis=1)
            is_point[places] = False
        words[is_point] = rows.reshape(-1)
        self._file.write(words.tobytes())
        self._count += len(lengths)

    def finish(self) -> None:
        self._header["nb_streamlines"] = self._count
        self._file.seek(0)
        self._file.write(self._header.tobytes())

    def close(self) -> None:
        pass


class _Tck:
    """Points in RAS mm; a NaN after each line, an infinity after the last."""

    def __init__(self, file: BinaryIO, grid: Grid, facts: dict[str, str], columns: Mapping[str, int]) -> None:
        self._file, self._grid, self._facts, self._count = file, grid, facts, 0
        self._write_header()

    def write(self, points: Points, offsets: Offsets, tables: Mapping[str, NDArray] | None = None) -> None:
        lengths = np.diff(offsets)
        rows = np.full((len(points) + len(lengths), 3), np.nan, "<f4")
        line = np.repeat(np.arange(len(lengths)), lengths)
        rows[np.arange(len(points)) + line] = _to_world(points, self._grid)
        self._file.write(rows.tobytes())
        self._count += len(lengths)

    def finish(self) -> None:
        self._file.write(np.full(3, np.inf, "<f4").tobytes())
        self._file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        lines = ["mrtrix tracks", f"count: {self._count:010}", "datatype: Float32LE"]
        lines += [f"{name}: {' '.join(text.split())}" for name, text in self._facts.items()]
        start = "\n".join(lines).encode()
        length = len(start) + len(b"\nfile: . \nEND\n")
        length += len(str(length + len(str(length))))
        self._file.write(start + f"\nfile: . {length}\nEND\n".encode())

    def close(self) -> None:
        pass


class _Trx:
    """A ZIP archive of plain arrays, in RAS mm; lines wait in temporary files until all are there."""

    def __init__(self, file: BinaryIO, grid: Grid, facts: dict[str, str], columns: Mapping[str, int]) -> None:
        self._file, self._grid, self._facts = file, grid, facts
        self._count, self._num_points = 0, 0
        self._tables = {name: f"dps/{name}.{num}.float32" for name, num in columns.items()}
        names = ["positions.3.float32", "offsets.uint64", *self._tables.values()]
        folder = Path(file.name).parent
        self._parts = {name: tempfile.TemporaryFile(dir=folder) for name in names}  # noqa: SIM115 (see close)

    def write(self, points: Points, offsets: Offsets, tables: Mapping[str, NDArray] | None = None) -> None:
        self._parts["positions.3.float32"].write(_to_world(points, self._grid).tobytes())
        self._parts["offsets.uint64"].write((offsets[:-1] + self._num_points).astype("<u8").tobytes())
        for name, values in (tables or {}).items():
            self._parts[self._tables[name]].write(values.astype("<f4").tobytes())
        self._count += len(offsets) - 1
        self._num_points += len(points)

    def finish(self) -> None:
        self._parts["offsets.uint64"].write(np.array([self._num_points], "<u8").tobytes())
        header = {
            "DIMENSIONS": list(self._grid.shape),
            "VOXEL_TO_RASMM": self._grid.affine.tolist(),
            "NB_VERTICES": self._num_points,
            "NB_STREAMLINES": self._count,
            **self._facts,
        }
        with zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(zipfile.ZipInfo("header.json"), json.dumps(header))  # ZipInfo's date is that of 1980
            for name, part in self._parts.items():
                part.seek(0)
                with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as entry:
                    shutil.copyfileobj(part, entry)

    def close(self) -> None:
        for part in self._parts.values():
            part.close()


FORMATS = {".trk": _Trk, ".tck": _Tck, ".trx": _Trx}
"""The kinds of tractograms, by the ending of their names."""


def _to_world(points: Points, grid: Grid) -> Points:
    """Voxel space with corner origin to RAS mm, (P, 3)."""
    matrix, shift = grid.affine[:3, :3], grid.affine[:3, 3]
    # Not @: matrix products round differently for other numbers of rows.
    return (np.einsum("pj,ij->pi", points.astype(np.float64) - 0.5, matrix) + shift).astype("<f4")
