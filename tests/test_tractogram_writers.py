"""Tractograms on disk, as nibabel, dipy and trx read them."""

from __future__ import annotations

import json
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from dwiml_func.data.creation.files import Source
from dwiml_func.data.creation.tractograms import load_streamlines
from dwiml_func.data.grid import Grid
from dwiml_func.data.tractogram_writers import check_name, new_tractogram, write_trk

AFFINE = np.array([[-2.0, 0.1, 0, 80], [0.1, 2.2, 0, -100], [0, 0, 3.0, -60], [0, 0, 0, 1]])  # LAS, anisotropic
GRID = Grid(AFFINE, (40, 50, 30))
LENGTHS = np.array([3, 1, 7, 2])
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)])
POINTS = np.random.default_rng(1).uniform(0, 30, size=(13, 3)).astype(np.float32)
SEEDS = np.random.default_rng(2).uniform(0, 30, size=(4, 3)).astype(np.float32)
COLUMNS = {"seeds": 3}
WORLD = (POINTS.astype(np.float64) - 0.5) @ AFFINE[:3, :3].T + AFFINE[:3, 3]
LOADERS: Any = nib.streamlines


def write(path: Path, *, pieces: tuple[int, ...] = (0, 4), with_seeds: bool = False, **options: Any) -> None:
    with new_tractogram(path, GRID, columns=COLUMNS if with_seeds else None, **options) as file:
        for start, end in pairwise(pieces):
            rows = slice(OFFSETS[start], OFFSETS[end])
            offsets = OFFSETS[start : end + 1] - OFFSETS[start]
            file.write(POINTS[rows], offsets, {"seeds": SEEDS[start:end] - 0.5} if with_seeds else None)


@pytest.mark.parametrize("kind", ["trk", "tck"])
def test_nibabel_reads_the_lines_at_their_places_in_the_world(tmp_path, kind):
    write(tmp_path / f"a.{kind}")
    read = LOADERS.load(tmp_path / f"a.{kind}").streamlines
    assert [len(line) for line in read] == LENGTHS.tolist()
    np.testing.assert_allclose(np.concatenate(list(read)), WORLD, atol=2e-5)


def test_trx_reads_the_lines_and_the_seeds(tmp_path):
    from trx import trx_file_memmap

    write(tmp_path / "a.trx", with_seeds=True, facts={"model": "Learn2Track"})
    file: Any = trx_file_memmap.load(str(tmp_path / "a.trx"))
    try:
        assert [len(line) for line in file.streamlines] == LENGTHS.tolist()
        np.testing.assert_allclose(file.streamlines._data, WORLD, atol=2e-5)
        np.testing.assert_allclose(file.data_per_streamline["seeds"], SEEDS - 0.5, atol=1e-5)
        np.testing.assert_allclose(file.header["VOXEL_TO_RASMM"], AFFINE, atol=1e-5)
    finally:
        file.close()
    with zipfile.ZipFile(tmp_path / "a.trx") as archive:
        assert json.loads(archive.read("header.json"))["model"] == "Learn2Track"


def test_a_trk_has_the_grid_and_the_seeds_in_its_header_and_records(tmp_path):
    write(tmp_path / "a.trk", with_seeds=True)
    read = LOADERS.load(tmp_path / "a.trk")
    np.testing.assert_allclose(read.tractogram.data_per_streamline["seeds"], SEEDS - 0.5, atol=1e-6)
    assert read.header["dimensions"].tolist() == [40, 50, 30]
    np.testing.assert_allclose(read.header["voxel_to_rasmm"], AFFINE, atol=1e-5)
    assert read.header["voxel_order"] == b"LAS"
    assert read.header["nb_streamlines"] == 4


