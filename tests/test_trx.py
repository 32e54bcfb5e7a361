"""TRX files: as trx-python writes and reads them, packed, compressed or unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from creation_cases import AFFINE, SHAPE, save_lines, some_lines

from dwiml_func.data.creation.trx import read_trx
from dwiml_func.files.archive import is_bomb


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    table = {"weight": np.arange(6.0)[:, None], "colour": np.arange(18.0).reshape(6, 3)}
    save_lines(tmp_path / "a.trx", some_lines(6), per_streamline=table)
    return tmp_path / "a.trx"


@pytest.mark.parametrize("how", ["as written", "stored", "deflated", "folder"])
def test_a_tractogram_is_as_trx_python_reads_it(packed, tmp_path, how):
    from trx import trx_file_memmap

    truth: Any = trx_file_memmap.load(str(packed))
    path = packed
    if how != "as written":
        with zipfile.ZipFile(packed) as old:
            old.extractall(tmp_path / "b.trx")
        path = tmp_path / "b.trx"
    if how in ("stored", "deflated"):
        path = tmp_path / "c.trx"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if how == "stored" else zipfile.ZIP_DEFLATED) as new:
            for file in sorted((tmp_path / "b.trx").rglob("*")):
                new.write(file, file.relative_to(tmp_path / "b.trx"))
            new.comment = b"written by hand" if how == "stored" else b""
    trx = read_trx(path)
    np.testing.assert_array_equal(trx.points, truth.streamlines._data)
    np.testing.assert_array_equal(np.diff(trx.offsets), truth.streamlines._lengths)
    assert sorted(trx.per_streamline) == ["colour", "weight"]
    for key, values in trx.per_streamline.items():
        np.testing.assert_array_equal(values, np.asarray(truth.data_per_streamline[key]))
    np.testing.assert_allclose(trx.grid.affine, AFFINE, atol=1e-5)
    assert trx.grid.shape == SHAPE
    truth.close()


@pytest.mark.parametrize(
    ("unpacked", "stored", "is_refused"),
    [(1 << 26, 1, False), ((1 << 26) + 1, 1, True), (100 << 20, 1 << 20, False), ((100 << 20) + 1, 1 << 20, True)],
)
def test_what_unpacks_to_64_mb_or_to_100_times_its_size_is_no_bomb(unpacked, stored, is_refused):
    assert is_bomb(unpacked, stored) == is_refused


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
@pytest.mark.parametrize("has_last", [True, False])
@pytest.mark.parametrize("offset_kind", ["uint32", "uint64"])
def test_an_unpacked_tractogram_of_any_kind_is_read(tmp_path, kind, has_last, offset_kind):
    points = np.random.default_rng(0).uniform(0, 9, (7, 3)).astype(kind)
    (tmp_path / "header.json").write_text(header(7, 3))
    (tmp_path / f"positions.3.{kind}").write_bytes(points.tobytes())
    (tmp_path / "dps" / "of_another_program").mkdir(parents=True)
    (tmp_path / "dps" / "of_another_program" / "notes.txt").write_bytes(b"passed over")
    (tmp_path / "groups").mkdir()
    for name, ids in (("both", [0, 2]), ("first", [0]), ("none", [])):
        (tmp_path / "groups" / f"{name}.int32").write_bytes(np.array(ids, "<i4").tobytes())
    offsets = np.array([0, 3, 3, 7], offset_kind)  # the second streamline has no point
    (tmp_path / f"offsets.{offset_kind}").write_bytes(offsets[: 3 + has_last].tobytes())
    trx = read_trx(tmp_path)
    np.testing.assert_array_equal(trx.points, points)
    assert trx.points.dtype == kind
    assert (trx.offsets.tolist(), trx.offsets.dtype) == ([0, 3, 3, 7], np.int64)


def header(num_points: int, num_streamlines: int) -> str:
    import json

    numbers = {"NB_VERTICES": num_points, "NB_STREAMLINES": num_streamlines}
    return json.dumps({"VOXEL_TO_RASMM": AFFINE.tolist(), "DIMENSIONS": SHAPE, **numbers})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header.json": header(6, 2)}, "NB_VERTICES of the header promises 72"),
        ({"header.json": header(8, 2)}, "NB_VERTICES of the header promises 96"),
        ({"header.json": header(7, 3)}, "offsets|NB_STREAMLINES"),
        ({"header.json": header(7, 1)}, "offsets|NB_STREAMLINES"),
        ({"header.json": None}, "no header.json"),
        ({"offsets.uint64": np.array([0, 3, 6], "u8").tobytes()}, "do not rise from 0 to the 7 points"),
        ({"offsets.uint64": np.array([0, 8, 7], "u8").tobytes()}, "do not rise"),
        ({"offsets.uint64": np.array([1, 3, 7], "u8").tobytes()}, "do not rise from 0"),
        ({"positions.3.float32": None, "positions.2.float32": bytes(56)}, "positions.2.float32 holds 56 bytes"),
        ({"offsets.uint64": None, "offsets.2.uint32": np.array([0, 3, 7], "u8").tobytes()}, "offsets.2.uint32"),
        ({"offsets.uint64": None}, "0 arrays of offsets"),
        ({"offsets.uint32": b""}, "2 arrays of offsets"),
        ({"positions.3.float32": None}, "0 arrays of positions"),
        ({"dps/weight.float32": bytes(12)}, "dps/weight.float32 holds 12 bytes"),
        ({"dps/weight.words": bytes(8)}, "expected a name such as"),
        ({"dps/weight.3.1.uint8": bytes(6)}, "expected a name such as"),
        ({"dps/weight.uint8": bytes(2), "dps/weight.2.uint8": bytes(4)}, "two arrays in dps/ have one name"),
        ({"header.json": header(7, 2.0)}, "7 points of 2.0 streamlines, expected whole numbers"),  # type: ignore[arg-type]
        ({"header.json": header(7.0, 2)}, "7.0 points of 2 streamlines, expected whole numbers"),  # type: ignore[arg-type]
        ({"header.json": "{}" + " " * (1 << 24)}, "no header.json of less than 16 MB"),
        ({"positions.3.float32": None, "positions.float32": bytes(28)}, "positions.float32 holds 28 bytes"),
        ({"dpv/fa.float32": bytes(24)}, "dpv/fa.float32 holds 24 bytes, NB_VERTICES of the header promises 28"),
        ({"groups/left.uint32": np.array([0, 2], "u4").tobytes()}, "groups/left.uint32 has streamlines 0 to 2 of 2"),
        ({"groups/left.int32": np.array([-1, 1], "i4").tobytes()}, "groups/left.int32 has streamlines -1 to 1 of 2"),
    ],
)
def test_what_does_not_agree_with_the_header_is_named(tmp_path, change, message):
    content = {
        "header.json": header(7, 2),
        "positions.3.float32": np.zeros((7, 3), "f4").tobytes(),
        "offsets.uint64": np.array([0, 3, 7], "u8").tobytes(),
    }
    for folder in ("dps", "dpv", "groups"):
        (tmp_path / folder).mkdir()
    for name, value in {**content, **change}.items():
        if value is not None:
            (tmp_path / name).write_bytes(value.encode() if isinstance(value, str) else value)
    with pytest.raises(ValueError, match=message):
        read_trx(tmp_path)
