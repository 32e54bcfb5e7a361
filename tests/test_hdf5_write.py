"""Writing the reference's HDF5 layout."""

import errno
import os
import struct
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwiml_func.data.bundles import Bundles
from dwiml_func.data.hdf5.write import _lengths_mm, new_dataset, write_streamlines, write_volume
from dwiml_func.data.resampling import Resampling

File: Any = h5py.File  # typed, every item of a file could be a group, a dataset or a datatype
AFFINE = np.array([[0.0, -2, 0, 10], [3, 0, 0, -5], [0, 0, 4, 1], [0, 0, 0, 1]])  # rotated, voxels of 3 x 2 x 4 mm


def write_small(path: Path, *, compression: int | None = None, overwrite: bool = False) -> None:
    dataset = new_dataset(
        path,
        training=["a", "b"],
        validation=["c"],
        groups_config={"input": {"type": "volume"}},
        date="then",
        resampling=Resampling(step_size=0.5),
        overwrite=overwrite,
    )
    with dataset as file:
        for name in ("a", "b"):
            subject = file.create_group(name)
            volume = np.arange(120.0).reshape(4, 5, 3, 2)
            write_volume(subject, "input", volume, AFFINE, compression=compression, attributes={"sh_order": 6})
            write_streamlines(
                subject,
                "streamlines",
                np.ones((5, 3)),
                np.array([0, 2, 5]),
                affine=AFFINE,
                dimensions=(4, 5, 3),
                data_per_streamline={"weight": np.ones((2, 1))},
            )


def test_the_file_has_the_attributes_of_the_layout(tmp_path):
    write_small(tmp_path / "data.hdf5")
    with File(tmp_path / "data.hdf5") as file:
        attributes = dict(file.attrs)
        assert attributes.keys() == {
            "chosen_subjs", "compress", "data_and_time", "groups_config", "nb_points", "step_size",
            "testing_subjs", "training_subjs", "validation_subjs",
        }  # fmt: skip
        assert list(attributes["training_subjs"]) == ["a", "b"]
        assert list(attributes["validation_subjs"]) == ["c"]
        assert list(attributes["chosen_subjs"]) == ["a", "b", "c"]
        assert attributes["testing_subjs"].dtype == np.float64  # how the reference stores an empty list
        assert attributes["testing_subjs"].shape == (0,)
        assert attributes["groups_config"] == "{'input': {'type': 'volume'}}"
        assert attributes["step_size"] == 0.5
        assert attributes["nb_points"] == attributes["compress"] == "Not defined by user"
        assert attributes["data_and_time"] == "then"
        assert list(file) == ["a", "b"]


@pytest.mark.parametrize("compression", [None, 4])
def test_a_volume_group_holds_what_was_given(tmp_path, compression):
    write_small(tmp_path / "data.hdf5", compression=compression)
    with File(tmp_path / "data.hdf5") as file:
        group = file["b/input"]
        assert group.attrs["type"] == "volume"
        np.testing.assert_array_equal(group.attrs["affine"], AFFINE)
        np.testing.assert_allclose(group.attrs["voxres"], [3, 2, 4])
        assert group.attrs["nb_features"] == 2
        assert group.attrs["sh_order"] == 6
        assert group["data"].dtype == np.float32
        np.testing.assert_array_equal(group["data"], np.arange(120.0).reshape(4, 5, 3, 2))


def test_a_streamline_group_holds_what_was_given(tmp_path):
    write_small(tmp_path / "data.hdf5")
    with File(tmp_path / "data.hdf5") as file:
        group = file["a/streamlines"]
        expected = {"type": "streamlines", "space": "Space.VOX", "origin": "Origin.TRACKVIS", "voxel_order": "ALS"}
        assert {name: group.attrs[name] for name in expected} == expected
        np.testing.assert_array_equal(group.attrs["dimensions"], [4, 5, 3])
        np.testing.assert_allclose(group.attrs["voxel_sizes"], [3, 2, 4])
        np.testing.assert_array_equal(group.attrs["affine"], AFFINE)
        assert {name: group[name].dtype for name in ("data", "offsets", "lengths", "euclidean_lengths")} == {
            "data": np.float32, "offsets": np.int64, "lengths": np.int64, "euclidean_lengths": np.float32,
        }  # fmt: skip
        assert group["offsets"][:].tolist() == [0, 2]
        assert group["lengths"][:].tolist() == [2, 3]
        assert group["data_per_streamline/weight"].shape == (2, 1)


def test_an_attribute_may_have_any_number_of_values():
    names = tuple(map(str, range(5000)))
    with File("any", "w", driver="core", backing_store=False) as file:
        group = file.create_group("a")
        write_volume(group, "v", np.ones((1, 1, 1, 1)), AFFINE, attributes={"standardization_mean": np.arange(9000.0)})
        lines = np.zeros((0, 3)), np.zeros(1)
        bundles = Bundles(names, np.empty(0, np.int64))
        write_streamlines(group, "s", *lines, affine=AFFINE, dimensions=(9, 9, 9), bundles=bundles)
        assert tuple(group["s"].attrs["bundle_names"]) == names
        assert group["v"].attrs["standardization_mean"].sum() == sum(range(9000))


