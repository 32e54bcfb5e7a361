"""`dwiml-func evaluate`: a model's loss and angular error over all streamlines of a subset."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from dwiml_func.core.rng import Key
from dwiml_func.data.augmentation import Augmentation
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.hdf5.write import new_dataset, write_streamlines, write_volume
from dwiml_func.data.loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.data.spherical_harmonics import half_sphere_directions, multi_tensor_signal, sh_matrix
from dwiml_func.data.streamlines import directions
from dwiml_func.experiment.batches import whole_batches
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.evaluation import evaluate_model
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.model_store import LoadedModel, find_model, load_model
from dwiml_func.models.baselines import angular_error
from dwiml_func.models.config import ModelConfig
from dwiml_func.models.direction_getters import DIRECTION_GETTERS
from dwiml_func.models.learn2track import Learn2Track, compute_batch_loss

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
SH = {"sh_order": 2, "sh_basis": "descoteaux07"}
NAMES = ["subset", "loss", "num_points", "num_streamlines", "angular_error", "compared", "window_lag"]


def test_json_is_one_object_with_the_means_over_all_points(cli, stopped_early):
    outcome = cli(
        "evaluate", stopped_early / "run", stopped_early.parent / "data.hdf5", "--subset", "validation", "--json"
    )
    assert (outcome.code, outcome.err) == (0, "")
    result = json.loads(outcome.out)
    assert len(outcome.out.splitlines()) == 1
    assert list(result) == NAMES
    assert list(result["compared"]) == [
        "model",
        "keep_straight",
        "principal_direction",
        "num_points",
        "num_streamlines",
        "first_points",
    ]

    model = load_model(stopped_early / "run" / "best_model")
    dataset = open_dataset(stopped_early.parent / "data.hdf5", "validation")
    batch = load_batch(BatchRequest(np.arange(48), None, 0, 0), dataset=dataset, spec=LoaderSpec())
    with torch.no_grad():
        loss, weight, aux = compute_batch_loss(model.tracker, batch)
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert result["angular_error"] == pytest.approx(aux["angular_error"].item(), rel=1e-6)
    assert (result["num_points"], result["num_streamlines"]) == (weight, 48)
    assert result["compared"]["num_points"] == weight - 48  # the first points have no previous direction


def test_text_says_the_same_numbers_in_words(cli, stopped_early):
    arguments = ("evaluate", stopped_early / "run" / "best_model", stopped_early.parent / "data.hdf5")
    result = json.loads(cli(*arguments, "--json").out)  # validation is the default
    outcome = cli(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    compared = result["compared"]
    assert outcome.out.splitlines() == [
        "48 streamlines of 1 validation subject",
        f"Mean loss at {result['num_points']} points: {result['loss']:.6g}",
        f"Mean angular error at all points that have a next direction: {result['angular_error']:.2f} deg",
        f"Mean angular error at the {compared['num_points']} points that have a previous direction too:",
        f"  model                {compared['model']:6.2f} deg",
        f"  principal direction  {compared['principal_direction']:6.2f} deg",
        f"  keep going straight  {compared['keep_straight']:6.2f} deg",
    ]


def test_without_harmonics_there_is_no_principal_direction_in_either_form(cli, stopped_early):
    assert (
        json.loads(cli("evaluate", stopped_early / "run", PHANTOM, "--json").out)["compared"]["principal_direction"]
        is None
    )
    assert "principal direction  unknown" in cli("evaluate", stopped_early / "run", PHANTOM).out


@pytest.mark.parametrize("options", [["--batch-size", "7"], ["--lazy"], ["--lazy", "--cache-size", "1MB"]], ids=str)
def test_batches_and_laziness_change_the_last_bits_at_most(cli, stopped_early, options):
    whole = json.loads(cli("evaluate", stopped_early / "run", PHANTOM, "--json").out)
    result = json.loads(cli("evaluate", stopped_early / "run", PHANTOM, "--json", *options).out)
    assert result["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert (result["num_points"], result["num_streamlines"]) == (whole["num_points"], whole["num_streamlines"])


def test_more_batches_than_an_epoch_may_have_are_all_evaluated(cli, tmp_path):
    """An epoch of a training has at most 1000 batches; a subset has all its streamlines."""
    points = np.random.default_rng(1).uniform(2, 7, (1003 * 3, 3))
    with new_dataset(tmp_path / "data.hdf5", training=["p1"], validation=["p2"], groups_config={}, date="x") as file:
        for subject, number in (("p1", 10), ("p2", 1003)):
            group = file.create_group(subject)
            write_volume(group, "input", np.random.default_rng(0).normal(size=(9, 9, 9, 4)), np.eye(4))
            offsets = np.arange(number + 1) * 3
            lines = {"affine": np.eye(4), "dimensions": (9, 9, 9)}
            write_streamlines(group, "streamlines", points[: offsets[-1]], offsets, **lines)
    small = ["--max-epochs", 1, "--skip-figures", "--rnn-layer-sizes", 4, "--batch-size-validation", 600]
    assert cli("train", tmp_path, "run", tmp_path / "data.hdf5", *small).code == 0
    dataset = open_dataset(tmp_path / "data.hdf5", "validation")
    assert len(whole_batches(dataset, read_config(tmp_path / "run"), batch_size=1)) == 1003
    found = {}
    for size in (7, 5000):
        outcome = cli("evaluate", tmp_path / "run", tmp_path / "data.hdf5", "--json", "--batch-size", size)
        found[size] = json.loads(outcome.out)
        assert found[size]["num_streamlines"] == found[size]["compared"]["num_streamlines"] == 1003
        assert found[size]["compared"]["num_points"] == 1003
    assert found[7]["loss"] == pytest.approx(found[5000]["loss"], rel=1e-5)


GETTERS = list(DIRECTION_GETTERS)


@pytest.fixture
def turns(tmp_path: Path) -> Path:
    """Voxels of 1 x 1 x 4 mm, with streamlines of steps of 2 mm, straight and then at 60 degrees; SH of order 2."""
    path, sizes = tmp_path / "turns.hdf5", np.array([1.0, 1, 4])
    steps = np.array([[2.0, 0, 0], [2 * np.cos(np.pi / 3), 0, 2 * np.sin(np.pi / 3)]])
    line = np.array([5.0, 5, 5]) + np.vstack([np.zeros(3), np.cumsum(steps, 0)])
    basis = sh_matrix(half_sphere_directions(100), 2)
    fibre = multi_tensor_signal(
        steps[1][None, None] / 2, np.ones((1, 1)), half_sphere_directions(100), b_value=1000, parallel=1.7e-3,
        perpendicular=3e-4,
    )  # fmt: skip
    volume = np.broadcast_to((np.linalg.pinv(basis) @ fibre[0]), (12, 12, 6, 6))
    with new_dataset(path, training=["p1"], validation=["p2"], groups_config={}, date="x") as file:
        for subject in ("p1", "p2"):
            group = file.create_group(subject)
            write_volume(group, "input", volume, np.diag([*sizes, 1]), attributes=SH)
            points = np.concatenate([line / sizes + 0.5] * 4)
            lines = {"affine": np.diag([*sizes, 1]), "dimensions": (12, 12, 6)}
            write_streamlines(group, "streamlines", points, np.arange(5) * 3, **lines)
    return path


def test_angles_are_those_of_space_where_voxels_are_no_cubes(cli, turns, tmp_path):
    outcome = cli("train", tmp_path, "run", turns, "--skip-figures", "--max-epochs", 1, "--rnn-layer-sizes", 4)
    assert outcome.code == 0
    assert "Voxels are no cubes: directions, steps and noise are in mm along the voxel axes" in outcome.out
    compared = json.loads(cli("evaluate", tmp_path / "run", turns, "--json").out)["compared"]
    assert compared["keep_straight"] == pytest.approx(60, abs=1e-3)
    assert compared["principal_direction"] == pytest.approx(0, abs=1)  # the fibre of the signal is the second step
    summary = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert summary["keep_straight"] == pytest.approx(60, abs=1e-3)
    file_type: Any = h5py.File
    with file_type(turns, "r+") as file:
        for name in ("input", "streamlines"):
            file[f"p2/{name}"].attrs["affine"] = np.diag([1.0, 1, 5, 1])
        file["p2/streamlines"].attrs["voxel_sizes"] = [1.0, 1, 5]
    told = cli("evaluate", tmp_path / "run", turns)
    assert (told.code, "turns.hdf5: expected voxels of 1 x 1 x 4 mm, as in the model's" in told.err) == (0, True)
    with file_type(turns, "r+") as file:
        for subject in file:
            file[f"{subject}/input"].attrs["sh_basis"] = "tournier07"
    cli("evaluate", tmp_path / "run", turns).check_refusal("turns.hdf5", "expected the SH basis 'descoteaux07'")


@pytest.mark.parametrize("key", GETTERS)
def test_losses_of_voxels_that_are_no_cubes_are_those_of_the_same_streamlines_in_cubes(turns, tmp_path, key):
    """The same points in mm on a grid of cubes of 1 mm: losses, angles and outputs are equal, of all getters."""
    cubes = tmp_path / "cubes.hdf5"
    file_type: Any = h5py.File
    with file_type(turns) as old, new_dataset(cubes, training=["p1"], groups_config={}, date="x") as file:
        points = old["p1/streamlines/data"][()] * [1, 1, 4]
        group = file.create_group("p1")
        write_volume(group, "input", np.broadcast_to(old["p1/input/data"][0, 0, 0], (12, 12, 24, 6)), np.eye(4))
        lines = {"affine": np.eye(4), "dimensions": (12, 12, 24)}
        write_streamlines(group, "streamlines", points, np.arange(5) * 3, **lines)
    torch.manual_seed(0)
    model = Learn2Track(6, rnn_layer_sizes=(4,), nb_previous_dirs=1, dg_key=key).eval()
    found = []
    for path in (turns, cubes):
        request = BatchRequest(np.arange(4), Key(3), 0, 0)
        spec = LoaderSpec(augmentation=Augmentation(noise_gaussian_size_forward=0.1, noise_gaussian_size_loss=0.2))
        loss, _, aux = compute_batch_loss(model, load_batch(request, dataset=open_dataset(path), spec=spec))
        found.append([loss.item(), aux["angular_error"].item()])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_the_training_subset_is_both_its_subjects(cli, stopped_early):
    outcome = cli("evaluate", stopped_early / "run", PHANTOM, "--subset", "training", "--json")
    assert json.loads(outcome.out)["num_streamlines"] == 96
    assert cli("evaluate", stopped_early / "run", PHANTOM, "--subset", "training").out.startswith("96 streamlines of 2")


def test_what_is_not_a_number_is_null_in_json(cli, stopped_early, tmp_path):
    data = shutil.copy(PHANTOM, tmp_path / "data.hdf5")
    with h5py.File(data, "r+") as file:  # streamlines of two points have no point with a previous and a next direction
        group = file["subj2/streamlines"]
        assert isinstance(group, h5py.Group)
        for name in ("lengths", "euclidean_lengths"):
            values = group[name]
            assert isinstance(values, h5py.Dataset)
            values[...] = np.full(48, 2 if name == "lengths" else 0.5)
        offsets = np.asarray(group["offsets"])
        points = np.asarray(group["data"])[np.stack([offsets, offsets + 1], axis=1).ravel()]
        del group["data"], group["offsets"]
        group["data"], group["offsets"] = points, 2 * np.arange(48)
    result = json.loads(cli("evaluate", stopped_early / "run", data, "--json").out)
    assert math.isfinite(result["loss"])
    assert result["num_points"] == 48
    assert result["compared"]["model"] is None
    assert "unknown: there are none" in cli("evaluate", stopped_early / "run", data).out


def test_the_function_gives_what_the_command_prints(cli, stopped_early):
    result = evaluate_model(load_model(find_model(stopped_early / "run")), open_dataset(PHANTOM, "validation"))
    printed = json.loads(cli("evaluate", stopped_early / "run", PHANTOM, "--json").out)
    assert (result.loss, result.num_points) == (printed["loss"], printed["num_points"])


def test_the_groups_are_those_of_the_training_unless_others_are_given(cli, tmp_path):
    data = shutil.copy(PHANTOM, tmp_path / "data.hdf5")
    with h5py.File(data, "r+") as file:
        for subject in ("subj0", "subj1", "subj2"):
            file.move(f"{subject}/input", f"{subject}/signal")
            file.move(f"{subject}/streamlines", f"{subject}/lines")
    (tmp_path / "experiments").mkdir()
    groups = ["--input-group-name", "signal", "--streamline-group-name", "lines"]
    options = ["--max-epochs", "1", "--rnn-layer-sizes", "4", "--quiet", "--skip-figures"]
    assert cli("train", tmp_path / "experiments", "run", data, *groups, *options).code == 0
    result = json.loads(cli("evaluate", tmp_path / "experiments" / "run", data, "--json").out)
    others = ["--input-group-name", "input", "--streamline-group-name", "streamlines"]
    assert json.loads(cli("evaluate", tmp_path / "experiments" / "run", PHANTOM, "--json", *others).out) == result
    cli("evaluate", tmp_path / "experiments" / "run", PHANTOM).check_refusal("'signal'")
    cli("evaluate", tmp_path / "experiments" / "run", PHANTOM, *others[:2]).check_refusal("'lines'")


def test_the_means_of_a_model_with_eos_are_over_points_in_each_batch_size(tmp_path):
    """The loss counts the last points too, the angular error those with a next direction; batches differ in both."""
    dataset = open_dataset(PHANTOM, "validation")
    module = Learn2Track(6, rnn_layer_sizes=(8,), dg_args={"add_eos": True}).eval()
    model = LoadedModel(module=module, config=RunConfig(hdf5_file="", model=ModelConfig(add_eos=True)), facts={})
    batch = load_batch(BatchRequest(np.arange(48), None, 0, 0), dataset=dataset, spec=LoaderSpec(add_eos=True))
    with torch.no_grad():
        loss, weight, _ = compute_batch_loss(module, batch)
        errors = angular_error(module.directions(batch), directions(batch.points, batch.offsets))
    for batch_size in (1, 7, 100):
        result = evaluate_model(model, dataset, batch_size=batch_size)
        assert result.loss == pytest.approx(loss.item(), rel=1e-6)
        assert result.num_points == weight == len(batch.points)
        assert result.angular_error == pytest.approx(errors.double().mean().item(), rel=1e-6)


def test_the_principal_direction_does_not_see_the_neighbourhood(cli, stopped_early, tmp_path):
    """The volumes claim to be harmonics; the model's inputs have those of the neighbours too."""
    data = stopped_early.parent / "data.hdf5"
    place = ["--neighborhood-type", "axes", "--neighborhood-radius", "1", "--neighborhood-resolution", "0.5"]
    (tmp_path / "experiments").mkdir()
    arguments = ("train", tmp_path / "experiments", "axes", data, "--max-epochs", "1", "--rnn-layer-sizes", "4")
    outcome = cli(*arguments, *place)
    assert outcome.code == 0, outcome.err
    plain = json.loads(cli("evaluate", stopped_early / "run", data, "--json").out)["compared"]["principal_direction"]
    found = json.loads(cli("evaluate", tmp_path / "experiments" / "axes", data, "--json").out)["compared"]
    assert found["principal_direction"] == pytest.approx(plain, rel=1e-6)
    recorded = json.loads((tmp_path / "experiments" / "axes" / "evaluation.json").read_text())
    assert recorded["principal_direction"] == pytest.approx(plain, rel=1e-6)


