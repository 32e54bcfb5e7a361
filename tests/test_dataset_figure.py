"""Claims about the figure of a dataset: which lines, in which colour and where, and how many of each length."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from experiment_cases import PHANTOM
from matplotlib.figure import Figure
from test_tracking_figures import drawn

from dwiml_func.data.grid import Grid
from dwiml_func.data.hdf5.subject import read_subject_streamlines
from dwiml_func.data.inspection.inspect import inspect_dataset
from dwiml_func.experiment.figures.dataset import _draw_slices, draw_dataset
from dwiml_func.experiment.figures.panel import COLOURS
from dwiml_func.experiment.figures.streamline_views import VIEWS

BLUE, ORANGE, GREEN = COLOURS[:3]


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Callable[[Any], None]], Path]:
    def edit(change: Callable[[Any], None]) -> Path:
        path = Path(shutil.copy(PHANTOM, tmp_path / "edited.hdf5"))
        with h5py.File(path, "r+") as file:
            change(file)
        return path

    return edit


def counted(panel: Any) -> dict[str, list[int]]:
    """Streamlines of each bin by label."""
    texts = [text.get_text() for text in panel.get_legend().get_texts()] if panel.patches else []
    return {text: patch.get_data().values.tolist() for text, patch in zip(texts, panel.patches, strict=True)}


def test_slices_show_the_volume_where_it_is_in_space() -> None:
    affine = np.array([[0, -2.0, 0, 11], [1.5, 0, 0.5, -7], [0, 0, 3, 4], [0, 0, 0, 1]])
    indices = np.stack(np.meshgrid(*map(np.arange, (10, 9, 8)), indexing="ij"), axis=-1)
    weights, limits = np.array([1.0, 10, 100]), np.array([[-8.0, 13], [-8, 11], [2, 27]])
    volume = (indices @ affine[:3, :3].T + affine[:3, 3]) @ weights  # linear in space, as the interpolation is
    figure = Figure()
    row = figure.subplots(1, len(VIEWS))
    _draw_slices(row, volume.astype(np.float32), Grid(affine, (10, 9, 8)), limits)
    for (_, right, up), panel in zip(VIEWS, row, strict=True):
        (image,) = panel.images
        assert image.get_extent() == [*limits[right], *limits[up]]
        values = np.ma.filled(image.get_array(), np.nan)
        share = (np.arange(len(values)) + 0.5) / len(values)
        places = np.broadcast_to(limits.mean(axis=1), (*values.shape, 3)).copy()
        places[..., right] = (limits[right, 0] + np.diff(limits[right]) * share)[None, :]
        places[..., up] = (limits[up, 0] + np.diff(limits[up]) * share)[:, None]
        voxels = (places - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
        is_shown = ((voxels >= -0.5) & (voxels <= np.array((10, 9, 8)) - 0.5)).all(axis=-1)
        np.testing.assert_array_equal(np.isfinite(values), is_shown)
        assert 0.2 < is_shown.mean() < 1
        is_within = ((voxels >= 0) & (voxels <= np.array((9, 8, 7)))).all(axis=-1)
        np.testing.assert_allclose(values[is_within], (places @ weights)[is_within], atol=0.01)
        low, high = np.nanpercentile(values, [2, 98])
        np.testing.assert_allclose(image.get_clim(), (low, low + 2.5 * (high - low)), rtol=1e-6)
    _draw_slices(figure.subplots(1, len(VIEWS)), volume.astype(np.float32), Grid(affine, (10, 9, 8)), limits + 99)
    assert not any(panel.images for panel in figure.axes[len(VIEWS) :])  # nothing of it is there


def test_without_bundles_each_subject_has_a_row_and_a_colour() -> None:
    figure = draw_dataset(inspect_dataset(PHANTOM))
    *views, lengths = figure.axes
    assert len(views) == 9
    titles = [panel.get_title(loc="left") for panel in views[::3]]
    assert titles == [f"subj{n} ({'validation' if n == 2 else 'training'}): 48 streamlines" for n in range(3)]
    for row, colour in enumerate((BLUE, ORANGE, GREEN)):
        real = read_subject_streamlines(PHANTOM, f"subj{row}")
        points = (real.streamlines.points.numpy() - 0.5) @ real.grid.affine[:3, :3].T + real.grid.affine[:3, 3]
        for panel, (_, right, up) in zip(views[3 * row : 3 * row + 3], VIEWS, strict=True):
            lines = drawn(panel)
            assert {key: len(found) for key, found in lines.items() if found} == {colour: 48}
            np.testing.assert_allclose(np.concatenate(lines[colour]), points[:, [right, up]], atol=1e-4)
            assert panel.get_ylim() == views[0].get_ylim() or right == 0
    found = counted(lengths)
    assert list(found) == ["subj0 (48)", "subj1 (48)", "subj2 (48)"]
    assert [sum(counts) for counts in found.values()] == [48, 48, 48]
    assert lengths.get_title(loc="left") == "Lengths of all 144 streamlines"
    assert figure.get_suptitle() == "phantom.hdf5"


def test_bundles_have_the_same_colour_in_all_subjects(edited: Any) -> None:
    def add_bundles(file: Any) -> None:
        for number in range(3):
            group = file[f"subj{number}/streamlines"]
            group["bundle_ids"] = np.repeat([0, 1], [30, 18])
            group.attrs["bundle_names"] = ["CST", "_AF"] if number != 1 else ["_AF", "CST"]

    *views, lengths = draw_dataset(inspect_dataset(edited(add_bundles))).axes
    for row, expected in enumerate(({BLUE: 30, ORANGE: 18}, {BLUE: 18, ORANGE: 30}, {BLUE: 30, ORANGE: 18})):
        for panel in views[3 * row : 3 * row + 3]:
            assert {colour: len(lines) for colour, lines in drawn(panel).items()} == expected
    found = counted(lengths)
    assert {label: sum(counts) for label, counts in found.items()} == {"CST (78)": 78, "_AF (66)": 66}


def test_a_dataset_without_streamlines_is_drawn_by_its_volumes(edited: Any) -> None:
    def one_subject_of_a_volume_that_lies_aslant(file: Any) -> None:
        for name in ("subj1", "subj2", "subj0/streamlines", "subj0/wm_mask"):
            del file[name]
        file.attrs["training_subjs"], file.attrs["validation_subjs"] = ["subj0"], []
        volume, turn = file["subj0/input"], np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
        values = np.zeros((24, 24, 24, 6), dtype=np.float32)
        values[14:17, 10:13, 11:13, 0] = 1
        volume["data"][...] = values
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = turn, (-3, 5, 40)
        volume.attrs["affine"] = affine

    path = edited(one_subject_of_a_volume_that_lies_aslant)
    *views, lengths = draw_dataset(inspect_dataset(path)).axes
    assert views[0].get_title(loc="left") == "subj0 (training): 0 streamlines"
    assert [text.get_text() for text in lengths.texts] == ["none"]
    with h5py.File(path) as file:
        affine = np.asarray(file["subj0/input"].attrs["affine"])
    place = affine[:3, :3] @ (15, 11, 11.5) + affine[:3, 3]  # voxel centres
    image = np.asarray(views[2].images[0].get_array(), dtype=float)  # axial, through the middle of the volume
    left, right, low, high = views[2].images[0].get_extent()
    rows, columns = np.nonzero(np.nan_to_num(image) > 0.9)
    x = left + (columns.mean() + 0.5) * (right - left) / image.shape[1]
    y = low + (rows.mean() + 0.5) * (high - low) / image.shape[0]
    assert (x, y) == pytest.approx(place[:2], abs=0.3)
    outside = np.isnan(image)
    assert outside[0, 0]  # the corner of the panel is no part of a volume that lies aslant
    assert not outside[80, 80]


def test_of_many_subjects_four_are_drawn_and_all_are_counted(edited: Any) -> None:
    def add_subjects(file: Any) -> None:
        for number in range(3, 9):
            file.copy("subj0", f"subj{number}")
        file.attrs["training_subjs"] = [f"subj{n}" for n in (0, 1, 3, 4, 5, 6)]
        file.attrs["testing_subjs"] = ["subj7", "subj8"]

    figure = draw_dataset(inspect_dataset(edited(add_subjects)))
    *views, lengths = figure.axes
    titles = [panel.get_title(loc="left").split(":")[0] for panel in views[::3]]
    assert titles == ["subj0 (training)", "subj1 (training)", "subj2 (validation)", "subj7 (testing)"]
    assert figure.get_suptitle() == "edited.hdf5, 4 of 9 subjects"
    found = counted(lengths)
    assert list(found)[-1] == "3 other subjects (144)"
    assert sum(sum(counts) for counts in found.values()) == 9 * 48


def test_without_subsets_all_subjects_are_drawn(edited: Any) -> None:
    def forget(file: Any) -> None:
        file.attrs["training_subjs"] = file.attrs["validation_subjs"] = file.attrs["testing_subjs"] = []

    *views, _ = draw_dataset(inspect_dataset(edited(forget))).axes
    titles = [panel.get_title(loc="left") for panel in views[::3]]
    assert titles == [f"subj{n} (no subset): 48 streamlines" for n in range(3)]


def test_info_draws_what_it_is_asked_for_and_what_is_corrupt_is_left_out(cli: Any, edited: Any, tmp_path: Path) -> None:
    plain = cli("info", PHANTOM)
    done = cli("info", PHANTOM, "--figure", tmp_path / "new" / "a.svg")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{plain.out}{tmp_path / 'new' / 'a.svg'}\n"
    assert (tmp_path / "new" / "a.svg").read_bytes().startswith(b"<?xml")
    cli("info", PHANTOM, "--figure", tmp_path / "a.bmp").check_refusal("a.bmp", ".png, .svg or .pdf")

    def corrupt(file: Any) -> None:
        file["subj0/streamlines/data"][3] = np.nan
        file["subj1/input/data"][0] = np.inf
        del file["subj2/streamlines"].attrs["affine"]

    path = edited(corrupt)
    assert cli("info", path, "--picture", tmp_path / "b.png").code == 1
    figure = draw_dataset(inspect_dataset(path))
    num = [sum(len(lines) for lines in drawn(panel).values()) for panel in figure.axes[:-1:3]]
    assert num == [0, 48, 0]
    assert [len(panel.images) for panel in figure.axes[:-1:3]] == [1, 0, 1]

    with h5py.File(path, "r+") as file:
        del file["subj2/input"].attrs["affine"]
    inspection = inspect_dataset(path)
    with h5py.File(path, "r+") as file:  # changed since
        group: Any = file["subj1/streamlines"]
        for name in ("offsets", "lengths"):
            shorter = group[name][:-1]
            del group[name]
            group[name] = shorter
        del file["subj0/streamlines/lengths"]
    panels = draw_dataset(inspection).axes[:-1]
    assert not any(any(drawn(panel).values()) for panel in panels)
    assert [len(panel.images) for panel in panels[::3]] == [1, 0, 0]
