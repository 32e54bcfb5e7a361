from __future__ import annotations

import math
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from dwiml_func.data.bundles import Bundles
from dwiml_func.data.hdf5.read import open_dataset, read_subsets
from dwiml_func.data.hdf5.subject import read_subject_streamlines
from dwiml_func.data.hdf5.write import new_dataset, write_streamlines, write_volume
from dwiml_func.data.inspection.inspect import inspect_dataset

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Callable[[Any], object]], Path]:
    """A copy of the phantom, changed by a function of the open file."""

    def edit(change: Callable[[Any], object]) -> Path:
        path = tmp_path / "edited.hdf5"
        shutil.copy(PHANTOM, path)
        with h5py.File(path, "r+") as file:
            change(file)
        return path

    return edit


def replace(group: Any, name: str, data: object) -> None:
    del group[name]
    group[name] = data


def one_line_error(path: Path, subset: Any = "training", **names: Any) -> str:
    with pytest.raises(ValueError, match=re.escape(str(path))) as raised:
        open_dataset(path, subset, **names)
    message = str(raised.value)
    assert "\n" not in message
    return message


def one_line_problem(path: Path) -> str:
    """The error of `open_dataset`, which is one of the problems that `dwiml-func info` tells."""
    message = one_line_error(path)
    assert message.removeprefix(f"{path}: ") in map(str, inspect_dataset(path).problems)
    return message


def test_the_references_file_is_read_as_it_stands():
    dataset = open_dataset(PHANTOM)
    assert dataset.index.subjects == ("subj0", "subj1")
    assert dataset.index.num_streamlines.tolist() == [48, 48]
    assert dataset.num_features == 6
    assert torch.equal(dataset.voxel_sizes, torch.ones(2, 3))
    assert len(dataset.streamlines) == 96
    with h5py.File(PHANTOM) as file:
        contents: Any = file
        for row, subject in enumerate(dataset.index.subjects):
            assert np.array_equal(dataset.volumes[row].numpy(), contents[subject]["input/data"][()])
            stored = contents[subject]["streamlines"]
            lines = dataset.streamlines.select(np.arange(48) + 48 * row).to_list()
            for line, offset, length in zip(lines, stored["offsets"], stored["lengths"], strict=True):
                assert np.array_equal(line.numpy(), stored["data"][offset : offset + length])
    assert dataset.streamlines.points.dtype == torch.float32
    assert dataset.streamlines.offsets.dtype == torch.int64


def test_attributes_of_the_input_come_as_plain_values():
    attributes = open_dataset(PHANTOM).input_attributes
    assert attributes["type"] == "volume"
    assert type(attributes["nb_features"]) is int
    assert isinstance(attributes["affine"], np.ndarray)


def test_subsets_are_read_by_name():
    assert read_subsets(PHANTOM) == {"training": ("subj0", "subj1"), "validation": ("subj2",), "testing": ()}
    assert open_dataset(PHANTOM, "validation").index.subjects == ("subj2",)


@pytest.mark.parametrize("subset", ["validation", "testing"])
def test_a_subset_without_subjects_is_an_empty_dataset(edited, subset):
    dataset = open_dataset(edited(lambda file: file.attrs.pop(f"{subset}_subjs")), subset)
    assert dataset.index.subjects == ()
    assert dataset.index.num_total == len(dataset.streamlines) == 0
    assert dataset.voxel_sizes.shape == (0, 3)
    assert dataset.num_features == 0


def test_another_volume_group_can_be_the_input():
    assert open_dataset(PHANTOM, input_group_name="wm_mask").num_features == 1


def test_a_dataset_survives_pickling():
    dataset = open_dataset(PHANTOM)
    back = pickle.loads(pickle.dumps(dataset))
    assert back.index.subjects == dataset.index.subjects
    assert torch.equal(back.streamlines.points, dataset.streamlines.points)
    assert torch.equal(back.volumes[1], dataset.volumes[1])


