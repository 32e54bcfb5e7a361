"""What belongs together in a dataset: `info` tells it and `train` refuses it, in the same words."""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from dwiml_func.data.grid import Grid, grid_difference, orientation_difference, shear_of
from dwiml_func.data.hdf5.consistency import Volume, copied_streamlines, matrix_fault, same_volumes
from dwiml_func.data.hdf5.layout import read_resampling
from dwiml_func.data.hdf5.problems import raise_first
from dwiml_func.data.hdf5.read import open_dataset, read_subsets
from dwiml_func.data.hdf5.write import new_dataset, write_streamlines, write_volume
from dwiml_func.data.loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.data.resampling import Resampling
from dwiml_func.data.spherical_harmonics import half_sphere_directions, sh_matrix
from dwiml_func.models.baselines import principal_direction

File: Any = h5py.File
SHAPE = (6, 6, 6)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two training subjects and one for validation, with 6 features, the harmonics of order 2."""
    path = tmp_path / "data.hdf5"
    with new_dataset(path, training=["a", "b"], validation=["c"], groups_config={}, date="x") as file:
        for seed, subject in enumerate("abc"):
            rng = np.random.default_rng(seed)
            group = file.create_group(subject)
            write_volume(group, "input", rng.uniform(0.3, 0.9, (*SHAPE, 6)), np.eye(4), attributes={"sh_order": 2})
            points = rng.uniform(1, 5, (12, 3))
            write_streamlines(group, "streamlines", points, np.arange(5) * 3, affine=np.eye(4), dimensions=SHAPE)
    return path


def attribute(place: str, name: str, value: object) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        file[place].attrs[name] = value

    return change


def flip(file: Any) -> None:
    for name in ("input", "streamlines"):
        file[f"c/{name}"].attrs["affine"] = np.diag([-1.0, 1, 1, 1])


def add_matrix(rows: int, **regions: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        group = file["b/streamlines"]
        group["connectivity_matrix"] = np.ones((rows, rows), bool)
        if "blocs" in regions:
            group.attrs["connectivity_nb_blocs"] = regions["blocs"]
        if "labels" in regions:
            group["connectivity_label_volume"] = regions["labels"]

    return change


def hard_link(name: str, to: str) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]
        file[name] = file[to]

    return change


def fewer_features(file: Any) -> None:
    del file["c/input"]
    write_volume(file["c"], "input", np.ones((*SHAPE, 5)), np.eye(4))


def half_chunks(file: Any) -> None:
    del file["b/input/data"]
    made = file["b/input"].create_dataset("data", (*SHAPE, 6), "f4", chunks=(3, 6, 6, 6))
    made[:3] = 1


def virtual_without_source(file: Any) -> None:
    del file["b/input/data"]
    layout = h5py.VirtualLayout((*SHAPE, 6), "f4")
    layout[:] = h5py.VirtualSource("gone.hdf5", "data", (*SHAPE, 6))
    file["b/input"].create_virtual_dataset("data", layout)


def virtual(rows: int, name: str = "a/input/data") -> Callable[[Any], None]:
    """The first rows of subject b's volume are those of a dataset in the same file."""

    def change(file: Any) -> None:
        del file["b/input/data"]
        layout = h5py.VirtualLayout((*SHAPE, 6), "f4")
        layout[:rows] = h5py.VirtualSource("data.hdf5", name, (*SHAPE, 6))[:rows]
        file["b/input"].create_virtual_dataset("data", layout)

    return change


def link_to(link: object) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file["b/input/data"]
        file["b/input/data"] = link

    return change


def bomb(file: Any) -> None:
    """128 MiB of zeros in less than one."""
    del file["b/input/data"]
    chunk, shape = (64, 64, 64, 8), (256, 64, 64, 32)
    made = file["b/input"].create_dataset("data", shape, "f4", chunks=chunk, compression="gzip")
    packed = zlib.compress(bytes(4 * 64**3 * 8), 1)
    for x, f in np.ndindex(4, 4):
        made.id.write_direct_chunk((64 * x, 0, 0, 8 * f), packed)


