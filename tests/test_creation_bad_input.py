"""Bad input to create-hdf5: one line that names subject, group and file, exit code 2, and nothing half-written."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
from creation_cases import AFFINE, CONFIG, SHAPE, make_folder, save_lines, save_volume, some_lines
from nibabel.affines import apply_affine
from nibabel.streamlines import trk
from preloaded import finished, start_program

from dwiml_func.cli.main import main

File: Any = h5py.File
Run = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_folder(tmp_path)
    return tmp_path


@pytest.fixture
def refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run create-hdf5 and return its one line of error; no file may have appeared."""

    def run(*options: str, arguments: list[str] | None = None) -> str:
        before = sorted(folder.rglob("*"))
        if arguments is None:
            paths = [str(folder / name) for name in ("subjects", "config.json", "out.hdf5")]
            lists = ["--training-subjs", str(folder / "train.txt"), "--validation-subjects", str(folder / "valid.txt")]
            arguments = [*paths, *lists]
        assert main(["create-hdf5", *arguments, *options]) == 2
        printed = capfd.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1, printed.err
        assert sorted(folder.rglob("*")) == before
        return printed.err

    return run


def set_config(folder: Path, **groups: dict[str, Any] | None) -> None:
    merged = {name: group for name, group in {**CONFIG, **groups}.items() if group is not None}
    (folder / "config.json").write_text(json.dumps(merged))


def place(group: str, name: str, subject: str = "s2") -> str:
    return rf"subject '{subject}', group '{group}', file [^ ]*/{subject}/{re.escape(name)}: "


def edit_volume(path: Path, change: Callable[[np.ndarray], object]) -> None:
    data = nib.load(path).get_fdata(dtype=np.float32)  # type: ignore[attr-defined]
    change(data)
    save_volume(path, data)


def test_a_missing_file_is_named_before_anything_is_read(folder, refused):
    (folder / "subjects" / "s2" / "dwi.nii.gz").unlink()
    (folder / "subjects" / "s1" / "dwi.nii.gz").write_bytes(b"")  # would fail first if it were read
    assert re.search(place("input", "dwi.nii.gz") + "the file does not exist", refused())


def test_a_wildcard_that_matches_nothing_is_named(folder, refused):
    for path in (folder / "subjects" / "s2" / "bundles").iterdir():
        path.unlink()
    assert re.search(place("streamlines", "bundles/*.trk") + "no file matches", refused())


def test_missing_subjects_are_named(folder, refused):
    (folder / "valid.txt").write_text("s2\nnobody\nnoone\n")
    assert "2 of 4 subjects have no folder in" in (line := refused())
    assert "'nobody', 'noone'" in line
    assert "Unicode" not in line
    (folder / "subjects" / "noe\u0301").mkdir()
    (folder / "valid.txt").write_text("nobody\nno\u00e9\n")
    assert "'no\u00e9'. Spelt with other Unicode code points (NFC, NFD): 'no\u00e9'" in refused()


@pytest.mark.parametrize(
    ("training", "validation", "message"),
    [
        ("s1\ns1\n", "s2\n", "Subject 's1' is listed twice in the training subset"),
        ("s1\n", "s1\n", "Subject 's1' is in two subsets, training and validation"),
        ("\n", "", "No subjects"),
        ("../subjects/s1", "", "expected the name of a folder"),
    ],
)
def test_subjects_stand_once(folder, refused, training, validation, message):
    (folder / "train.txt").write_text(training)
    (folder / "valid.txt").write_text(validation)
    assert message in refused()