def test_streamlines_need_not_be_stored_back_to_back_nor_in_order(edited):
    def spread_out(file: Any) -> None:
        for subject in ("subj0", "subj1"):
            group = file[subject]["streamlines"]
            data, offsets, lengths = (group[name][()] for name in ("data", "offsets", "lengths"))
            junk = np.full((5, 3), np.nan, dtype=np.float32)  # not of any streamline: must neither show nor be refused
            parts, new_offsets, size = [junk], np.zeros_like(offsets), len(junk)
            for i in reversed(range(len(offsets))):
                new_offsets[i] = size
                parts += [data[offsets[i] : offsets[i] + lengths[i]], junk]
                size += lengths[i] + len(junk)
            replace(group, "data", np.concatenate(parts))
            replace(group, "offsets", new_offsets)

    found, expected = open_dataset(edited(spread_out)).streamlines, open_dataset(PHANTOM).streamlines
    assert torch.equal(found.points, expected.points)
    assert torch.equal(found.offsets, expected.offsets)


def test_points_after_the_last_streamline_are_left_out(edited):
    def append(file: Any) -> None:
        group = file["subj0/streamlines"]
        replace(group, "data", np.concatenate([group["data"][()], np.full((4, 3), np.nan, dtype=np.float32)]))

    found = open_dataset(edited(append)).streamlines
    assert torch.equal(found.points, open_dataset(PHANTOM).streamlines.points)


def test_short_integers_do_not_overflow(edited):
    num = 500

    def shorten(file: Any) -> None:
        group = file["subj2/streamlines"]
        replace(group, "data", np.zeros((num * 100, 3)))  # float64, and more points than int16 can count
        replace(group, "lengths", np.full(num, 100, dtype=np.int16))
        replace(group, "offsets", (np.arange(num) * 100).astype(np.uint16))

    lines = open_dataset(edited(shorten), "validation").streamlines
    assert lines.offsets.tolist() == (np.arange(num + 1) * 100).tolist()


def test_a_subject_may_have_no_streamlines_unless_none_has(edited):
    def empty(file: Any, *subjects: str) -> None:
        for subject in subjects:
            group = file[subject]["streamlines"]
            replace(group, "data", np.zeros(0))
            replace(group, "lengths", np.zeros(0, dtype=np.int64))
            replace(group, "offsets", np.zeros(0, dtype=np.int64))

    path = edited(lambda file: empty(file, "subj0"))
    assert open_dataset(path).index.num_streamlines.tolist() == [0, 48]
    path = edited(lambda file: empty(file, "subj0", "subj1"))
    assert "no streamlines in group 'streamlines'" in one_line_error(path)


# --- what is refused, each in one line that names the file ---


def test_a_missing_file(tmp_path):
    path = tmp_path / "none.hdf5"
    for read in (open_dataset, read_subsets):
        with pytest.raises(FileNotFoundError, match=f"does not exist: {re.escape(str(path))}$"):
            read(path)