def test_a_trk_is_the_one_that_nibabel_writes(tmp_path):
    write(tmp_path / "ours.trk", with_seeds=True)
    header = LOADERS.load(tmp_path / "ours.trk").header
    lines = LOADERS.Tractogram(
        np.split(WORLD.astype(np.float32), OFFSETS[1:-1]), {"seeds": SEEDS - 0.5}, affine_to_rasmm=np.eye(4)
    )
    LOADERS.save(lines, str(tmp_path / "theirs.trk"), header=header)
    ours, theirs = (LOADERS.load(tmp_path / f"{name}.trk") for name in ("ours", "theirs"))
    assert (tmp_path / "ours.trk").stat().st_size == (tmp_path / "theirs.trk").stat().st_size
    assert {k: str(v) for k, v in ours.header.items()} == {k: str(v) for k, v in theirs.header.items()}
    np.testing.assert_allclose(ours.streamlines._data, theirs.streamlines._data, atol=2e-5)


def test_facts_stand_in_the_header_of_a_tck(tmp_path):
    write(tmp_path / "a.tck", facts={"command": "dwiml-func track a:b\nc", "model": "Learn2Track"})
    header = LOADERS.load(tmp_path / "a.tck").header
    assert header["command"] == "dwiml-func track a:b c"
    assert header["model"] == "Learn2Track"
    assert int(header["count"]) == 4


@pytest.mark.parametrize("kind", ["trk", "tck", "trx"])
def test_the_bytes_do_not_depend_on_the_pieces_in_which_lines_come(tmp_path, kind):
    for number, pieces in enumerate([(0, 4), (0, 1, 1, 4), (0, 2, 3, 4)]):
        write(tmp_path / f"{number}.{kind}", pieces=pieces, with_seeds=kind != "tck")
    first, *others = [(tmp_path / f"{number}.{kind}").read_bytes() for number in range(3)]
    assert others == [first, first]


@pytest.mark.parametrize("kind", ["trk", "tck", "trx"])
def test_no_lines_make_a_valid_file(tmp_path, kind):
    from dipy.io.streamline import load_tractogram

    write(tmp_path / f"a.{kind}", pieces=(0,))
    nib.save(nib.Nifti1Image(np.zeros(GRID.shape, np.uint8), AFFINE), tmp_path / "grid.nii.gz")
    if kind == "trx":
        with zipfile.ZipFile(tmp_path / "a.trx") as archive:
            assert json.loads(archive.read("header.json"))["NB_STREAMLINES"] == 0
    else:
        empty: Any = load_tractogram(str(tmp_path / f"a.{kind}"), str(tmp_path / "grid.nii.gz"))
        assert len(empty) == 0


