"""`dwiml-func info`: says what is there, and everything that is wrong."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dwiml_func.cli.main import main
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.hdf5.write import new_dataset, write_streamlines, write_volume
from dwiml_func.data.inspection.groups import StreamlineSummary
from dwiml_func.data.inspection.inspect import inspect_dataset
from dwiml_func.data.inspection.report import format_inspection

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
Edit = Callable[[Callable[[Any], object]], Path]


@pytest.fixture
def edited(tmp_path: Path) -> Edit:
    """A copy of the phantom, changed by a function of the open file."""

    def edit(change: Callable[[Any], object]) -> Path:
        path = tmp_path / "edited.hdf5"
        shutil.copy(PHANTOM, path)
        with h5py.File(path, "r+") as file:
            change(file)
        return path

    return edit


def test_a_file_of_the_reference_is_told_and_has_no_problem(capfd):
    assert main(["info", str(PHANTOM)]) == 0
    text = capfd.readouterr().out
    assert re.search(r"^training +2 subjects +subj0, subj1$", text, re.MULTILINE)
    assert re.search(r"^validation +1 subject +subj2$", text, re.MULTILINE)
    assert "resampled to a step of 0.5 mm" in text
    assert re.search(r"^ +subj0 +training +24 x 24 x 24 +6 +1 x 1 x 1 +RAS$", text, re.MULTILINE)
    assert re.search(r"^ +subj0 +training +48 +2,255 +23.2 .* 0.504 ", text, re.MULTILINE)
    assert re.search(r"^ +all +144 +6,234 ", text, re.MULTILINE)
    assert text.endswith("No problem found.\n")
    assert max(map(len, text.splitlines())) <= 120
    assert all(line == line.rstrip() for line in text.splitlines())
    ends = {
        line.split()[0]: line.split()[-2:] for line in text.splitlines() if re.match(r" +(subj\d|all) .*\.\d{3}$", line)
    }
    least, greatest = zip(*(ends[f"subj{number}"] for number in range(3)), strict=True)
    assert ends["all"] == [min(least), max(greatest)]
    assert len(set(least)) > 1
    assert len(set(greatest)) > 1


def test_measures_are_those_of_the_streamlines(tmp_path):
    affine = np.array([[0.0, -2, 0, 10], [3, 0, 0, -5], [0, 0, 4, 1], [0, 0, 0, 1]])
    points = np.array([[1.0, 1, 1], [2, 1, 1], [2, 2, 1], [5, 5, 5], [5, 5, 6]])
    with new_dataset(tmp_path / "a.hdf5", training=["a"], groups_config={}, date="") as file:
        subject = file.create_group("a")
        tables = {"weight": np.ones((2, 1))}
        write_streamlines(
            subject, "s", points, np.array([0, 3, 5]), affine=affine, dimensions=(9, 9, 9), data_per_streamline=tables,
            bundles=Bundles(("AF", "CST"), np.array([1, 0])),
        )  # fmt: skip
        write_volume(subject, "input", np.zeros((9, 9, 9, 2)), affine)
    inspection = inspect_dataset(tmp_path / "a.hdf5")
    assert inspection.problems == ()
    summary = inspection.subjects["a"]["s"]
    assert isinstance(summary, StreamlineSummary)
    assert (summary.num_streamlines, summary.num_points) == (2, 5)
    assert summary.lengths is not None
    assert summary.steps is not None
    assert summary.lengths.tolist() == [5, 4]
    assert summary.steps == (3, 9, 3, 2, 4)
    text = format_inspection(inspection)
    assert "with data per streamline 'weight'" in text
    assert "with 2 bundles: AF, CST" in text
    head = next(line for line in text.splitlines() if "length mm: mean" in line)
    row = next(line for line in text.splitlines() if line.startswith("  a ") and "4.5" in line)
    assert row[head.index("points") + 5] == "5"  # numbers end where their heads do


@pytest.mark.parametrize(("step_size", "differs"), [(0.62, False), (0.65, True), (0.43, False), (0.42, True)])
def test_steps_are_those_of_the_file_to_a_fifth(edited, step_size, differs):
    problems = inspect_dataset(edited(attribute("/", "step_size", step_size))).problems  # of 0.508 mm
    assert any("a median step of" in str(problem) for problem in problems) == differs


@pytest.mark.parametrize(("factor", "differs"), [(1.0009, False), (0.998, True), (1.002, True)])
def test_lengths_in_mm_are_right_to_a_thousandth(tmp_path, factor, differs):
    with new_dataset(tmp_path / "a.hdf5", training=["a"], groups_config={}, date="") as file:
        subject, affine = file.create_group("a"), np.diag([50.0, 50, 50, 1])
        points = np.array([[1.0, 1, 1], [3, 1, 1]])  # 100 mm
        write_streamlines(subject, "s", points, np.array([0, 2]), affine=affine, dimensions=(4, 4, 4))
        subject["s/euclidean_lengths"][...] = 100 * factor  # type: ignore[index]
    problems = [str(problem) for problem in inspect_dataset(tmp_path / "a.hdf5").problems]
    assert any("have another length in mm" in problem for problem in problems) == differs


@pytest.mark.parametrize(("last", "leaves"), [(4.0, 0), (4.0005, 0), (4.002, 1), (-0.0005, 0), (-0.002, 1)])
def test_a_point_on_a_face_of_the_grid_does_not_leave_it(tmp_path, last, leaves):
    points = np.array([[0.0, 0, 0], [4, 4, 4], [1, 1, 1], [last, 1, 1]])
    with new_dataset(tmp_path / "a.hdf5", training=["a"], groups_config={}, date="") as file:
        subject = file.create_group("a")
        write_streamlines(subject, "s", points, np.array([0, 2, 4]), affine=np.eye(4), dimensions=(4, 4, 4))
        write_volume(subject, "input", np.zeros((4, 4, 4, 1)), np.eye(4))
    problems = inspect_dataset(tmp_path / "a.hdf5").problems
    assert ["leave the grid" in str(problem) for problem in problems] == [True] * leaves


def set_value(name: str, index: object, value: object) -> Callable[[Any], object]:
    return lambda file: file[name].__setitem__(index, value)


def replace(name: str, data: object) -> Callable[[Any], object]:
    def change(file: Any) -> None:
        del file[name]
        file[name] = data

    return change


def attribute(place: str, name: str, value: object) -> Callable[[Any], object]:
    return lambda file: file[place].attrs.__setitem__(name, value)


def empty_streamlines(file: Any) -> None:
    for name, data in (("data", np.zeros((0, 3))), ("lengths", np.zeros(0, int)), ("offsets", np.zeros(0, int))):
        replace(f"subj1/streamlines/{name}", data)(file)


def other_type(file: Any) -> None:
    del file["subj1/wm_mask"]
    file.copy("subj1/streamlines", "subj1/wm_mask")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (attribute("/", "training_subjs", ["subj0"]), "subject 'subj1': in the file, but in no subset"),
        (attribute("/", "training_subjs", np.array([])), "no training subjects"),
        (attribute("/", "training_subjs", ["subj0", "subj1", "x"]), "subject 'x': listed, but not in the file"),
        (attribute("/", "training_subjs", ["subj0", "subj1", "subj0"]), "subject 'subj0': listed twice"),
        (attribute("/", "testing_subjs", ["subj0"]), "subject 'subj0': in two subsets, training and testing"),
        (lambda file: file["subj1"].clear(), "subject 'subj1': no groups"),
        (lambda file: file.pop("subj1/input"), "subject 'subj1': no group 'input'"),
        (attribute("subj1/input", "type", "image"), "subject 'subj1', group 'input': type 'image'. Expected"),
        (set_value("subj1/input/data", (0, 0, 0, 0), np.nan), "group 'input': 1 of 82944 values are NaN"),
        (attribute("subj1/input", "nb_features", 7), "nb_features is 7, but the data has 6"),
        (replace("subj1/input/data", np.zeros((24, 24, 24))), r"'input': data of shape \(24, 24, 24\)"),
        (
            replace("subj1/input/data", np.zeros((24, 24, 24, 5))),
            "subject 'subj1', group 'input': 5 features, but",
        ),
        (replace("subj1/wm_mask/data", np.zeros((24, 24, 23, 1))), "a grid of 24 x 24 x 23 voxels, expected 24"),
        (attribute("subj1/streamlines", "affine", np.diag([2.0, 2, 2, 1])), "the affine .*, as group 'input' has"),
        (lambda file: file["subj1/streamlines"].attrs.pop("affine"), "no attribute 'affine'"),
        (attribute("subj1/streamlines", "space", "Space.RASMM"), "'space' is Space.RASMM. Expected Space.VOX"),
        (attribute("subj1/streamlines", "origin", "Origin.NIFTI"), "'origin' is Origin.NIFTI"),
        (lambda file: file.pop("subj1/streamlines/offsets"), "no dataset 'offsets'"),
        (set_value("subj1/streamlines/offsets", 47, 99_999), "1 of 48 streamlines lie outside the 1982 points"),
        (set_value("subj1/streamlines/lengths", 5, -1), "1 of 48 streamlines have fewer than two points"),
        (set_value("subj1/streamlines/data", 0, np.inf), "1 of 48 streamlines have NaN or infinite points"),
        (set_value("subj1/streamlines/data", 0, -3), "1 of 48 streamlines leave the grid of 24 x 24 x 24 voxels"),
        (set_value("subj1/streamlines/euclidean_lengths", 3, 1), "1 of 48 streamlines have another length"),
        (
            set_value("subj1/streamlines/euclidean_lengths", 3, np.inf),
            "1 of 48 streamlines have a length in mm that is",
        ),
        (replace("subj1/streamlines/euclidean_lengths", np.ones(3)), r"_lengths of shape \(3,\)\. Expected \(48,\)"),
        (
            lambda file: file["subj1/streamlines"].pop("euclidean_lengths"),
            "no dataset 'euclidean_lengths', which batch",
        ),
        (
            set_value("subj1/streamlines/data", slice(47), 5),
            "streamlines have no length: all points in one place; .*0 ",
        ),
        (other_type, "subject 'subj1', group 'wm_mask': of another type than that of subject 'subj0'$"),
        (empty_streamlines, "subject 'subj1', group 'streamlines': no streamlines$"),
        (
            replace("subj1/streamlines/lengths", np.zeros(3, int)),
            r"offsets of shape \(48,\) and lengths of",
        ),
        (replace("subj1/streamlines/lengths", np.zeros(48)), "'lengths' is of dtype float64. Expected integers"),
        (
            replace("subj1/streamlines/data_per_streamline/w", np.zeros((3, 1))),
            r"'w' of shape \(3, 1\)\. Expected \(48, values\)",
        ),
        (
            lambda file: file.create_dataset("subj1/t/data", (9, 9, 9, 9), "f4").parent.attrs.update(type="volume"),
            "has 0 of its",
        ),
        (attribute("/", "step_size", 2.0), "a median step of 0.508 mm, but the file's step_size is 2 mm"),
    ],
)
def test_what_is_wrong_is_told(edited, capfd, change, problem):
    def tolerant(file: Any) -> None:
        if "data_per_streamline/w" in problem or "'w'" in problem:
            file["subj1/streamlines/data_per_streamline/w"] = 0
        change(file)

    assert main(["info", str(edited(tolerant))]) == 1
    text = capfd.readouterr().out
    assert re.search(r"^\d+ PROBLEMS?$", text, re.MULTILINE)
    assert re.search(problem, text.split("PROBLEM")[1], re.MULTILINE), text
    places = [line.strip() for line in text.split("PROBLEM")[1].splitlines()[1:]]
    assert all(place.startswith(("subject '", "no training subjects")) for place in places), places


def test_all_problems_are_told_and_many_are_shortened(edited, capfd):
    def change(file: Any) -> None:
        file["subj0/input/data"][0] = np.nan
        file["subj1/streamlines/offsets"][0] = -1
        file.attrs["testing_subjs"] = [f"missing{number}" for number in range(60)]

    assert main(["info", str(edited(change))]) == 1
    text = capfd.readouterr().out
    assert "62 PROBLEMS" in text
    assert "and 12 more" in text
    assert max(map(len, text.splitlines())) <= 160


@pytest.mark.parametrize("keep", [0, 100, 0.3, 0.999])
def test_a_truncated_file_is_one_line_and_exit_code_2(tmp_path, capfd, keep):
    content = PHANTOM.read_bytes()
    path = tmp_path / "cut.hdf5"
    path.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    assert main(["info", str(path)]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "cut.hdf5" in printed.err
    assert ("Expected an HDF5 file" if keep == 0 else "truncated or corrupt") in printed.err


def test_a_missing_file_is_named(tmp_path, capfd):
    assert main(["info", str(tmp_path / "no.hdf5")]) == 2
    assert "does not exist" in capfd.readouterr().err
    assert main(["info", str(tmp_path)]) == 2
    assert "not a file" in capfd.readouterr().err


@pytest.mark.parametrize("date", [None, "Not recorded", "2026-01-31"])
def test_the_date_is_told_where_it_is_known(edited, date):
    def change(file):
        file.attrs.pop("data_and_time", None)
        if date is not None:
            file.attrs["data_and_time"] = date

    text = format_inspection(inspect_dataset(edited(change)))
    assert ("made 2026-01-31" in text) == (date == "2026-01-31")
    assert ("made" in text) == (date == "2026-01-31")


def test_a_group_of_no_known_type_is_named_and_not_read(edited):
    found = inspect_dataset(edited(lambda file: file["subj0/streamlines"].attrs.update(type="other")))
    (problem,) = (each for each in found.problems if "type" in str(each))
    assert "type 'other'. Expected a group of type 'volume' or 'streamlines'" in str(problem)
    assert "streamlines" not in found.subjects["subj0"]


def test_a_dataset_behind_a_broken_link_is_said_to_be_so(edited):
    def change(file):
        del file["subj0/input/data"], file["subj1/input/data"]
        file["subj0/input/data"] = h5py.SoftLink("/gone")
        file["subj1/input/data"] = h5py.ExternalLink("gone.hdf5", "/a")

    problems = " ".join(map(str, inspect_dataset(edited(change)).problems))
    assert "dataset 'data' is a broken link, to /gone" in problems
    assert "dataset 'data' is a broken link, to gone.hdf5 /a" in problems