def test_a_folder(tmp_path):
    assert "not a file" in one_line_error(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not HDF5\n" * 500])
def test_a_file_of_another_kind(tmp_path, content):
    path = tmp_path / "text.hdf5"
    path.write_bytes(content)
    assert "Expected an HDF5 file" in one_line_error(path)


@pytest.mark.parametrize("size", [100, 5_000, 600_000, PHANTOM.stat().st_size - 1])
def test_a_truncated_file(tmp_path, size):
    path = tmp_path / "cut.hdf5"
    path.write_bytes(PHANTOM.read_bytes()[:size])
    assert "truncated or corrupt" in one_line_error(path)


def test_corruption_that_shows_only_when_data_are_read(tmp_path):
    path = tmp_path / "corrupt.hdf5"
    with h5py.File(PHANTOM) as source, h5py.File(path, "w") as target:
        contents: Any = source
        target.attrs["training_subjs"] = ["subj0"]
        contents.copy("subj0/streamlines", target.create_group("subj0"))
        group = target.create_group("subj0/input")
        group.attrs.update(contents["subj0/input"].attrs)
        data = group.create_dataset("data", data=contents["subj0/input/data"][()], fletcher32=True, chunks=True)
        address = data.id.get_chunk_info(0).byte_offset
    with path.open("r+b") as file:
        file.seek(address + 10)
        file.write(b"\xff\xff")
    assert "truncated or corrupt" in one_line_error(path)
    with pytest.raises(ValueError, match=f"truncated or corrupt: {re.escape(str(path))}"):
        open_dataset(path, lazy=True).volumes[0]
    found = inspect_dataset(path)  # the other group is looked at all the same
    assert list(found.subjects["subj0"]) == ["streamlines"]
    assert [str(problem).partition(" (")[0] for problem in found.problems] == [
        "subject 'subj0', group 'input': corrupt, cannot be read"
    ]


@pytest.mark.parametrize("empty", [np.array([]), None])
def test_a_file_without_training_subjects(edited, empty):
    def change(file: Any) -> None:
        del file.attrs["training_subjs"]
        if empty is not None:
            file.attrs["training_subjs"] = empty

    assert "no training subjects" in one_line_problem(edited(change))


def test_a_subject_listed_but_absent(edited):
    def change(file: Any) -> None:
        del file["subj1"]

    assert "'subj1'" in one_line_problem(edited(change))


def test_a_subject_listed_twice(edited):
    path = edited(lambda file: file.attrs.create("training_subjs", ["subj0", "subj1", "subj0"]))
    assert "subject 'subj0': listed twice in the training subset" in one_line_problem(path)


def test_an_unknown_subset():
    with pytest.raises(ValueError, match=r"^subset: expected one of training, validation, testing, received 'train'"):
        open_dataset(PHANTOM, "train")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("option", ["input_group_name", "streamline_group_name"])
def test_a_group_that_does_not_exist_names_those_that_do(option):
    message = one_line_error(PHANTOM, **{option: "fodf"})
    assert "subject 'subj0': group 'fodf' does not exist" in message
    assert "input (volume), streamlines (streamlines), wm_mask (volume)" in message


def test_a_group_of_the_wrong_type():
    message = one_line_error(PHANTOM, input_group_name="streamlines")
    assert "has type 'streamlines'. Expected a group of type 'volume'" in message
    message = one_line_error(PHANTOM, streamline_group_name="wm_mask")
    assert "has type 'volume'. Expected a group of type 'streamlines'" in message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_streamlines_that_are_not_finite(edited, value):
    def change(file: Any) -> None:
        group = file["subj1/streamlines"]
        for streamline in (7, 9):
            group["data"][group["offsets"][streamline], 1] = value  # the first point of the streamline

    message = one_line_problem(edited(change))
    assert "subject 'subj1'" in message
    assert "2 of 48 streamlines have NaN or infinite points; the first is number 7 " in message


def test_points_beyond_float32_are_refused_as_infinite(edited):
    def change(file: Any) -> None:
        group = file["subj0/streamlines"]
        data = group["data"][()].astype(np.float64)
        data[-1, 2] = 1e300
        replace(group, "data", data)

    assert "1 of 48 streamlines have NaN or infinite points; the first is number 47 " in one_line_problem(
        edited(change)
    )


@pytest.mark.parametrize("length", [-1, 0, 1])
def test_streamlines_with_fewer_than_two_points(edited, length):
    def change(file: Any) -> None:
        file["subj0/streamlines/lengths"][5] = length

    message = one_line_problem(edited(change))
    assert "subject 'subj0'" in message
    assert "1 of 48 streamlines have fewer than two points; the first is number 5 " in message


@pytest.mark.parametrize("offset", [-1, 2246, 2255, 10**12, 2**63 - 1])
def test_offsets_outside_the_data(edited, offset):
    def change(file: Any) -> None:
        file["subj0/streamlines/offsets"][11] = offset
        file["subj0/streamlines/lengths"][11] = 10

    message = one_line_problem(edited(change))
    assert "1 of 48 streamlines lie outside the 2255 points stored; the first is number 11 " in message


def test_a_streamline_may_end_with_the_data(edited):
    def change(file: Any) -> None:
        file["subj0/streamlines/offsets"][11] = 2245
        file["subj0/streamlines/lengths"][11] = 10

    lines = open_dataset(edited(change)).streamlines.to_list()
    assert torch.equal(lines[11], lines[47][-10:])


def test_volumes_with_another_number_of_features(edited):
    def change(file: Any) -> None:
        group = file["subj1/input"]
        replace(group, "data", group["data"][..., :5])

    message = one_line_problem(edited(change))
    assert "subject 'subj1', group 'input': 5 features, but subject 'subj0' has 6" in message


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_volume_that_is_not_finite(edited, value):
    def change(file: Any) -> None:
        file["subj1/input/data"][3, 4, 5, :2] = value

    message = one_line_problem(edited(change))
    assert "subject 'subj1', group 'input': 2 of 82944 values are NaN or infinite" in message


@pytest.mark.parametrize(
    ("name", "value"), [("space", "Space.RASMM"), ("space", "Space.VOXMM"), ("origin", "Origin.NIFTI")]
)
def test_streamlines_in_another_space(edited, name, value):
    path = edited(lambda file: file["subj1/streamlines"].attrs.create(name, value))
    assert f"subject 'subj1', group 'streamlines': attribute '{name}' is {value}. Expected" in one_line_problem(path)


def test_the_space_may_be_spelt_as_dipys_values(edited):
    def change(file: Any) -> None:
        for subject in ("subj0", "subj1"):
            file[subject]["streamlines"].attrs["space"] = "vox"
            file[subject]["streamlines"].attrs["origin"] = np.bytes_("corner")

    assert len(open_dataset(edited(change)).streamlines) == 96


@pytest.mark.parametrize("name", ["space", "origin", "dimensions", "affine", "voxel_sizes"])
def test_streamlines_without_an_attribute(edited, name):
    path = edited(lambda file: file["subj0/streamlines"].attrs.pop(name))
    assert f"no attribute '{name}'" in one_line_problem(path)


@pytest.mark.parametrize(
    "sizes", [[1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0], [1.0], [[2.0] * 3] * 2, "2"]
)
def test_voxels_without_a_size(edited, sizes):
    path = edited(lambda file: file["subj0/streamlines"].attrs.create("voxel_sizes", sizes))
    assert "subject 'subj0', group 'streamlines': attribute 'voxel_sizes' is" in one_line_problem(path)


def test_streamlines_on_another_grid_than_the_volume(edited):
    path = edited(lambda file: file["subj0/streamlines"].attrs.create("dimensions", [24, 24, 25]))
    assert "a grid of 24 x 24 x 25 voxels, expected 24 x 24 x 24, as group 'input' has" in one_line_problem(path)

    def shift(file: Any) -> None:
        affine = file["subj0/input"].attrs["affine"]
        affine[0, 3] += 0.5
        file["subj0/input"].attrs["affine"] = affine

    assert "group 'streamlines': the affine [[1.0, " in one_line_problem(edited(shift))


@pytest.mark.parametrize("name", ["data", "offsets", "lengths"])
def test_streamlines_without_a_dataset(edited, name):
    path = edited(lambda file: file["subj0/streamlines"].pop(name))
    assert f"no dataset '{name}'" in one_line_problem(path)


@pytest.mark.parametrize(
    ("place", "name", "data", "expected"),
    [
        ("subj0/input", "data", np.zeros((24, 24, 24)), "data of shape (24, 24, 24). Expected (X, Y, Z, features)"),
        ("subj0/input", "data", np.zeros((24, 24, 24, 0)), "data of shape (24, 24, 24, 0)"),
        ("subj0/input", "data", "text", "'data' is of dtype object. Expected numbers"),
        ("subj0/streamlines", "data", np.zeros((2255, 2)), "points of shape (2255, 2). Expected (points, 3)"),
        ("subj0/streamlines", "lengths", np.full(48, 2.5), "'lengths' is of dtype float64. Expected integers"),
        ("subj0/streamlines", "lengths", np.full(47, 2), "offsets of shape (48,) and lengths of shape (47,)"),
    ],
)
def test_data_of_the_wrong_shape_or_kind(edited, place, name, data, expected):
    assert expected in one_line_problem(edited(lambda file: replace(file[place], name, data)))


# --- values at the very end of what is stored ---


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
@pytest.mark.parametrize("lazily", [False, True])
def test_the_last_value_of_a_large_volume_is_checked_too(edited, dtype, lazily):
    def change(file: Any) -> None:
        data = np.zeros((24, 24, 24, 320), dtype=dtype)  # more than is checked at once
        data[-1, -1, -1, -1] = np.nan
        for subject in ("subj0", "subj1"):
            replace(file[subject]["input"], "data", data if subject == "subj1" else np.zeros_like(data))

    path = edited(change)
    with pytest.raises(ValueError, match="subject 'subj1', group 'input': 1 of 4423680 values are NaN"):
        open_dataset(path, lazy=lazily).volumes[1]


@pytest.mark.parametrize("removed", [("subj0",), ("subj1",), ("subj0", "subj1"), ()])
def test_lengths_in_mm_are_known_only_where_every_subject_has_them(edited, removed):
    def change(file: Any) -> None:
        for subject in removed:
            del file[subject]["streamlines/euclidean_lengths"]

    lengths = open_dataset(edited(change)).index.lengths_mm
    assert lengths is None if removed else len(lengths) == 96  # pyright: ignore[reportArgumentType]


def name_bundles(group: Any, names: object = ("left", "right"), ids: object = (0, 1)) -> None:
    group.attrs["bundle_names"] = names
    group["bundle_ids"] = np.resize(np.array(ids, np.int32), len(group["lengths"]))


def test_bundles_of_the_same_name_are_one_for_all_subjects(edited):
    def change(file: Any) -> None:
        name_bundles(file["subj0/streamlines"])
        name_bundles(file["subj1/streamlines"], ("right", "third"), (1, 0, 0))

    for lazily in (False, True):
        bundles = open_dataset(edited(change), lazy=lazily).bundles
        assert bundles is not None
        assert bundles.names == ("left", "right", "third")
        assert bundles.ids.tolist() == [0, 1] * 24 + [2, 1, 1] * 16


@pytest.mark.parametrize("named", [("subj0",), ()])
def test_bundles_are_known_only_where_every_subject_has_them(edited, named):
    assert open_dataset(edited(lambda file: [name_bundles(file[s]["streamlines"]) for s in named])).bundles is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda group: name_bundles(group, ids=(0, 2)), "24 of 48 streamlines are of a bundle that is none of the 2"),
        (lambda group: name_bundles(group, ids=(0, -1)), "24 of 48 streamlines are of a bundle that is none of the 2"),
        (lambda group: name_bundles(group, names=("a", "a")), "Expected names, each once"),
        (lambda group: name_bundles(group, names=(1, 2)), "Expected names, each once"),
        (lambda group: group.create_dataset("bundle_ids", data=[0, 1]), "no attribute 'bundle_names'"),
        (lambda group: group.create_dataset("bundle_ids", data=[0.5]), "dtype float64. Expected integers"),
    ],
)
def test_bundles_that_do_not_fit(edited, change, problem):
    message = one_line_problem(edited(lambda file: change(file["subj1/streamlines"])))
    assert "subject 'subj1', group 'streamlines'" in message
    assert problem in message