def test_a_missing_list_or_config_or_folder_is_named(folder, refused):
    good = [str(folder / name) for name in ("subjects", "config.json", "out.hdf5")]
    lists = ["--training-subjs", str(folder / "train.txt")]
    assert "list of subjects does not exist" in refused(arguments=[*good, "--training-subjs", str(folder / "no.txt")])
    assert "config file does not exist" in refused(arguments=[good[0], str(folder / "no.json"), good[2], *lists])
    assert "folder of subjects does not exist" in refused(arguments=[str(folder / "no"), *good[1:], *lists])
    assert "No subjects" in refused(arguments=good)
    out = str(folder / "train.txt" / "a.hdf5")
    assert "train.txt' is not a folder. Choose another folder" in refused(arguments=[*good[:2], out, *lists])
    out = str(folder / "new" / "deep" / "a.hdf5")  # the folders that were made for it are gone again
    assert "folder of subjects does not exist" in refused(arguments=[str(folder / "no"), good[1], out, *lists])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"files": ["a"]}, "group 'x': type: expected 'volume' or 'streamlines', received none"),
        ({"type": "image", "files": ["a"]}, "group 'x': type: expected 'volume' or 'streamlines', received 'image'"),
        ({"type": "volume"}, "group 'x': files: expected, but missing"),
        ({"type": "volume", "files": []}, "group 'x': files: expected at least one file"),
        ({"type": "volume", "files": ["a", ""]}, "group 'x': files: expected at least one file"),
        ({"type": "volume", "files": "a", "colour": 1}, "group 'x': unknown key 'colour'. Known: type, files"),
        ({"type": "volume", "files": ["a", "../s1/a"]}, "group 'x': .*'../s1/a': expected a path below"),
        ({"type": "streamlines", "files": "/data/a.trk"}, "group 'x': .*'/data/a.trk': expected a path below"),
        ({"type": "volume", "files": 3}, "group 'x': files: .*received 3"),
        ({"type": "volume", "files": [3]}, "group 'x': files.0: .*received 3"),
        ({"type": "volume", "files": "a", "standardization": "some"}, "group 'x': standardization: .*received 'some'"),
        ({"type": "volume", "files": "a", "dps_keys": "b"}, "group 'x': unknown key 'dps_keys'"),
        (
            {"type": "volume", "files": "a", "sh_order": 3},
            "sh_order: expected an even number of at least 0, received 3",
        ),
        ({"type": "volume", "files": "a", "sh_order": -2}, "at least 0, received -2"),
        ({"type": "volume", "files": "a", "sh_order": 2, "sh_basis": "mine"}, "group 'x': sh_basis: .*received 'mine'"),
        ({"type": "volume", "files": "a", "sh_basis": "tournier07"}, "require sh_order, received none"),
        ({"type": "volume", "files": "a", "sh_legacy": True}, "require sh_order, received none"),
        ({"type": "volume", "files": "a", "sh_order": 2, "sh_of": "odf"}, "group 'x': sh_of: .*received 'odf'"),
        ({"type": "streamlines", "files": "a", "standardization": "all"}, "'standardization'. Known: type, files, dps"),
        (
            {"type": "streamlines", "files": "a", "connectivity_matrix": "m.npy"},
            "connectivity_matrix: .*received neither",
        ),
        (
            {
                "type": "streamlines",
                "files": "a",
                "connectivity_matrix": "m.npy",
                "connectivity_nb_blocs": 2,
                "connectivity_labels": "l.nii",
            },
            "connectivity_matrix: .*received both",
        ),
        ({"type": "streamlines", "files": "a", "connectivity_nb_blocs": 2}, "requires connectivity_matrix"),
        (
            {"type": "streamlines", "files": "a", "connectivity_matrix": "m", "connectivity_nb_blocs": [2, 0, 3]},
            r"group 'x': connectivity_nb_blocs: expected at least 1, received \(2, 0, 3\)",
        ),
        (
            {"type": "streamlines", "files": "a", "connectivity_matrix": "m", "connectivity_nb_blocs": [2, 2]},
            "group 'x': connectivity_nb_blocs.*2",
        ),
        (3, "group 'x': .*received 3"),
    ],
)
def test_a_config_is_read_strictly(folder, refused, group, message):
    set_config(folder, x=group)
    assert re.search(message, refused())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"a": {"type": "volume", "files": "a"}, "a": {"type": "volume", "files": "b"}}', "duplicate key 'a'"),
        ("{}", "at least one group"),
        ("[1]", "expected|should be"),
        (" " * (1 << 20) + "{}", "larger than any config"),
        ('{"a/b": {"type": "volume", "files": "a"}}', "without '/'"),
        ('{"a\\u0000b": {"type": "volume", "files": "a"}}', "zero bytes"),
    ],
)
def test_a_config_that_is_no_config_is_refused(folder, refused, text, message):
    (folder / "config.json").write_text(text)
    assert re.search(message, refused())


def test_nan_and_infinity_in_a_volume_are_counted(folder, refused):
    def corrupt(data: np.ndarray) -> None:
        data[0, 0, 0] = np.nan
        data[1, 1, 1, 0] = -np.inf

    edit_volume(folder / "subjects" / "s2" / "dwi.nii.gz", corrupt)
    assert re.search(place("input", "dwi.nii.gz") + "5 of 4320 values are NaN or infinite", refused())