@pytest.mark.parametrize("kind", ["trk", "tck", "trx"])
def test_a_failure_leaves_no_file_or_the_one_that_stood_there(tmp_path, kind):
    def fail(**options: Any) -> None:
        with new_tractogram(tmp_path / f"a.{kind}", GRID, **options) as file:
            file.write(POINTS, OFFSETS)
            file.write(POINTS[:, :2], OFFSETS)

    with pytest.raises(ValueError, match="shape"):
        fail()
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / f"a.{kind}")
    before = (tmp_path / f"a.{kind}").read_bytes()
    with pytest.raises(ValueError, match="shape"):
        fail(overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{kind}"]
    assert (tmp_path / f"a.{kind}").read_bytes() == before


def test_names_and_files_that_cannot_be_written_are_refused(tmp_path):
    cases: tuple[tuple[str, dict[str, int], str], ...] = (
        ("a.vtk", {}, r"Expected a tractogram .trk, .tck, .trx"),
        ("a.tck", COLUMNS, "a TCK file has no room for data per streamline: 'seeds'"),
        ("a.trk", {"n" * 19: 3}, "a TRK file has room for 10 tables"),
        ("a.trk", {str(number): 1 for number in range(11)}, "a TRK file has room for 10 tables"),
    )
    for name, columns, message in cases:
        with pytest.raises(ValueError, match=message), new_tractogram(tmp_path / name, GRID, columns=columns):
            pass
    write(tmp_path / "a.trk")
    with pytest.raises(FileExistsError, match="The file exists"), new_tractogram(tmp_path / "a.trk", GRID):
        pass
    (tmp_path / "folder.trk").mkdir()
    with pytest.raises(IsADirectoryError, match="Received a folder"), new_tractogram(tmp_path / "folder.trk", GRID):
        pass


@pytest.mark.parametrize(
    ("columns", "fits"),
    [
        *(({"n" * 20: 1}, True), ({"n" * 21: 1}, False), ({"n" * 18: 3}, True), ({"n" * 17: 12}, True)),
        *(({"n" * 18: 12}, False), ({"a": 255}, True), ({"a": 256}, False), ({"\u00e9": 1}, False)),
        ({str(number): 1 for number in range(10)}, True),
    ],
)
def test_a_name_and_its_columns_have_20_bytes_in_a_trk(columns, fits):
    assert check_name(Path("a.TRX"), columns=columns) == ".trx"
    if fits:
        assert check_name(Path("a.TRK"), columns=columns) == ".trk"
    else:
        with pytest.raises(ValueError, match="a TRK file has room"):
            check_name(Path("a.trk"), columns=columns)


@pytest.mark.parametrize("kind", ["trk", "trx"])
def test_tables_are_told_apart_by_name_in_any_order(tmp_path, kind):
    weights = np.arange(4.0)[:, None]
    with new_tractogram(tmp_path / f"a.{kind}", GRID, columns={"seeds": 3, "w": 1}) as file:
        for rows, points in ((slice(0, 3), POINTS[:11]), (slice(3, 4), POINTS[11:])):
            offsets = OFFSETS[rows.start : rows.stop + 1] - OFFSETS[rows.start]
            file.write(points, offsets, {"w": weights[rows], "seeds": SEEDS[rows]})
    options: dict[str, Any] = {"expected": GRID, "remove_invalid": True}
    source = Source("s", "g", tmp_path / f"a.{kind}")
    found = load_streamlines([source], dps_keys=["w", "seeds"], **options)  # without the line of one point
    np.testing.assert_array_equal(found.per_streamline["w"], weights[[0, 2, 3]])
    np.testing.assert_array_equal(found.per_streamline["seeds"], SEEDS[[0, 2, 3]])
    np.testing.assert_allclose(found.points, np.delete(POINTS, 3, axis=0), atol=2e-5)
    assert found.offsets.tolist() == [0, 3, 10, 12]


@pytest.mark.parametrize("num", range(6, 42, 5))
def test_a_tck_says_where_its_points_begin(tmp_path, num):
    write(tmp_path / "a.tck", facts={"a": "x" * num, "b": "y"})
    head, _, points = (tmp_path / "a.tck").read_bytes().partition(b"\nEND\n")
    lines = head.decode().splitlines()
    assert lines[:5] == ["mrtrix tracks", "count: 0000000004", "datatype: Float32LE", f"a: {'x' * num}", "b: y"]
    assert lines[5:] == [f"file: . {len(head) + 5}"]
    values = np.frombuffer(points, "<f4").reshape(-1, 3)
    assert len(values) == 13 + 4 + 1
    assert np.flatnonzero(np.isnan(values).all(axis=1)).tolist() == [3, 5, 13, 16]
    assert np.isposinf(values[-1]).all()


def test_data_per_point_are_read_as_they_were_written(tmp_path):
    data = {"loss": POINTS[:, :1] * 2, "color": np.floor(POINTS * 8)}
    write_trk(tmp_path / "a.trk", GRID, POINTS, OFFSETS, data)
    read = LOADERS.load(tmp_path / "a.trk").tractogram
    np.testing.assert_allclose(np.concatenate(list(read.streamlines)), WORLD, atol=2e-5)
    assert set(read.data_per_point) == set(data)
    for name, values in data.items():
        assert [len(line) for line in read.data_per_point[name]] == LENGTHS.tolist()
        np.testing.assert_array_equal(np.concatenate(list(read.data_per_point[name])), values)