def copy_of(name: str, other: str) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]
        file.copy(other, name)

    return change


def without_shape(file: Any) -> None:
    del file["b/streamlines/offsets"]
    file["b/streamlines/offsets"] = h5py.Empty("i8")


def matrix_of_nan(file: Any) -> None:
    file["b/streamlines/connectivity_matrix"] = np.full((4, 4), np.nan)


def external_without_bytes(file: Any) -> None:
    del file["b/input/data"]
    file["b/input"].create_dataset("data", (*SHAPE, 6), "f4", external=[("gone.raw", 0, 4 * 6**4)])


def delete_and_leave(name: str, dtype: str, shape: tuple[int, ...]) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file["b/streamlines"][name]
        file["b/streamlines"].create_dataset(name, shape, dtype, compression="gzip")

    return change


LABELS = np.arange(216).reshape(SHAPE) % 5  # 1 to 4
FAULTS = {
    "twice": (attribute("/", "validation_subjs", ["c", "a"]), "subject 'a': in two subsets, training and validation"),
    "linked": (hard_link("c", "b"), "subject 'c': in validation, has the same streamlines as 'b', in training"),
    "linked streamlines": (
        hard_link("c/streamlines/data", "a/streamlines/data"),
        "subject 'c': in validation, has the same streamlines as 'a', in training",
    ),
    "tested": (attribute("/", "testing_subjs", ["b"]), "subject 'b': in two subsets, training and testing"),
    "features": (fewer_features, "subject 'c', group 'input': 5 features, but subject 'a' has 6"),
    "flipped": (
        flip,
        "subject 'c', group 'input': the orientation LAS of the voxel axes, expected RAS, as subject",
    ),
    "order": (
        attribute("c/input", "sh_order", 4),
        "Expected 15 features for spherical harmonics of order 4",
    ),
    "odd order": (attribute("c/input", "sh_order", 3), "attribute 'sh_order' is 3. Expected an even number"),
    "basis": (attribute("b/input", "sh_basis", "mine"), "attribute 'sh_basis' is 'mine'. Expected one of descoteaux07"),
    "bases": (
        attribute("b/input", "sh_basis", "tournier07"),
        "'sh_basis' is tournier07, but that of subject",
    ),
    "mean": (attribute("b/input", "standardization_mean", [1.0, 2]), "'standardization_mean' of shape (2,). Expected"),
    "std": (attribute("b/input", "standardization_std", 0.0), "'standardization_std' of shape (). Expected one finite"),
    "blocs": (add_matrix(7, blocs=[2, 2, 2]), "a matrix of 7 rows. Expected 8, one for each of 2 x 2 x 2 blocs"),
    "labels": (add_matrix(3, labels=LABELS), "a matrix of 3 rows. Expected 4, one for each label (up to 4)"),
    "label grid": (add_matrix(4, labels=LABELS[:5]), "labels of shape (5, 6, 6). Expected (6, 6, 6), the grid's"),
    "chunks": (half_chunks, "'data' of shape (6, 6, 6, 6) has 1 of its 2 chunks: the others were never written"),
    "points": (delete_and_leave("data", "f4", (12, 3)), "'data' of shape (12, 3) has 0 of its 1 chunks"),
    "lengths": (delete_and_leave("lengths", "i8", (4,)), "'lengths' of shape (4,) has 0 of its 1 chunks"),
    "mm": (delete_and_leave("euclidean_lengths", "f4", (4,)), "'euclidean_lengths' of shape (4,) has 0 of its 1"),
    "virtual": (virtual_without_source, "is virtual, and its source gone.hdf5 does not exist"),
    "external": (external_without_bytes, "which does not hold its 5184 bytes"),
    "link": (link_to(h5py.SoftLink("/nothing")), "dataset 'data' is a broken link, to /nothing"),
    "circle": (link_to(h5py.SoftLink("/b/input/data")), "dataset 'data' is a broken link, to /b/input/data"),
    "other file": (link_to(h5py.ExternalLink("gone.h5", "/x")), "dataset 'data' is a broken link, to gone.h5 /x"),
    "half virtual": (virtual(3), "is virtual, and its sources have 648 of its 1296 values"),
    "virtual of nothing": (virtual(6, "other"), "source data.hdf5 has no dataset 'other' of its own"),
    "virtual of itself": (virtual(6, "b/input/data"), "source data.hdf5 has no dataset 'b/input/data' of its own"),
    "no shape": (without_shape, "dataset 'offsets' is empty: it has no shape"),
    "bomb": (bomb, "unpacks to 134217728 bytes, from "),
    "fractions": (add_matrix(4, labels=LABELS + 0.5), "labels that are no whole numbers of at least 0"),
    "no labels": (add_matrix(4, labels=LABELS - np.inf), "labels that are no whole numbers of at least 0"),
    "negative blocs": (add_matrix(4, blocs=[-2, -2, 1]), "is [-2, -2, 1]. Expected three numbers from 1"),
    "no matrix": (matrix_of_nan, "connectivity: the matrix holds NaN or infinite values"),
    "voxel sizes": (
        attribute("b/streamlines", "voxel_sizes", [1, 1, 2]),
        "attribute 'voxel_sizes' is [1, 1, 2], but the affine has voxels of [1.0, 1.0, 1.0] mm",
    ),
    "complex": (attribute("b/input", "affine", np.eye(4) + 0j), "affine does not turn voxels into mm"),
    "nb_points": (attribute("/", "nb_points", 3.7), "attribute nb_points: expected a whole number"),
    "path": (attribute("/", "testing_subjs", ["a/"]), "subject 'a/': expected a name without '/' in the testing"),
    "part of a voxel": (attribute("b/streamlines", "dimensions", [6, 6, 6.5]), "grid has 6.0 x 6.0 x 6.5 voxels"),
}