@pytest.mark.parametrize("change", ["shape", "affine"])
def test_volumes_of_one_group_lie_on_one_grid(folder, refused, change):
    shape = (12, 10, 8) if change == "shape" else SHAPE
    affine = AFFINE.copy()
    if change == "affine":
        affine[0, 3] += 0.01
    save_volume(folder / "subjects" / "s2" / "fa.nii.gz", np.ones(shape, np.float32), affine)
    set_config(folder, input={"type": "volume", "files": ["dwi.nii.gz", "fa.nii.gz"]})
    words = (
        "a grid of 12 x 10 x 8 voxels, expected 12 x 10 x 9" if change == "shape" else r"the affine .*10\.01.*expected"
    )
    assert re.search(place("input", "fa.nii.gz") + words, refused())
    set_config(folder, other={"type": "volume", "files": "fa.nii.gz"})
    assert re.search(place("other", "fa.nii.gz") + words + ".*as the subject's first volume group", refused())
    set_config(folder, input={**CONFIG["input"], "std_mask": "fa.nii.gz"})
    assert re.search(place("input", "fa.nii.gz") + words, refused())


@pytest.mark.parametrize(("standardization", "value"), [("none", 1), ("none", 255), ("all", 1)])
def test_a_mask_is_no_input(folder, refused, standardization, value):
    mask: Any = nib.load(folder / "subjects" / "s1" / "mask.nii.gz")
    data = (value * (mask.get_fdata() > 0)).astype(np.uint8)
    save_volume(folder / "subjects" / "s1" / "mask.nii.gz", data if value == 255 else data[..., None])
    set_config(folder, input={"type": "volume", "files": "mask.nii.gz", "standardization": standardization})
    assert re.search(place("input", "mask.nii.gz", "s1") + "a mask .zero", refused())


def test_subjects_have_the_same_number_of_features(folder, refused):
    save_volume(folder / "subjects" / "s2" / "dwi.nii.gz", np.ones((*SHAPE, 3), np.float32))
    assert re.search(place("input", "dwi.nii.gz") + "3 features in the group, but subject 's1' has 4", refused())


def test_harmonics_fit_the_features(folder, refused):
    set_config(folder, input={**CONFIG["input"], "sh_order": 2})
    assert "Expected 6 features for spherical harmonics of order 2. Received: 4" in refused()


@pytest.mark.parametrize("shape", [SHAPE[:2], (*SHAPE, 2, 2)])
def test_a_volume_has_three_or_four_axes(folder, refused, shape):
    save_volume(folder / "subjects" / "s2" / "dwi.nii.gz", np.ones(shape, np.float32))
    assert re.search(
        place("input", "dwi.nii.gz")
        + r"(a volume of shape \(12, 10, 9, 2, 2\)|.*grid has 12 x 10 voxels, expected three)",
        refused(),
    )


def test_an_empty_mask_is_refused(folder, refused):
    save_volume(folder / "subjects" / "s2" / "mask.nii.gz", np.zeros(SHAPE, np.uint8))
    assert re.search(place("input", "dwi.nii.gz") + "no voxel in its std_mask", refused())


@pytest.mark.parametrize("name", ["dwi.nii.gz", "bundles/a.trk", "bundles/c.tck", "bundles/d.trx", "matrix.npy"])
@pytest.mark.parametrize("keep", [0, 50, 0.6, 0.99])
def test_a_truncated_file_is_named(folder, refused, name, keep):
    subject = folder / "subjects" / "s2"
    for one in ("s1", "s2"):
        save_lines(folder / "subjects" / one / "bundles" / "c.tck", some_lines(5))
        save_lines(folder / "subjects" / one / "bundles" / "d.trx", some_lines(5))
        np.save(folder / "subjects" / one / "matrix.npy", np.ones((8, 8)))
    keys = {"connectivity_matrix": "matrix.npy", "connectivity_nb_blocs": 2}
    set_config(folder, streamlines={"type": "streamlines", "files": "bundles/*", **keys})
    content = (subject / name).read_bytes()
    (subject / name).write_bytes(content[: keep if keep == 0 or keep > 1 else int(keep * len(content))])
    assert re.search(place("input" if name == "dwi.nii.gz" else "streamlines", name) + "cannot be read as", refused())


NIFTIS = ["dwi.nii.gz", "mask.nii.gz", "labels.nii.gz", "dwi.nii"]
MATRIX = "m.npy"
TRACTOGRAMS = ["a.trk", "a.tck", "a.trx"]


def files_of_all_kinds(folder: Path) -> None:
    """Every kind of file that a config may name, and a config that names them."""
    for one in ("s1", "s2"):
        subject = folder / "subjects" / one
        save_volume(subject / "dwi.nii", np.random.default_rng(0).normal(size=(*SHAPE, 2)).astype(np.float32))
        save_volume(subject / "labels.nii.gz", np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE) % 9)
        np.save(subject / "m.npy", np.ones((8, 8)))
        for name in TRACTOGRAMS:
            save_lines(subject / name, some_lines(5))
    keys = {"connectivity_matrix": "m.npy", "connectivity_labels": "labels.nii.gz"}
    set_config(
        folder,
        input={**CONFIG["input"], "files": ["dwi.nii.gz", "dwi.nii"]},
        streamlines={"type": "streamlines", "files": TRACTOGRAMS, **keys},
    )