def test_a_model_reads_the_points_around_as_it_was_trained_to(cli, tmp_path):
    (tmp_path / "experiments").mkdir()
    options = ["--max-epochs", "2", "--rnn-layer-sizes", "6", "--add-eos", "--nb-previous-dirs", "1", "--quiet"]
    options += ["--skip-figures"]
    kinds = {
        "axes": ["--input-embedding-key", "nn_embedding", "--input-embedded-size", "5"],
        "grid": ["--input-embedding-key", "cnn_embedding", "--nb-cnn-filters", "4", "--kernel-size", "3"],
    }
    for kind, embedding in kinds.items():
        place = ["--neighborhood-type", kind, "--neighborhood-radius", "1", "--neighborhood-resolution", "0.5"]
        arguments = ("train", tmp_path / "experiments", kind, PHANTOM, *options, *place, *embedding)
        assert cli(*arguments).code == 0
        logs = tmp_path / "experiments" / kind / "logs"
        reported = np.load(logs / "valid_local_loss_monitor_per_epoch.npy").min()
        result = json.loads(cli("evaluate", tmp_path / "experiments" / kind, PHANTOM, "--json").out)
        assert result["loss"] == pytest.approx(reported, rel=1e-6)
        assert (result["num_points"], result["compared"]["num_points"]) == (1997, 1901)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["MODEL", "DATA", "--subset", "testing"], ["no streamlines of testing subjects", "DATA"]),
        (["MODEL", "DATA", "--subset", "all"], ["--subset", "'all'"]),
        (["MODEL", "DATA", "--batch-size", "0"], ["batch_size", "received 0"]),
        (["MODEL", "DATA", "--num-threads", "0"], ["num_threads", "received 0"]),
        (["MODEL", "DATA", "--input-group-name", "signal"], ["'signal'", "DATA"]),
        (["MODEL", "DATA", "--input-group-name", "wm_mask"], ["expected input volumes with 6 features", "received 1"]),
        (["MODEL", "FOLDER/nothing.hdf5"], ["does not exist", "nothing.hdf5"]),
        (["MODEL/best_model"], ["config.json"]),
        (["FOLDER/nothing", "DATA"], ["FOLDER/nothing", "is not a folder"]),
        (["FOLDER", "DATA"], ["neither a model directory (no model.json) nor an experiment (no config.json)"]),
        (["DATA", "DATA"], ["is not a folder"]),
        (["REFERENCE", "DATA"], ["is a model of dwi_ml", "dwiml-func import-dwi-ml"]),
        (["NEW", "DATA"], ["has no best model yet"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(cli, stopped_early, tmp_path, arguments, named):
    places = {
        "MODEL": stopped_early / "run",
        "DATA": PHANTOM,
        "FOLDER": tmp_path,
        "REFERENCE": PHANTOM.parent / "cos",
        "NEW": tmp_path / "new",
    }
    (tmp_path / "new").mkdir()
    shutil.copy(stopped_early / "run" / "config.json", tmp_path / "new")

    def placed(text: str) -> str:
        return re.sub("|".join(places), lambda match: str(places[match[0]]), text)

    cli("evaluate", *map(placed, arguments)).check_refusal(*map(placed, named))


def test_the_options_of_the_data_reach_them(cli, stopped_early: Path, monkeypatch) -> None:
    asked: list[dict[str, Any]] = []

    def opened(path: object, subset: str, **options: Any) -> Any:
        asked.append({"path": path, "subset": subset, **options})
        raise ValueError("enough")

    monkeypatch.setattr("dwiml_func.cli.evaluate.open_dataset", opened)
    run, names = stopped_early / "run", ("input_group_name", "streamline_group_name")
    cli("evaluate", run).check_refusal("enough")
    given = ("--input-group-name", "a", "--streamline-group-name", "b", "--lazy", "--cache-size", "3MB")
    cli("evaluate", run, "b.hdf5", "--subset", "testing", *given).check_refusal("enough")
    usual = {
        "path": str(stopped_early.parent / "data.hdf5"),
        "subset": "validation",
        "lazy": False,
        "cache_size": "2GB",
    }
    other = {"path": "b.hdf5", "subset": "testing", "lazy": True, "cache_size": "3MB"}
    assert asked == [
        usual | dict(zip(names, ("input", "streamlines"), strict=True)),
        other | dict(zip(names, "ab", strict=True)),
    ]