@pytest.mark.parametrize(
    ("rows", "labels", "fits"),
    [
        *((3, [0, 1, 2, 3], True), (4, [0, 1, 2, 3], True), (2, [0, 1, 2, 3], False), (5, [0, 1, 2, 3], True)),
        *((2, [0, 7, 9], True), (3, [0, 7, 9], True), (9, [0, 7, 9], True), (8, [0, 7, 9], False)),
        *((2, [7, 9], True), (3, [7, 9], False), (1, [0, 0], False)),
    ],
)
def test_rows_are_labels_with_the_background_or_without_or_numbers_of_labels(rows, labels, fits):
    fault = matrix_fault((rows, rows), None, np.array(labels).reshape(-1, 1, 1))
    assert (fault is None) == fits


@pytest.mark.parametrize(("shape", "fits"), [((8, 8), True), ((7, 7), False), ((9, 9), False), ((8, 7), False)])
def test_a_matrix_of_blocs_is_square_and_has_a_row_for_each(shape, fits):
    assert (matrix_fault(shape, [2, 2, 2], None) is None) == fits


@pytest.mark.parametrize(
    ("attributes", "resampling"),
    [
        ({"step_size": 0.5, "nb_points": "Not defined by user"}, Resampling(step_size=0.5)),
        ({"compress": [0.1]}, Resampling(compress=0.1)),
        ({"nb_points": 20}, Resampling(nb_points=20)),
        ({"step_size": 0.5, "nb_points": 20}, Resampling()),  # who knows which of them
        ({"step_size": 0.0, "compress": True}, Resampling()),
    ],
)
def test_a_file_says_how_it_was_sampled_in_one_way(tmp_path, attributes, resampling):
    with File(tmp_path / "a.hdf5", "w") as file:
        file.attrs.update(attributes)
        assert raise_first(read_resampling(file), "a.hdf5") == resampling


