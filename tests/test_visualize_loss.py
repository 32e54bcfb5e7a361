"""Claims about `visualize-loss`: the loss of each point, its colour and its place, as nibabel reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from experiment_cases import PHANTOM
from numpy.testing import assert_allclose, assert_array_equal

from dwiml_func.data.grid import Grid
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.hdf5.subject import read_subject_streamlines
from dwiml_func.data.loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.data.resampling import Resampling
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.data.tractogram_writers import new_tractogram
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.figures.losses import colours_of, draw_eos, draw_losses, thirds
from dwiml_func.experiment.model_store import LoadedModel, load_model
from dwiml_func.experiment.point_losses import PointLosses, displacement, of_one_subject, point_losses
from dwiml_func.models import Learn2Track
from dwiml_func.models.config import ModelConfig

LOADERS: Any = nib.streamlines


def read(path: Path) -> Any:
    return LOADERS.load(path).tractogram


def per_point(tractogram: Any, name: str) -> np.ndarray:
    return np.concatenate(list(tractogram.data_per_point[name]))


@pytest.fixture(scope="module")
def shown(stopped_early: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dwiml_func.cli.main import main

    out = tmp_path_factory.mktemp("shown") / "losses"
    arguments = [stopped_early / "run", stopped_early.parent / "data.hdf5", out, "--subject", "subj2"]
    assert main(["visualize-loss", *map(str, arguments), "--displacement", "2"]) == 0
    return out


def cosine_losses(run: Path) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Losses of each streamline, its points, and all predicted directions, one streamline at a time in float64."""
    dataset = open_dataset(run.parent.parent / "data.hdf5", "validation")
    model = load_model(run / "best_model").tracker
    losses, points, predicted = [], [], []
    for number in range(48):
        batch = load_batch(BatchRequest(np.array([number]), None, 0, 0), dataset=dataset, spec=LoaderSpec())
        with torch.no_grad():
            found = model.directions(batch).double().numpy()
        ahead = np.diff(batch.points.double().numpy(), axis=0)
        found, ahead = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (found, ahead))
        losses.append(1 - (found * ahead).sum(axis=1))
        points.append(batch.points.numpy()[:-1])
        predicted.append(found)
    return losses, points, np.concatenate(predicted)


def test_each_point_has_its_loss_and_its_colour(cli: Any, shown: Path, stopped_early: Path) -> None:
    expected, points, _ = cosine_losses(stopped_early / "run")
    tractogram = read(shown / "loss.trk")
    assert [len(line) for line in tractogram.streamlines] == [len(line) for line in points]
    loss = per_point(tractogram, "loss")
    assert_allclose(loss[:, 0], np.concatenate(expected), atol=1e-6)
    grid = read_subject_streamlines(stopped_early.parent / "data.hdf5", "subj2").grid
    world = (np.concatenate(points) - 0.5) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    assert_allclose(np.concatenate(list(tractogram.streamlines)), world, atol=1e-4)
    colour = per_point(tractogram, "color")
    low, high = np.percentile(loss, [1, 99])
    assert {tuple(row) for row in colour[loss[:, 0] <= low]} == {(68, 1, 84)}  # the ends of viridis
    assert {tuple(row) for row in colour[loss[:, 0] >= high]} == {(253, 231, 37)}
    lightness = colour @ (0.2126, 0.7152, 0.0722)
    order = np.argsort(loss[:, 0])
    assert np.diff(lightness[order]).min() > -2  # rounded to whole colours
    evaluated = cli("evaluate", stopped_early / "run", stopped_early.parent / "data.hdf5", "--json").out
    assert loss.mean() == pytest.approx(json.loads(evaluated)["loss"], rel=1e-5)


def test_the_best_and_the_worst_are_those_of_least_and_largest_mean_loss(shown: Path, stopped_early: Path) -> None:
    means = np.array([each.mean() for each in cosine_losses(stopped_early / "run")[0]])
    for name, order in (("best.trk", np.argsort(means)), ("worst.trk", np.argsort(-means))):
        tractogram = read(shown / name)
        found = [float(each.mean()) for each in tractogram.data_per_point["loss"]]
        assert_allclose(found, means[order[:5]], atol=1e-6)  # 10 % of 48


def test_a_zigzag_goes_one_step_along_the_prediction_and_back(shown: Path, stopped_early: Path) -> None:
    _, points, predicted = cosine_losses(stopped_early / "run")
    lines = list(read(shown / "displacement.trk").streamlines)
    assert len(lines) == 4
    offsets = np.cumsum([0, *map(len, points)])
    affine = read_subject_streamlines(stopped_early.parent / "data.hdf5", "subj2").grid.affine
    for true, zigzag in zip(lines[:2], lines[2:], strict=True):
        assert len(zigzag) == 3 * len(true)
        assert_array_equal(zigzag[::3], true)
        assert_array_equal(zigzag[2::3], true)
        (number,) = [row for row, each in enumerate(points) if len(each) == len(true) and np.allclose(
            (each - 0.5) @ affine[:3, :3].T + affine[:3, 3], true, atol=1e-4)]  # fmt: skip
        steps = zigzag[1::3] - true
        own = predicted[offsets[number] : offsets[number + 1]]
        assert_allclose(steps[:-1] / np.linalg.norm(np.diff(true, axis=0), axis=1)[:, None], own[:-1], atol=1e-3)
    colours = per_point(read(shown / "displacement.trk"), "color")
    num_true = sum(map(len, lines[:2]))
    assert {tuple(row) for row in colours[:num_true]} == {(213, 94, 0)}
    assert tuple(colours[num_true]) == (68, 1, 84)
    assert tuple(colours[-1]) == (253, 231, 37)