def test_bundle_ids_of_another_number_of_streamlines(edited):
    def change(file: Any) -> None:
        name_bundles(file["subj1/streamlines"])
        replace(file["subj1/streamlines"], "bundle_ids", np.zeros(47, np.int64))

    assert "bundle_ids of shape (47,). Expected (48,)" in one_line_problem(edited(change))


def test_lengths_of_some_streamlines_only_are_none(edited):
    def change(file: Any) -> None:
        group = file["subj1/streamlines"]
        replace(group, "euclidean_lengths", group["euclidean_lengths"][:-1])

    assert open_dataset(edited(change)).index.lengths_mm is None


# --- subjects that differ, and values that lie elsewhere ---

ROTATED = np.array([[0.0, -2, 0, 10], [3, 0, 0, -5], [0, 0, 4, 1], [0, 0, 0, 1]])  # voxels of 3 x 2 x 4 mm
FINER = ROTATED @ np.diag([0.5, 0.5, 0.25, 1])
NAMES = tuple(f"bundle {number}" for number in range(300))


@pytest.fixture
def differing(tmp_path: Path) -> Path:
    """Two subjects with voxels of their own, the first one standardised; the third has no streamlines."""
    path, rng = tmp_path / "differing.hdf5", np.random.default_rng(0)
    with new_dataset(path, training=["a", "b"], validation=["c"], groups_config={}, date="x") as file:
        for subject, affine in (("a", ROTATED), ("b", FINER), ("c", FINER)):
            group, attributes = file.create_group(subject), {"standardization_mean": 2.0, "standardization_std": 3.0}
            volume = rng.random((4, 5, 6, 2))
            write_volume(group, "input", volume, affine, attributes=attributes if subject == "a" else {})
            num = 0 if subject == "c" else 20
            points, offsets = rng.uniform(1, 3, (3 * num, 3)), np.arange(num + 1) * 3
            lines: Any = {"affine": affine, "dimensions": (4, 5, 6)}
            lines["bundles"] = Bundles(NAMES, np.arange(num) * 15)
            write_streamlines(group, "lines", points, offsets, **lines)
    return path