@pytest.mark.parametrize(("num", "fits"), [(16, True), (17, False)])
def test_streamlines_may_share_points_up_to_16_times(data, num, fits):
    with File(data, "r+") as file:
        group = file["a/streamlines"]
        for name, values in (("offsets", np.zeros(num, int)), ("lengths", np.full(num, 12))):  # all of the 12 points
            del group[name]
            group[name] = values
    if fits:
        assert open_dataset(data).index.num_streamlines.tolist() == [16, 4]
        return
    with pytest.raises(ValueError, match=r"204 points of overlapping .* the 12 points stored.* at most 16 times"):
        open_dataset(data)


def test_grids_are_the_same_to_a_thousandth_in_each_element():
    grid = Grid(np.diag([2.0, 2.0, 2.0, 1.0]), (5, 6, 7))
    assert (
        grid_difference(grid, Grid(grid.affine.copy(), (5, 7, 6))) == "a grid of 5 x 6 x 7 voxels, expected 5 x 7 x 6"
    )
    for place in ((0, 0), (1, 2), (2, 3)):
        for change, differs in ((0.9e-3, False), (1e-3, False), (1.1e-3, True), (-1.1e-3, True)):
            affine = grid.affine.copy()
            affine[place] += change
            assert (grid_difference(Grid(affine, grid.shape), grid) is not None) == differs


@pytest.mark.parametrize(("shear", "told"), [(0.0, None), (0.008, None), (-0.1, "voxel axes at 84.3 degrees")])
def test_axes_at_other_than_right_angles_are_told_whatever_the_size_of_voxels(shear, told):
    turned = np.eye(4)
    turned[:3, :3] = [[0.36, -0.48, 0.8], [0.8, 0.6, 0.0], [-0.48, 0.64, 0.6]]
    turned[:3, :3] = turned[:3, :3] @ [[1, shear, 0], [0, 1, 0], [0, 0, 1]] * [0.2, 3.0, -1.0]
    found = shear_of(Grid(turned, (5, 6, 7)))
    assert found is told if told is None else str(found).startswith(told)


@pytest.mark.parametrize(("degrees", "differs"), [(0, False), (58, False), (62, True), (180, True)])
def test_axes_are_the_same_up_to_60_degrees_whatever_the_size_of_voxels(degrees, differs):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned = np.eye(4)
    turned[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) * [0.2, 3.0, 1.0]
    straight = Grid(np.diag([4.0, 0.1, 1.0, 1.0]), (5, 6, 7))
    assert (orientation_difference(Grid(turned, (5, 6, 7)), straight) is not None) == differs


@pytest.mark.parametrize("name", FAULTS)
def test_info_dry_run_and_train_give_one_verdict_and_leave_nothing(cli, data, tmp_path, name):
    change, text = FAULTS[name]
    with File(data, "a") as file:
        change(file)
    before = sorted(tmp_path.rglob("*"))
    told = cli("info", data)
    assert told.code == 1
    assert text in told.out
    places = [line.strip() for line in told.out.split(" PROBLEM")[1].splitlines()[1:]]
    assert all(place.startswith(("subject '", "attribute nb_points")) for place in places), places
    for more in ([], ["--lazy", "--dry-run"]):
        cli("train", tmp_path, "run", data, "--max-epochs", 1, *more).check_refusal(text)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("name", "of"), [("c", "validation"), ("b", "training")])
def test_a_copy_of_a_subject_is_told_and_no_error(cli, data, tmp_path, name, of):
    with File(data, "a") as file:
        copy_of(name, "a")(file)
    sentence = f"subject '{name}': in {of}, has the same points as 'a', in training"
    told = cli("info", data)
    assert (told.code, told.out.count(f"Warning: {sentence}\n")) == (0, 1)
    trained = cli("train", tmp_path, "run", data, "--dry-run")
    assert (trained.code, trained.err.count(sentence)) == (0, 1)