@pytest.mark.parametrize("name", [*NIFTIS, *TRACTOGRAMS, MATRIX])
def test_a_file_that_goes_on_after_what_its_header_promises_is_named(folder, refused, name):
    files_of_all_kinds(folder)
    path = folder / "subjects" / "s2" / name
    content = path.read_bytes()
    if name.endswith(".gz"):
        content = gzip.compress(gzip.decompress(content) + bytes(4))
    elif name.endswith(".trx"):
        with zipfile.ZipFile(path) as packed:
            members = {member: packed.read(member) for member in packed.namelist()}
        with zipfile.ZipFile(path, "w") as packed:
            for member, found in members.items():
                packed.writestr(member, found + bytes(12) if "positions" in member else found)
        content = path.read_bytes()
    else:
        content += np.array([1, 2, 3], np.float32).tobytes()
    path.write_bytes(content)
    assert re.search(rf"subject 's2', group '\w+', file [^ ]*/{re.escape(name)}: cannot be read", refused())


@pytest.mark.parametrize(("declared", "is_accepted"), [(0, True), (3, False), (4, False), (6, False), (5, True)])
@pytest.mark.parametrize("name", ["a.trk", "a.tck"])
def test_the_header_has_the_number_of_streamlines(folder, refused, cli, name, declared, is_accepted):
    files_of_all_kinds(folder)
    path = folder / "subjects" / "s2" / name
    content = bytearray(path.read_bytes())
    if name == "a.trk":
        content[988:992] = int(declared).to_bytes(4, "little")
    else:
        content = content.replace(b"count: 0000000005", b"count: %010d" % declared)
        is_accepted = declared == 5  # TRK alone has 0 for a number that is not stored
    path.write_bytes(content)
    if not is_accepted:
        assert re.search(place("streamlines", name) + "cannot be read", refused())
    else:
        paths = [folder / part for part in ("subjects", "config.json", "out.hdf5")]
        assert cli("create-hdf5", *paths, "--training-subjs", folder / "valid.txt").code == 0
        with File(folder / "out.hdf5") as file:
            assert len(file["s2/streamlines/lengths"]) == 15


def test_points_between_the_header_of_a_tck_and_its_offset_are_told(folder, refused):
    files_of_all_kinds(folder)
    path = folder / "subjects" / "s2" / "a.tck"
    header, end, points = path.read_bytes().partition(b"\nEND\n")
    offset = re.search(rb"file: \. ([0-9]+)", header)
    assert offset is not None
    later = b"file: . %d" % (int(offset[1]) + 12)  # past the first point
    path.write_bytes(header.replace(offset[0], later) + end + points)
    assert re.search(place("streamlines", "a.tck") + "cannot be read as TCK .*begin at byte", refused())


@pytest.mark.parametrize("name", ["dwi.nii.gz", "mask.nii.gz", "labels.nii.gz", "a.trx"])
def test_a_file_whose_checksum_does_not_hold_is_named(folder, refused, name):
    """One bit of the compressed bytes, in places drawn from a seed; and of the checksum itself."""
    files_of_all_kinds(folder)
    path, rng = folder / "subjects" / "s2" / name, np.random.default_rng(1)
    good = path.read_bytes()
    first = 60 if name != "a.trx" else good.index(b"positions") + 40
    ends = [len(good) - 7] if name != "a.trx" else []
    last = len(good) - 8 if name != "a.trx" else first + 200
    for place_of_bit in [*rng.integers(first, last, 3), *ends]:
        corrupted = bytearray(good)
        corrupted[place_of_bit] ^= 1 << rng.integers(8)
        path.write_bytes(corrupted)
        assert re.search(rf"file [^ ]*/{re.escape(name)}: cannot be read", refused())


@pytest.mark.parametrize("name", ["dwi.nii.gz", "mask.nii.gz", "labels.nii.gz"])
@pytest.mark.parametrize("kind", [np.complex64, np.complex128])
def test_complex_numbers_are_refused(folder, refused, name, kind):
    files_of_all_kinds(folder)
    save_volume(folder / "subjects" / "s2" / name, np.full((*SHAPE, 4)[: 3 + (name == "dwi.nii.gz")], 1 + 1j, kind))
    assert re.search(rf"file [^ ]*/{re.escape(name)}: a volume of complex numbers", refused())


def test_nan_in_a_mask_is_refused(folder, refused):
    mask = np.ones(SHAPE, np.float32)
    mask[0, 0, 0] = np.nan
    set_config(folder, wm_mask=None)
    save_volume(folder / "subjects" / "s2" / "mask.nii.gz", mask)
    assert re.search(place("input", "mask.nii.gz") + "1 of 1080 values are NaN or infinite", refused())