@given(st.lists(st.integers(0, 6), max_size=6), st.integers(0, 2**32 - 1))
def test_lengths_in_mm_are_those_of_each_streamline_alone(lengths, seed):
    lines = [np.random.default_rng(seed + i).normal(size=(n, 3)) * 20 for i, n in enumerate(lengths)]
    points, offsets = np.concatenate([np.empty((0, 3)), *lines]), np.cumsum([0, *lengths])
    with File("any", "w", driver="core", backing_store=False) as file:
        write_streamlines(file.create_group("a"), "s", points, offsets, affine=AFFINE, dimensions=(9, 9, 9))
        written = file["a/s/euclidean_lengths"][:]
    expected = [np.linalg.norm(np.diff(line @ AFFINE[:3, :3].T, axis=0), axis=1).sum() for line in lines]
    np.testing.assert_allclose(written, expected, rtol=1e-5, atol=1e-4)


def test_nothing_in_the_file_depends_on_the_time(tmp_path):
    write_small(tmp_path / "one.hdf5")
    write_small(tmp_path / "two.hdf5")
    assert (tmp_path / "one.hdf5").read_bytes() == (tmp_path / "two.hdf5").read_bytes()
    now = int(time.time())
    stamps = [struct.pack("<I", second) for second in range(now - 60, now + 1)]  # as HDF5 stores times
    assert not any(stamp in (tmp_path / "one.hdf5").read_bytes() for stamp in stamps)


def test_an_error_inside_leaves_nothing_behind(tmp_path):
    def fail():
        with new_dataset(tmp_path / "data.hdf5", training=["a"], groups_config={}, date="") as file:
            write_volume(file.create_group("a"), "input", np.zeros((2, 2, 2, 1)), AFFINE)
            assert not (tmp_path / "data.hdf5").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_overwriting_keeps_the_old_file(tmp_path):
    path = tmp_path / "data.hdf5"
    write_small(path)
    before = path.read_bytes()
    with (
        pytest.raises(RuntimeError, match="stop"),
        new_dataset(path, training=[], groups_config={}, date="", overwrite=True),
    ):
        raise RuntimeError("stop")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "data.hdf5"
    path.write_text("old")
    with pytest.raises(FileExistsError, match=r"The file exists: .*data\.hdf5\. Choose another name"):
        write_small(path)
    assert path.read_text() == "old"
    write_small(path, overwrite=True)
    with File(path) as file:
        assert list(file) == ["a", "b"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist: .*nowhere\. Create it"):
        write_small(tmp_path / "nowhere" / "data.hdf5")


def test_a_folder_is_not_a_file_name(tmp_path):
    with pytest.raises(IsADirectoryError, match="Expected a file name"):
        write_small(tmp_path)


@pytest.mark.parametrize("offsets", [[], [0, 2], [1, 5], [0, 4, 3, 5]])
def test_offsets_that_do_not_fit_are_refused(offsets):
    with (
        File("any", "w", driver="core", backing_store=False) as file,
        pytest.raises(ValueError, match="rise from 0 to the number of points, 5, for group 's'"),
    ):
        write_streamlines(file, "s", np.ones((5, 3)), np.array(offsets), affine=AFFINE, dimensions=(9, 9, 9))


def test_wrong_shapes_are_refused():
    with File("any", "w", driver="core", backing_store=False) as file:
        with pytest.raises(ValueError, match=r"\(X, Y, Z, F\) for group 'v'. Received: \(2, 2, 2\)"):
            write_volume(file, "v", np.ones((2, 2, 2)), AFFINE)
        with pytest.raises(ValueError, match=r"affine of shape \(4, 4\) for group 'v'. Received: \(3, 3\)"):
            write_volume(file, "v", np.ones((2, 2, 2, 1)), np.eye(3))
        with pytest.raises(ValueError, match=r"points of shape \(P, 3\) for group 's'. Received: \(5, 2\)"):
            write_streamlines(file, "s", np.ones((5, 2)), np.array([0, 5]), affine=AFFINE, dimensions=(9, 9, 9))
        assert list(file) == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")
def test_content_is_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor: int) -> None:
        with File(tmp_path / os.readlink(f"/proc/self/fd/{descriptor}"), "r") as file:
            calls.append(f"fsync {sorted(file)}")
        fsync(descriptor)

    def rename(source: Any, target: Any) -> None:
        calls.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    write_small(tmp_path / "data.hdf5")
    assert calls[:2] == ["fsync ['a', 'b']", "rename to data.hdf5"]


def test_a_full_disk_at_the_end_of_the_block_is_an_error_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "data.hdf5"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_small(path, overwrite=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_streamline_without_points_has_a_length_of_zero():
    points = np.array([[0, 0, 0], [1, 0, 0], [1, 2, 0], [5, 5, 5]], dtype=np.float32)
    found = _lengths_mm(points, np.array([0, 0, 3, 3, 4]), np.diag([2.0, 3, 4, 1]))
    assert (found.dtype, found.tolist()) == (np.float32, [0, 8, 0, 0])