@pytest.mark.parametrize(
    ("other", "subsets", "copies"),
    [
        ({}, {"training": ["a", "b"]}, ["b"]),
        ({"last": 1.0}, {"training": ["a", "b"]}, []),  # the first points are the same
        ({"first": 1.0}, {"training": ["a", "b"]}, []),
        ({}, {"training": ["a", "a"], "testing": ["a"]}, []),
        ({}, {"training": ["x", "a"], "validation": ["y", "b"]}, ["b"]),
        ({"dtype": "i4"}, {"training": ["b", "a"]}, []),
    ],
)
def test_copies_have_all_points_in_common(tmp_path, other, subsets, copies):
    points = {"a": np.zeros((20, 3), "f4"), "b": np.zeros((20, 3), other.get("dtype", "f4"))}
    points["b"][-1, -1], points["b"][0, 0] = other.get("last", 0), other.get("first", 0)
    with File(tmp_path / "a.hdf5", "w") as file:
        for name, data in (*points.items(), ("y", np.zeros((0, 3), "f4"))):
            file[f"{name}/s/data"] = data
        found = [str(problem) for problem in copied_streamlines(file, subsets, "s")]
    of = "validation" if "validation" in subsets else "training"
    assert found == [f"subject '{name}': in {of}, has the same points as 'a', in training" for name in copies]


def test_volumes_are_compared_in_what_is_known_of_both():
    grid, flipped = (Grid(np.diag([x, 1.0, 1.0, 1.0]), (5, 6, 7)) for x in (1.0, -1.0))
    known = Volume(6, grid, {"sh_order": 2})

    def told(volume: Volume, expected: Volume = known) -> list[str]:
        return [str(problem) for problem in same_volumes("input", "a", expected, "b", volume)]

    assert told(known) == told(known._replace(grid=None)) == told(known, known._replace(grid=None)) == []
    where = "subject 'b', group 'input': "
    (found,) = told(known._replace(grid=flipped))
    assert found.startswith(f"{where}the orientation LAS of the voxel axes, expected RAS, as subject 'a' has. Reorient")
    assert told(known._replace(attributes={"sh_basis": "x"}, num_features=7)) == [
        f"{where}7 features, but subject 'a' has 6",
        f"{where}attribute 'sh_order' is None, but that of subject 'a' is 2",
        f"{where}attribute 'sh_basis' is x, but that of subject 'a' is None",
    ]


@pytest.mark.parametrize("of", [None, "signal", "fodf"])
def test_harmonics_of_an_unnamed_function_are_told_by_info_a_dry_run_and_train(cli, data, tmp_path, of):
    with File(data, "a") as file:
        for subject in "abc":
            file[f"{subject}/input"].attrs["sh_order"] = 2
            if of is not None:
                file[f"{subject}/input"].attrs["sh_of"] = of
    num, sentence = int(of is None), ", taken for the signal's (no 'sh_of')"
    assert cli("info", data).out.count(sentence) == num
    train = ("train", tmp_path, "run", data, "--max-epochs", 1, "--rnn-layer-sizes", 2)
    assert cli(*train, "--dry-run").err.count(f" 6 features{sentence}, " if num else sentence) == num
    trained = cli(*train)
    assert (trained.code, (trained.out + trained.err).count(sentence)) == (0, num)


def test_labels_that_are_numbers_of_rows_fit_though_some_are_not_there(cli, data):
    with File(data, "a") as file:
        add_matrix(9, labels=LABELS)(file)
    assert cli("info", data).code == 0
    assert len(open_dataset(data).index.subjects) == 2


def test_what_fits_is_no_problem(cli, data):
    outcome = cli("info", data)
    assert outcome.code == 0, outcome.out


@pytest.mark.parametrize("kind", [np.bytes_, str])
def test_text_of_fixed_length_is_text(cli, data, tmp_path, kind):
    with File(data, "a") as file:
        for subject in "abc":
            for group in ("input", "streamlines"):
                for name, value in list(file[f"{subject}/{group}"].attrs.items()):
                    if isinstance(value, str):
                        file[f"{subject}/{group}"].attrs[name] = kind(value)
        for subset, names in (("training", ["a", "b"]), ("validation", ["c"])):
            file.attrs[f"{subset}_subjs"] = np.array(names, dtype="S1" if kind is np.bytes_ else object)
    assert cli("info", data).code == 0
    assert cli("train", tmp_path, "run", data, "--dry-run").code == 0