def test_colours_are_refused(folder, refused):
    save_volume(folder / "subjects" / "s2" / "dwi.nii.gz", np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    assert re.search(place("input", "dwi.nii.gz") + "a volume of colours", refused())


def header_field(name: str, value: Any) -> Callable[[Path], None]:
    """Set a field of the header of a NIfTI or TRK file."""

    def change(path: Path) -> None:
        is_trk, is_gz = path.suffix == ".trk", path.suffix == ".gz"
        content = bytearray(gzip.decompress(path.read_bytes()) if is_gz else path.read_bytes())
        kind = trk.header_2_dtype if is_trk else nib.nifti1.header_dtype  # type: ignore[attr-defined]
        header: Any = np.frombuffer(content[: kind.itemsize], kind.newbyteorder("<")).copy()
        header[name] = value
        content[: kind.itemsize] = header.tobytes()
        path.write_bytes(gzip.compress(content) if is_gz else content)

    return change


def trx_header(**fields: Any) -> Callable[[Path], None]:
    return trx_members(lambda members: {"header.json": json.dumps(json.loads(members["header.json"]) | fields)})


def trx_members(change: Callable[[dict[str, bytes]], dict[str, Any]]) -> Callable[[Path], None]:
    """Write a TRX again with changed members; None leaves one out."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path) as packed:
            members = {member: packed.read(member) for member in packed.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
            for member, content in (members | change(members)).items():
                if content is not None:
                    packed.writestr(member, content)

    return write


def rename_positions(members: dict[str, bytes]) -> dict[str, Any]:
    name = next(name for name in members if name.startswith("positions"))
    return {name: None, "positions.3.int32": np.zeros(len(members[name]) // 4, np.int32).tobytes()}


def duplicate_key(members: dict[str, bytes]) -> dict[str, Any]:
    return {"header.json": members["header.json"].replace(b"{", b'{"NB_STREAMLINES": 5,', 1)}


def member_twice(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as packed, pytest.warns(UserWarning, match="Duplicate name"):
        packed.writestr("header.json", "{}")


def outside_the_mask(path: Path) -> None:
    """Too large for float32, where nobody looks: fine in float64, and infinite in the dataset."""
    data = np.random.default_rng(0).normal(size=(*SHAPE, 4))
    data[-1, -1, -1, -1] = 1e300
    save_volume(path, data)


HOSTILE = {
    "units": ("dwi.nii.gz", header_field("xyzt_units", 3), "the header gives lengths in micrometres. Expected mm"),
    "metres": ("dwi.nii.gz", header_field("xyzt_units", 1), "the header gives lengths in metres. Expected mm"),
    "offset": ("dwi.nii.gz", header_field("vox_offset", -4), "cannot be read as NIfTI .vox offset -4 too low"),
    "huge": ("dwi.nii.gz", header_field("dim", [4, 9999, 9999, 9999, 4, 1, 1, 1]), r"it unpacks to \d+ bytes, from"),
    "too large": ("dwi.nii.gz", outside_the_mask, "1 of 6480 values are NaN or infinite"),
    "magic": ("a.trk", header_field("magic_number", b"TRICK"), "does not begin with the 1000 bytes of a header"),
    "no size": ("a.trk", header_field("voxel_sizes", 0), "header has voxels of .0.0, 0.0, 0.0. mm, and an affine"),
    "other size": ("a.trk", header_field("voxel_sizes", [2, 1.5, 3.1]), "header has voxels of .2.0, 1.5, 3.0999"),
    "no affine": ("a.trk", header_field("voxel_to_rasmm", 0), "header has no vox_to_ras"),
    "version 1": ("a.trk", header_field("version", 1), "header has no vox_to_ras"),
    "properties": ("a.trk", header_field("nb_properties_per_streamline", 32767), "cannot be read as TRK"),
    "part": ("a.trx", trx_header(DIMENSIONS=[12.5, 10, 9]), "grid has 12.5 x 10.0 x 9.0 voxels"),
    "four": ("a.trx", trx_header(DIMENSIONS=[12, 10, 9, 4]), "DIMENSIONS of .12, 10, 9, 4., expected three numbers"),
    "half": ("a.trx", trx_header(NB_STREAMLINES=5.5), "of 5.5 streamlines, expected whole numbers"),
    "nothing": ("a.trx", trx_members(lambda members: {"header.json": "[]"}), "no VOXEL_TO_RASMM, DIMENSIONS, NB_"),
    "key twice": ("a.trx", trx_members(duplicate_key), "header.json: duplicate key 'NB_STREAMLINES'"),
    "array twice": (
        "a.trx",
        trx_members(lambda _: {f"dps/a.{kind}": b"" for kind in ("int8", "uint8")}),
        "dps/ have one",
    ),
    "member twice": ("a.trx", member_twice, "the archive has two files of one name"),
    "whole mm": ("a.trx", trx_members(rename_positions), "positions.3.int32: expected float numbers"),
    "bomb": ("a.trx", trx_members(lambda members: {"dpv/x.uint8": bytes(1 << 27)}), r"it unpacks to \d+ bytes, from"),
    "after": ("a.trx", lambda path: path.write_bytes(path.read_bytes() + b"1234"), "continues after the end"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_contradicts_itself_is_named(folder, refused, case):
    name, change, told = HOSTILE[case]
    files_of_all_kinds(folder)
    change(folder / "subjects" / "s2" / name)
    assert re.search(rf"file [^ ]*/{re.escape(name)}: .*{told}", refused())


def test_a_broken_link_is_called_one(folder, refused):
    path = folder / "subjects" / "s2" / "dwi.nii.gz"
    path.unlink()
    path.symlink_to(folder / "moved")
    assert re.search(place("input", "dwi.nii.gz") + f"the file does not exist: .* is a broken link, to {folder}/moved",
                     refused())  # fmt: skip
    (folder / "subjects" / "s2" / "bundles" / "b.trk").unlink()
    (folder / "subjects" / "s2" / "bundles" / "b.trk").symlink_to("gone.trk")
    path.unlink()
    save_volume(path, np.ones((*SHAPE, 4), np.float32) * np.arange(1, 5, dtype=np.float32))
    assert re.search(place("streamlines", "bundles/b.trk") + ".* is a broken link, to gone.trk", refused())


def test_one_folder_under_two_names_is_named(folder, refused):
    """Else a subject would be in training and in validation."""
    shutil.rmtree(folder / "subjects" / "s2")
    (folder / "subjects" / "s2").symlink_to("s1")
    assert "Subjects 's1' and 's2' are one folder. Expected each subject once" in refused()


def test_one_file_under_two_names_is_named(folder, refused):
    (folder / "subjects" / "s1" / "bundles" / "c.trk").symlink_to("a.trk")
    assert re.search(place("streamlines", "bundles/c.trk", "s1") + "two entries .* the same as .*/a.trk", refused())


def test_a_file_of_another_kind_is_named(folder, refused):
    (folder / "subjects" / "s1" / "dwi.txt").write_text("1 2 3")
    set_config(folder, input={"type": "volume", "files": "dwi.txt"}, wm_mask=None)
    (folder / "valid.txt").write_text("")
    assert re.search(place("input", "dwi.txt", "s1") + "expected a NIfTI file", refused())
    set_config(folder, streamlines={"type": "streamlines", "files": "dwi.txt"})
    assert re.search(place("streamlines", "dwi.txt", "s1") + "expected a tractogram", refused())


@pytest.mark.parametrize("suffix", [".trk", ".trx"])
@pytest.mark.parametrize("change", ["shape", "affine"])
def test_a_tractogram_of_another_space_is_named(folder, refused, suffix, change):
    shape, affine = ((12, 10, 10), AFFINE) if change == "shape" else (SHAPE, AFFINE + np.eye(4, k=1) * 0.01)
    save_lines(folder / "subjects" / "s2" / "bundles" / f"a{suffix}", some_lines(5), affine=affine, shape=shape)
    set_config(folder, streamlines={"type": "streamlines", "files": ["bundles/*"]})
    words = "a grid of 12 x 10 x 10 voxels, expected 12 x 10 x 9" if change == "shape" else "the affine .*expected"
    assert re.search(place("streamlines", f"bundles/a{suffix}") + words, refused())


@pytest.mark.parametrize("suffix", [".trk", ".tck", ".trx"])
def test_an_empty_tractogram_is_named(folder, refused, suffix):
    name = f"bundles/empty{suffix}"
    for one in ("s1", "s2"):
        save_lines(folder / "subjects" / one / name, some_lines(2) if one == "s1" else [])
    set_config(folder, streamlines={"type": "streamlines", "files": "bundles/*"})
    assert re.search(place("streamlines", name) + "an empty tractogram", refused())


@pytest.mark.parametrize("suffix", [".trk", ".tck", ".trx"])
def test_an_empty_bundle_is_passed_over_on_request_with_a_word(folder, refused, cli, suffix):
    for one in ("s1", "s2"):
        save_lines(folder / "subjects" / one / f"bundles/0_empty{suffix}", [] if one == "s2" else some_lines(2, 5))
    set_config(folder, streamlines={"type": "streamlines", "files": "bundles/*"})
    assert "Pass it over with --allow-empty" in refused()
    paths = [folder / part for part in ("subjects", "config.json", "out.hdf5")]
    outcome = cli("create-hdf5", *paths, "--training-subjs", folder / "valid.txt", "--allow-empty")
    assert outcome.code == 0
    assert re.search(
        place("streamlines", f"bundles/0_empty{suffix}") + "an empty tractogram. It is passed over", outcome.err
    )
    with File(folder / "out.hdf5") as file:
        assert len(file["s2/streamlines/lengths"]) == 10
        assert list(file["s2/streamlines"].attrs["bundle_names"]) == ["a", "b"]
    assert cli("info", folder / "out.hdf5").code == 0


def test_a_group_of_empty_bundles_alone_is_refused_still(folder, refused):
    for path in (folder / "subjects" / "s2" / "bundles").iterdir():
        save_lines(path, [])
    assert "no valid streamline is left" in refused("--allow-empty")
    assert "no valid streamline is left" in refused("--remove-invalid")


@pytest.mark.parametrize("turn", [np.diag([-1.0, 1, 1]), np.eye(3)[[1, 0, 2]]])
def test_subjects_of_different_orientation_are_refused(folder, refused, turn):
    other = np.eye(4)
    other[:3, :3] = turn
    affine = AFFINE @ other
    subject = folder / "subjects" / "s2"
    for name, shape in (("dwi.nii.gz", (*SHAPE, 4)), ("mask.nii.gz", SHAPE)):
        save_volume(subject / name, np.random.default_rng(0).normal(9, 1, shape).astype(np.float32), affine)
    inside = [apply_affine(affine, np.linspace([3, 3, 3], [6, 5, 5], 9)).astype(np.float32)]
    for path in (subject / "bundles").iterdir():
        save_lines(path, inside, affine=affine)
    assert re.search(
        "subject 's2': the orientation ... of the voxel axes, expected ..., as subject 's1' has", refused()
    )


def test_labels_and_matrix_fit(folder, refused):
    files_of_all_kinds(folder)  # labels 1 to 8, matrices of 8 rows
    np.save(folder / "subjects" / "s2" / "m.npy", np.ones((7, 7)))
    assert re.search(place("streamlines", "m.npy") + "a matrix of 7 rows. Expected 8, one for each label", refused())
    np.save(folder / "subjects" / "s2" / "m.npy", np.ones((8, 8)))
    labels = folder / "subjects" / "s2" / "labels.nii.gz"
    save_volume(labels, np.full(SHAPE, 312_782_566, np.int32))
    assert re.search("m.npy: a matrix of 8 rows. Expected 1, one for each label \\(up to 312782566\\)", refused())
    save_volume(labels, np.zeros(SHAPE, np.int32))
    assert re.search("m.npy: labels without any region", refused())


@pytest.mark.parametrize("key", ["", "a/", "/a", "a//b", ".", "a/..", "a\0b"])
def test_a_key_that_hdf5_cannot_keep_is_refused(folder, refused, key):
    set_config(folder, streamlines={**CONFIG["streamlines"], "dps_keys": [key]})
    assert f"dps_keys: {key!r}: expected a name" in refused()


def test_keys_of_which_one_is_a_folder_of_the_other_are_refused(folder, refused):
    set_config(folder, streamlines={**CONFIG["streamlines"], "dps_keys": ["a", "a/b"]})
    assert "HDF5 cannot keep both" in refused()


def test_a_tck_needs_a_volume(folder, refused):
    for one in ("s1", "s2"):
        save_lines(folder / "subjects" / one / "lines.tck", some_lines(2))
    (folder / "config.json").write_text(json.dumps({"s": {"type": "streamlines", "files": "lines.tck"}}))
    assert re.search(place("s", "lines.tck", "s1") + "a TCK file does not say on which grid it lies", refused())


def test_data_per_streamline_that_is_not_there_is_named(folder, refused):
    set_config(folder, streamlines={**CONFIG["streamlines"], "dps_keys": ["weight"]})
    expected = place("streamlines", "bundles/a.trk", "s1") + "no data per streamline named weight. The file has: none"
    assert re.search(expected, refused())


def test_a_matrix_fits_its_blocs(folder, refused):
    for one, size in (("s1", 8), ("s2", 7)):
        np.save(folder / "subjects" / one / "m.npy", np.ones((size, size)))
    keys = {"connectivity_matrix": "m.npy", "connectivity_nb_blocs": 2}
    set_config(folder, streamlines={**CONFIG["streamlines"], **keys})
    assert re.search(place("streamlines", "m.npy") + "a matrix of 7 rows. Expected 8", refused())
    np.save(folder / "subjects" / "s2" / "m.npy", np.ones((8, 7)))
    assert "Expected a square one" in refused()
    np.save(folder / "subjects" / "s2" / "m.npy", np.full((8, 8), "1"))
    assert re.search(place("streamlines", "m.npy") + "expected a matrix of numbers in .npy", refused())
    set_config(folder, streamlines={**CONFIG["streamlines"], **keys, "connectivity_matrix": "*.n[ip]*"})
    told = place("streamlines", "fa.nii.gz", "s1") + r"'\*.n\[ip\]\*' also gives \S*/s1/dwi.nii.gz. Expected one file"
    assert re.search(told, refused())


def test_a_file_given_twice_is_named(folder, refused):
    set_config(folder, streamlines={"type": "streamlines", "files": ["bundles/a.trk", "bundles/*.trk"]})
    assert re.search(place("streamlines", "bundles/a.trk", "s1") + "two entries", refused())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step-size", "0.5", "--nb-points", "12"], "at most one of step_size, nb_points and compress"),
        (["--step-size", "0"], "step_size"),
        (["--nb-points", "1"], "nb_points"),
        (["--nb-points", 10**20], "nb_points: expected a whole number of at most 1000000"),
        (["--nb-points", "1000001"], "nb_points"),
        (["--step-size", "1e-300"], "step_size: a streamline of .* mm would have more than 1000000 points"),
        (["--compress", "-1"], "compress"),
    ],
)
def test_options_that_make_no_sense_are_refused(refused, options, message):
    assert re.search(message, refused(*map(str, options)))


def invalid_lines() -> list[np.ndarray]:
    outside = apply_affine(AFFINE, [[5, 5, 5], [5, 5, 9.2]])
    infinite = apply_affine(AFFINE, [[5, 5, 5], [5, np.nan, 5]])
    point, still = apply_affine(AFFINE, [[5, 5, 5]]), apply_affine(AFFINE, [[5, 5, 5], [5, 5, 5]])
    one, two, three = some_lines(3, 7)
    return [line.astype(np.float32) for line in (one, outside, infinite, two, point, still, outside, three)]


def test_invalid_streamlines_are_counted_or_removed(folder, refused, capfd):
    save_lines(folder / "subjects" / "s2" / "bundles" / "c.trk", invalid_lines())
    found = (
        place("streamlines", "bundles/c.trk")
        + "5 of 8 streamlines are invalid: 2 outside the volume of 12 x 10 x 9 voxels, 1 with NaN or infinite points, "
        + "2 of no length"
    )
    assert re.search(found + r"\. Correct the file, or leave them out with --remove-invalid", refused())
    paths = [str(folder / name) for name in ("subjects", "config.json", "out.hdf5")]
    assert main(["create-hdf5", *paths, "--training-subjs", str(folder / "valid.txt"), "--remove-invalid"]) == 0
    assert re.search(found + r"\. They are left out\.\n$", capfd.readouterr().err)
    with File(folder / "out.hdf5") as file:
        kept = [*some_lines(7, 10), *some_lines(3, 11), *some_lines(3, 7)]
        assert file["s2/streamlines/lengths"][:].tolist() == [len(line) for line in kept]
    assert main(["info", paths[2]]) == 0


def test_a_group_without_a_valid_streamline_is_refused(folder, refused):
    for path in (folder / "subjects" / "s2" / "bundles").iterdir():
        path.unlink()
    save_lines(folder / "subjects" / "s2" / "bundles" / "c.trk", invalid_lines()[1:3])
    assert re.search(place("streamlines", "bundles/c.trk") + "no valid streamline is left", refused("--remove-invalid"))


def test_an_existing_file_stays_unless_it_shall_be_replaced(folder, refused):
    (folder / "out.hdf5").write_text("old")
    assert "The file exists" in refused()
    (folder / "subjects" / "s2" / "dwi.nii.gz").write_bytes(b"")
    assert "cannot be read as NIfTI" in refused("--overwrite")
    assert (folder / "out.hdf5").read_text() == "old"


@pytest.mark.parametrize("limit", [1_000, 30_000, 70_000])
def test_a_full_disk_leaves_nothing(folder, limit):
    arguments = make_folder(folder)
    before = sorted(folder.rglob("*"))
    code = (
        "import resource, sys; from dwiml_func.cli.main import main; import dwiml_func.data.creation.create;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(main(sys.argv[1:]))"
    )
    done = finished(start_program(code, "create-hdf5", *arguments))
    assert (done.returncode, done.out, done.err.count("\n")) == (2, "", 1), done.err
    assert re.search(r"out\.hdf5: cannot be written, .*[Dd]isk", done.err), done.err
    assert sorted(folder.rglob("*")) == before