@pytest.mark.parametrize("lazily", [False, True])
def test_each_subject_keeps_its_own_voxels_bundles_and_standardisation(differing, lazily):
    dataset = open_dataset(differing, streamline_group_name="lines", lazy=lazily)
    assert dataset.voxel_sizes.tolist() == [[3, 2, 4], [1.5, 1, 1]]
    np.testing.assert_array_equal(dataset.affine, ROTATED)
    lines, lengths = dataset.streamlines.to_list(), dataset.index.lengths_mm
    assert lengths is not None
    for number, line in enumerate(lines):
        in_mm = line.double() * dataset.voxel_sizes[number // 20]
        assert lengths[number] == pytest.approx(in_mm.diff(dim=0).norm(dim=1).sum().item(), rel=1e-5)
    assert dataset.bundles is not None
    assert dataset.bundles.names == NAMES
    assert dataset.bundles.ids.tolist() == [*range(0, 300, 15)] * 2
    attributes: Any = dataset.input_attributes
    assert attributes["standardization_mean"].tolist() == [[2], [0]]
    assert attributes["standardization_std"].tolist() == [[3], [1]]
    subject = read_subject_streamlines(differing, "b", "lines")
    assert subject.voxel_sizes == (1.5, 1, 1)
    np.testing.assert_allclose(subject.grid.affine, FINER)
    with pytest.raises(ValueError, match="subject 'c', group 'lines': no streamlines"):
        read_subject_streamlines(differing, "c", "lines")


def test_a_grid_whose_axes_are_not_at_right_angles_is_told(differing, caplog):
    with h5py.File(differing, "r+") as file:
        contents: Any = file
        affine = contents["b/input"].attrs["affine"]
        affine[:3, 1] += 0.1 * affine[:3, 0]
        for group in ("input", "lines"):
            contents[f"b/{group}"].attrs["affine"] = affine
        contents["b/lines"].attrs["voxel_sizes"] = np.linalg.norm(affine[:3, :3], axis=0)
    open_dataset(differing, streamline_group_name="lines")
    (record,) = caplog.records
    assert "subject 'b': voxel axes at 81.5 degrees" in record.message


@pytest.mark.parametrize(("last", "is_copy"), [(0.0, True), (1.0, False)])
def test_all_points_tell_whether_a_subject_is_a_copy(differing, caplog, last, is_copy):
    with h5py.File(differing, "r+") as file:
        contents: Any = file
        contents["b/lines/data"][...] = contents["a/lines/data"][...]
        contents["b/lines/data"][-1, 2] += last
    open_dataset(differing, streamline_group_name="lines")
    assert ["has the same points as 'a'" in record.message for record in caplog.records] == [True] * is_copy


@pytest.mark.parametrize("lazily", [False, True])
def test_values_in_other_files_are_read_from_there_and_these_are_known(edited, tmp_path, monkeypatch, lazily):
    """External files, which HDF5 takes from the working directory, a virtual dataset and links belong to the data."""
    (tmp_path / "raw").mkdir()
    monkeypatch.chdir(tmp_path / "raw")

    def move(file: Any) -> None:
        lines = file["subj0/streamlines"]
        points, offsets, lengths = (lines[name][()] for name in ("data", "offsets", "lengths"))
        Path("points.raw").write_bytes(bytes(8) + points.tobytes())
        with h5py.File(tmp_path / "more.hdf5", "w") as more:
            more["offsets"], more["lengths"] = offsets, lengths
        for name in ("data", "offsets", "lengths"):
            del lines[name]
        lines.create_dataset("data", points.shape, points.dtype, external=[("points.raw", 8, points.nbytes)])
        layout = h5py.VirtualLayout(offsets.shape, offsets.dtype)
        layout[:] = h5py.VirtualSource("more.hdf5", "offsets", offsets.shape)
        lines.create_virtual_dataset("offsets", layout)
        lines["lengths"] = h5py.ExternalLink("more.hdf5", "/lengths")
        volume = file["subj1/input"]
        Path("volume.raw").write_bytes(volume["data"][()].tobytes())
        shape = volume["data"].shape
        del volume["data"]
        volume.create_dataset("data", shape, "f4", external=[("volume.raw", 0, h5py.h5f.UNLIMITED)])
        other = file["subj1/streamlines"]
        with h5py.File(tmp_path / "lines.hdf5", "w") as more:
            more["x"] = np.zeros(7)
            more["data"] = other["data"][()]
        del other["data"]
        other["data"] = h5py.ExternalLink("lines.hdf5", "/data")

    found, expected = open_dataset(edited(move), lazy=lazily), open_dataset(PHANTOM)
    assert torch.equal(found.streamlines.points, expected.streamlines.points)
    assert all(map(torch.equal, found.volumes, expected.volumes))
    names = ["lines.hdf5", "more.hdf5", "raw/points.raw", "raw/volume.raw"]
    assert found.linked == tuple(tmp_path / name for name in names)
    with Path("points.raw").open("r+b") as file:
        file.truncate(Path("points.raw").stat().st_size - 1)
    assert "points.raw, which does not hold its 27060 bytes" in one_line_problem(tmp_path / "edited.hdf5")


def unwritten_points(file: Any) -> None:
    del file["subj0/streamlines/data"]
    file["subj0/streamlines"].create_dataset("data", (2255, 3), "f4")


def virtual_of_unwritten(file: Any) -> None:
    """Of a dataset of the same file, of which one of two chunks was written."""
    del file["subj0/streamlines/data"]
    file.create_dataset("x", (2256, 3), "f4", chunks=(1128, 3))[:1128] = 1
    layout = h5py.VirtualLayout((2256, 3), "f4")
    layout[:] = h5py.VirtualSource(".", "x", (2256, 3))
    file["subj0/streamlines"].create_virtual_dataset("data", layout)
    del file.attrs["testing_subjs"]


def matrix(last: float = 1.0, label: float = 4.0) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        labels = np.resize(np.arange(5.0), (24, 24, 24))
        labels[-1, -1, -1] = label
        values = np.ones((4, 4))
        values[-1, -1] = last
        file["subj1/streamlines"].update({"connectivity_matrix": values, "connectivity_label_volume": labels})

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (unwritten_points, "'data' of shape (2255, 3) has 0 of its 27060 bytes: the others were never written"),
        (virtual_of_unwritten, "its source 'x' in . has 1 of its 2 chunks: the others were never written"),
        (matrix(last=np.nan), "connectivity: the matrix holds NaN or infinite values"),
        (matrix(label=1e19), "labels that are no whole numbers of at least 0"),
        (lambda file: file["subj1/streamlines/euclidean_lengths"].write_direct(np.full(48, np.inf, "f4")), "48 of 48"),
        (lambda file: file["subj1/streamlines/euclidean_lengths"].write_direct(np.full(48, -1, "f4")), "48 of 48"),
        (lambda file: file["subj1/streamlines"].attrs.create("voxel_sizes", [1, 1, 1.02]), "but the affine has voxels"),
        (lambda file: file["subj1/streamlines"].attrs.create("voxel_sizes", [1, 1, np.inf]), "Expected three lengths"),
        (lambda file: file["subj1/input"].attrs.update(sh_order=2, sh_of="fodf"), "attribute 'sh_o"),
    ],
)
def test_what_is_wrong_at_the_end_or_was_never_written_is_told(edited, change, told):
    assert told in one_line_problem(edited(change))


def test_what_fits_just_so_is_no_problem(edited):
    assert len(open_dataset(edited(matrix())).index.subjects) == 2
    sizes = np.array([1, 1, 1.009])
    path = edited(lambda file: file["subj1/streamlines"].attrs.create("voxel_sizes", sizes))
    np.testing.assert_allclose(open_dataset(path).voxel_sizes[1], sizes)