def test_attributes_that_are_arrays_of_one_are_that_one(cli, data, tmp_path):
    """MATLAB writes them so; a step size that is not seen would have the streamlines resampled again."""
    with File(data, "a") as file:
        for subject in "abc":
            for group in ("input", "streamlines"):
                attributes = file[f"{subject}/{group}"].attrs
                for name in ("type", "space", "origin", "nb_features", "sh_order"):
                    if name in attributes:
                        value = np.atleast_1d(np.asarray(attributes[name]))
                        attributes[name] = value.astype("S") if value.dtype.kind in "UO" else value
        file.attrs["step_size"] = np.array([3.0])
    outcome = cli("info", data)
    assert "resampled to a step of" in outcome.out
    assert "Expected" not in outcome.out
    assert open_dataset(data).resampling == Resampling(step_size=3.0)
    assert cli("train", tmp_path, "run", data, "--dry-run").code == 0
    with File(data, "a") as file:
        file["a/input"].attrs["type"] = ["volume", "streamlines"]
    assert "type ['volume', 'streamlines']" in cli("info", data).out


@pytest.mark.parametrize("number", [4000, 4001, 4200, 30_000])
def test_many_subjects_fit_in_a_dataset(tmp_path, number):
    names = [f"sub-{n:05d}" for n in range(number)]
    with new_dataset(tmp_path / "many.hdf5", training=names[1:], testing=names[:1], groups_config={}, date="x"):
        pass
    assert read_subsets(tmp_path / "many.hdf5") == {
        "training": tuple(names[1:]),
        "validation": (),
        "testing": tuple(names[:1]),
    }
    with File(tmp_path / "many.hdf5") as file:
        assert list(file.attrs["chosen_subjs"]) == [*names[1:], names[0]]