def test_steps_are_in_mm_where_voxels_are_no_cubes() -> None:
    sizes = (1.0, 2.0, 3.0)
    model = Learn2Track(2, rnn_layer_sizes=(4,)).eval()
    lines = Streamlines.from_list(
        [np.random.default_rng(seed).uniform(2, 8, size=(length, 3)) for seed, length in enumerate((4, 7, 2))]
    )
    loaded = LoadedModel(module=model, config=RunConfig(hdf5_file=""), facts={})
    dataset = of_one_subject(
        "data.hdf5", "anna", volume=torch.rand(10, 10, 10, 2), grid=Grid(np.diag([*sizes, 1.0]), (10, 10, 10)),
        lines=lines, resampling=Resampling(),
    )  # fmt: skip
    whole, alone = point_losses(loaded, dataset, batch_size=2), point_losses(loaded, dataset, batch_size=1)
    assert whole.lines.lengths.tolist() == [3, 6, 1]
    assert_allclose(whole.loss, alone.loss, atol=1e-6)
    steps = (whole.predicted - whole.lines.points.numpy()) * sizes
    real = np.concatenate([np.diff(line.numpy(), axis=0) for line in lines.to_list()]) * sizes
    assert_allclose(np.linalg.norm(steps, axis=1), np.linalg.norm(real, axis=1), rtol=1e-4)
    cosines = (steps * real).sum(axis=1) / np.linalg.norm(real, axis=1) ** 2
    assert_allclose(whole.loss, 1 - cosines, atol=1e-4)
    assert_allclose(whole.by_streamline, [whole.loss[:3].mean(), whole.loss[3:9].mean(), whole.loss[9]], rtol=1e-6)
    part = whole.select(np.array([2, 0]))
    assert_array_equal(part.loss, whole.loss[[9, 0, 1, 2]])
    assert displacement(part).lengths.tolist() == [3, 9]


def test_at_a_last_point_the_step_is_as_long_as_the_one_that_led_there() -> None:
    model = Learn2Track(2, rnn_layer_sizes=(4,), dg_args={"add_eos": True}).eval()
    config = RunConfig(hdf5_file="", model=ModelConfig(add_eos=True))
    lines = Streamlines.from_list([[[1, 1, 1], [2, 1, 1], [2, 3, 1]], [[4, 4, 4], [4, 4, 7]]])
    dataset = of_one_subject(
        "data.hdf5", "anna", volume=torch.rand(10, 10, 10, 2), grid=Grid(np.eye(4), (10, 10, 10)),
        lines=lines, resampling=Resampling(),
    )  # fmt: skip
    found = point_losses(LoadedModel(module=model, config=config, facts={}), dataset)
    steps = np.linalg.norm(found.predicted - found.lines.points.numpy(), axis=1)
    assert_allclose(steps, [1, 2, 2, 3, 3], rtol=1e-5)
    assert found.is_last.tolist() == [False, False, True, False, True]


def three_lines(eos: bool) -> PointLosses:
    lines = Streamlines.from_list([np.zeros((6, 3)), np.zeros((3, 3)), np.zeros((1, 3))])
    is_last = np.isin(np.arange(10), [5, 8, 9])
    return PointLosses(
        lines,
        np.linspace(0, 0.9, 10, dtype=np.float32),
        np.zeros((10, 3), dtype=np.float32),
        np.linspace(0, 0.9, 10, dtype=np.float32) if eos else None,
        is_last,
    )


def num_counted(panel: Any) -> float:
    (histogram,) = panel.patches
    return histogram.get_data().values.sum()


def test_histograms_count_all_points_and_streamlines() -> None:
    figure = draw_losses(three_lines(eos=False), 0.0, 0.9, "cividis", title="a title")
    assert [num_counted(panel) for panel in figure.axes[:3]] == [10, 10, 3]
    assert figure.axes[1].get_yscale() == "log"
    assert figure.axes[0].get_legend_handles_labels()[1] == ["mean 0.45"]
    assert figure.axes[3].get_xlim() == (0.0, 0.9)
    low, high = draw_losses(three_lines(eos=False), 0.5, 0.5, "cividis", title="").axes[3].get_xlim()
    assert low < 0.5 < high


def test_losses_that_are_almost_equal_have_a_histogram_too() -> None:
    lines = three_lines(eos=False)
    nearly = np.full(len(lines.loss), 0.5, np.float32)
    nearly[0] = np.nextafter(nearly[0], np.float32(1))
    figure = draw_losses(lines._replace(loss=nearly), 0.0, 0.9, "cividis", title="")
    assert num_counted(figure.axes[0]) == 10


def test_the_probability_of_eos_is_shown_by_thirds_and_at_last_points() -> None:
    losses = three_lines(eos=True)
    assert thirds(losses).tolist() == [0, 0, 1, 1, 2, 3, 0, 1, 3, 3]
    figure = draw_eos(losses, title="")
    assert [num_counted(panel) for panel in figure.axes] == [10, 3, 3, 1, 3]
    assert losses.eos_error is not None
    assert_allclose(losses.eos_error, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.2, 0.1], atol=1e-6)
    with pytest.raises(ValueError, match="EOS"):
        draw_eos(three_lines(eos=False), title="")


def test_colours_of_values_outside_of_the_range_are_those_at_its_ends() -> None:
    found = colours_of([-1.0, 0.0, 0.5, 1.0, 7.0], 0.0, 1.0, "cividis")
    assert found[0].tolist() == found[1].tolist() == [0, 34, 78]
    assert found[3].tolist() == found[4].tolist() == [254, 232, 56]
    assert len({tuple(row) for row in colours_of([2.0, 2.0], 2.0, 2.0, "viridis")}) == 1
    wide = colours_of([-14.0, 4.0, 8.0, 12.0, 70.0], 4.0, 12.0, "cividis")
    assert wide.tolist() == found.tolist()


def test_a_model_with_eos_has_a_loss_at_last_points_too(cli: Any, tmp_path: Path) -> None:
    options = ("--rnn-layer-sizes", 4, "--max-epochs", 1, "--batch-size-training", 96, "--add-eos")
    assert cli("train", tmp_path, "run", PHANTOM, *options, "--skip-figures").code == 0
    arguments = ("visualize-loss", tmp_path / "run", PHANTOM)
    done = cli(*arguments, tmp_path / "a", "--subject", "subj0", "--displacement", 0, "--best-and-worst", 1)
    assert (done.code, done.err) == (0, "")
    assert "48 streamlines of subj0, 2255 points" in done.out
    assert "Error of EOS by point" in done.out
    names = ["best.trk", "eos.png", "eos_error.trk", "eos_probability.trk", "loss.png", "loss.trk", "worst.trk"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    tractogram = read(tmp_path / "a" / "eos_probability.trk")
    probability, error = (per_point(tractogram, name)[:, 0] for name in ("eos_probability", "eos_error"))
    last = np.cumsum([len(line) for line in tractogram.streamlines]) - 1
    assert_allclose(error[last], 1 - probability[last], atol=1e-6)
    assert_array_equal(np.delete(error, last), np.delete(probability, last))
    for name, values in (("eos_probability", probability), ("eos_error", error)):
        colours = per_point(read(tmp_path / "a" / f"{name}.trk"), "color")
        assert_array_equal(colours, colours_of(values, 0.0, 1.0, "viridis"))

    real = read_subject_streamlines(PHANTOM, "subj0")
    with new_tractogram(tmp_path / "own.trk", real.grid) as file:
        part = real.streamlines.select([3, 1])
        file.write(part.points.numpy(), part.offsets.numpy())
    assert cli(*arguments, tmp_path / "b", "--subject", "subj0", "--streamlines-file", tmp_path / "own.trk").code == 0
    whole, own = (list(read(tmp_path / folder / "loss.trk").data_per_point["loss"]) for folder in "ab")
    assert len(own) == 2
    assert_allclose(own[0], whole[3], atol=1e-4)
    assert_allclose(own[1], whole[1], atol=1e-4)


def test_what_cannot_be_shown_is_refused_in_one_line_and_leaves_nothing(
    cli: Any, stopped_early: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "losses"
    arguments = ("visualize-loss", stopped_early / "run", stopped_early.parent / "data.hdf5")
    cli(*arguments, out, "--subject", "nobody").check_refusal("nobody")
    cli(*arguments, out, "--subject", "subj2", "--min-range", 2, "--max-range", 1).check_refusal(
        "2 to 1", "--min-range"
    )
    cli(*arguments, out, "--subject", "subj2", "--best-and-worst", 0).check_refusal("best_and_worst", "0")
    cli(*arguments, out, "--subject", "subj2", "--max-range", "nan").check_refusal("max_range", "nan")
    cli(*arguments, out, "--subject", "subj2", "--colormap", "jet").check_refusal("jet", "viridis")
    cli(*arguments, out, "--subject", "subj2", "--streamlines-file", tmp_path / "a.trk").check_refusal("a.trk")
    assert list(tmp_path.iterdir()) == []
    cli(*arguments, tmp_path, "--subject", "subj2").check_refusal("exists", "new folder")