@pytest.mark.parametrize("subsets", [{"validation": ["a"]}, {"testing": ["a"]}])
def test_a_new_dataset_has_each_subject_in_one_subset(tmp_path, subsets):
    with (
        pytest.raises(ValueError, match=r"subject 'a': in two subsets, training and .* Expected each subject in one"),
        new_dataset(tmp_path / "new.hdf5", training=["a"], **subsets, groups_config={}, date="x"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a/b", ".", "..", "a\0b"])
def test_names_that_hdf5_takes_for_paths_are_refused(tmp_path, name):
    with (
        pytest.raises(ValueError, match="Expected a name without '/' for a subject"),
        new_dataset(tmp_path / "new.hdf5", training=[name], groups_config={}, date="x"),
    ):
        pass


def test_data_per_streamline_may_have_a_slash_in_its_name(cli, tmp_path):
    path = tmp_path / "data.hdf5"
    with new_dataset(path, training=["a"], groups_config={}, date="x") as file:
        group = file.create_group("a")
        write_volume(group, "input", np.ones((*SHAPE, 6)), np.eye(4))
        keep = {"sift2/weight": np.arange(4.0)[:, None], "sift2/mu/x": np.ones((4, 2)), "plain": np.ones((4, 1))}
        points = np.random.default_rng(0).uniform(1, 5, (12, 3))
        lines = {"affine": np.eye(4), "dimensions": SHAPE, "data_per_streamline": keep}
        write_streamlines(group, "streamlines", points, np.arange(5) * 3, **lines)
        with pytest.raises(ValueError, match="Expected a name without '/'"):
            write_streamlines(
                group, "s2", points, np.arange(5) * 3, **{**lines, "data_per_streamline": {"a//b": points}}
            )
    outcome = cli("info", path)
    assert outcome.code == 0, outcome.out
    for key, values in keep.items():
        assert f"data per streamline {key!r}" in outcome.out
        with File(path) as file:
            np.testing.assert_array_equal(file["a/streamlines/data_per_streamline"][key][()], values)
    with File(path, "a") as file:
        del file["a/streamlines/data_per_streamline/sift2/weight"]
        file["a/streamlines/data_per_streamline/sift2/weight"] = np.ones((3, 1))
        tables = file["a/streamlines/data_per_streamline"]
        tables["sift2/round"] = tables["sift2"]  # links in a circle
        tables["again"] = h5py.SoftLink("/a/streamlines/data_per_streamline")
    assert "data per streamline 'sift2/weight' of shape (3, 1)" in cli("info", path).out


def test_a_file_that_another_program_writes_is_in_use(cli, data, tmp_path):
    """Locks of HDF5 are between processes, so another one holds the file."""
    code = f"import h5py, sys; file = h5py.File({str(data)!r}, 'a'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        for command in (["info", data], ["train", tmp_path, "run", data, "--dry-run"]):
            cli(*command).check_refusal("in use: another program has it open for writing", str(data))
        other.communicate(b"")
    assert cli("info", data).code == 0


def test_a_link_to_nothing_is_called_a_broken_link(cli, tmp_path):
    (tmp_path / "link.hdf5").symlink_to("gone.hdf5")
    cli("info", tmp_path / "link.hdf5").check_refusal("does not exist", "link.hdf5 is a broken link, to gone.hdf5")
    (tmp_path / "folder").symlink_to(tmp_path / "nowhere")
    cli("info", tmp_path / "folder" / "data.hdf5").check_refusal("folder is a broken link, to", "nowhere")


@pytest.mark.parametrize("removed", ["a", "c"])
def test_batches_in_mm_are_refused_before_anything_is_written(cli, data, tmp_path, removed):
    with File(data, "a") as file:
        del file[f"{removed}/streamlines/euclidean_lengths"]
    command = [
        "train",
        tmp_path,
        "run",
        data,
        "--max-epochs",
        1,
        "--rnn-layer-sizes",
        4,
        "--nb-streamlines-per-chunk",
        9,
    ]
    for more in ([], ["--dry-run"]):
        outcome = cli(*command, "--batch-size-units", "length_mm", *more)
        outcome.check_refusal("batches in length_mm need the lengths of the")
    assert not (tmp_path / "run").exists()
    assert cli(*command, "--dry-run", "--step-size", 1).code == 0  # steps cannot be checked without lengths


@pytest.mark.parametrize("width", [1, 6, (1, 6)])
def test_the_principal_direction_undoes_each_subjects_own_standardisation(tmp_path, width):
    """`create-hdf5` standardises each subject by values of its own: the direction is that of the signal before."""
    paths = {"raw": tmp_path / "raw.hdf5", "standardised": tmp_path / "standardised.hdf5"}
    signal = sh_matrix(half_sphere_directions(60), 2)
    for kind, path in paths.items():
        rng = np.random.default_rng(0)
        with new_dataset(path, training=["a", "b"], groups_config={}, date="x") as file:
            for number, subject in enumerate("ab"):
                group = file.create_group(subject)
                raw = rng.uniform(0.2, 0.9, (*SHAPE, 60)) @ np.linalg.pinv(signal).T
                own = width[number] if isinstance(width, tuple) else width
                mean, std = rng.uniform(0, 1, own) * (1 + 3 * number), rng.uniform(0.1, 1, own) * (1 + number)
                attributes = {"sh_order": 2, "standardization_mean": mean, "standardization_std": std}
                if kind == "raw":
                    write_volume(group, "input", raw, np.eye(4), attributes={"sh_order": 2})
                else:
                    write_volume(group, "input", (raw - mean) / std, np.eye(4), attributes=attributes)
                lines = {"affine": np.eye(4), "dimensions": SHAPE}
                write_streamlines(group, "streamlines", rng.uniform(1, 5, (30, 3)), np.arange(7) * 5, **lines)
    found = {}
    for kind, path in paths.items():
        dataset = open_dataset(path)
        batch = load_batch(BatchRequest(np.array([7, 0, 11, 3, 2, 9]), None, 0, 0), dataset=dataset, spec=LoaderSpec())
        principal = principal_direction(batch, dataset.input_attributes)
        assert principal is not None
        found[kind] = principal[0]
    torch.testing.assert_close(found["raw"], found["standardised"], atol=1e-3, rtol=0)
