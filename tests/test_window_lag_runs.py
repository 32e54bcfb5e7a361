"""The window lag of runs: measured at each validation, without any effect on the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dwiml_func.core.rng import Key, Stream, fold_in
from dwiml_func.data import open_dataset
from dwiml_func.data.hdf5.write import new_dataset, write_streamlines, write_volume
from dwiml_func.data.interpolation import interpolate
from dwiml_func.data.resampling import Resampling
from dwiml_func.experiment.model_store import load_model
from dwiml_func.tracking import TrackingSpace, choose_windows, window_lags

NAME = "tracking_window_lag"
OPTIONS = ["--max-epochs", "2", "--rnn-layer-sizes", "6", "--nb-previous-dirs", "1", "--learning-rate", "0.01"]
OPTIONS += ["--skip-figures"]


def make_data(path: Path, *, num_mm: float = 70.0) -> Path:
    """Waves of streamlines along x on a random volume; 2 mm voxels and steps."""
    rng = np.random.default_rng(0)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    step = Resampling(step_size=2)
    with new_dataset(
        path, training=["ann"], validation=["bob", "cid"], groups_config={}, date="", resampling=step
    ) as file:
        for subject, num in (("ann", 12), ("bob", 12), ("cid", 9)):
            group = file.create_group(subject)
            write_volume(group, "input", rng.normal(size=(45, 12, 12, 4)), affine)
            x = np.arange(0, num_mm / 2, 1.0)
            lines = [
                np.stack([x + 3, 6 + 0.8 * np.sin(x / 9 + rng.uniform(0, 6)), 0 * x + rng.uniform(3, 9)], axis=1)
                for _ in range(num)
            ]
            offsets = np.arange(num + 1) * len(x)
            write_streamlines(
                group, "streamlines", np.concatenate(lines), offsets, affine=affine, dimensions=(45, 12, 12)
            )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dwiml_func.cli.main import main

    folder = tmp_path_factory.mktemp("lag")
    make_data(folder / "data.hdf5")
    assert main(["train", str(folder), "with", str(folder / "data.hdf5"), *OPTIONS]) == 0
    assert main(["train", str(folder), "without", str(folder / "data.hdf5"), *OPTIONS, "--skip-window-lag"]) == 0
    return folder


def lines_of(experiment: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (experiment / "logs" / "metrics.jsonl").read_text().splitlines()]


def test_the_lag_is_that_of_the_best_model_and_in_all_logs(folder: Path) -> None:
    logged = [line[f"valid_{NAME}"] for line in lines_of(folder / "with")]
    array = np.load(folder / "with" / "logs" / f"valid_{NAME}_monitor_per_epoch.npy")
    assert array.tolist() == logged
    best = lines_of(folder / "with")[-1]["best_epoch"]
    dataset = open_dataset(folder / "data.hdf5", "validation")
    windows = choose_windows(dataset, key=fold_in(Key(0), Stream.TRACK, 0x1A6))
    assert windows is not None
    assert windows.subject.unique().tolist() == [0, 1]
    model = load_model(folder / "with" / "best_model").tracker.eval()
    volumes = list(dataset.volumes)
    lags = window_lags(model, windows, lambda row: TrackingSpace(volume=volumes[row], voxel_sizes=(2.0, 2.0, 2.0)))
    assert logged[best - 1] == pytest.approx(lags.mean(), rel=1e-12)
    assert 0 < lags.mean() < 40
    assert interpolate(volumes[0], windows.read.points[:1]).shape == (1, 4)  # windows are in voxel space


def test_states_and_other_metrics_are_bitwise_those_without_it(cli, folder: Path) -> None:
    assert cli("digest", folder / "with").out == cli("digest", folder / "without").out
    for mine, other in zip(*map(lines_of, (folder / "with", folder / "without")), strict=True):
        assert f"valid_{NAME}" not in other
        assert {name: value for name, value in mine.items() if name in other and "minutes" not in name} == {
            name: value for name, value in other.items() if "minutes" not in name
        }


def test_a_run_with_it_is_verified_and_one_recorded_without_it_too(cli, folder: Path, tmp_path: Path) -> None:
    import shutil

    assert cli("verify", folder / "with").code == 0
    old = Path(shutil.copytree(folder / "without", tmp_path / "old"))
    config = json.loads((old / "config.json").read_text())
    del config["training"]["skip_window_lag"]  # as an earlier version wrote it
    (old / "config.json").write_text(json.dumps(config))
    outcome = cli("verify", old)
    assert "is bitwise identical" in outcome.out
    assert cli("resume", tmp_path, "old", "--new-max-epochs", "3", "--accept", "skip_window_lag").code == 0
    assert [f"valid_{NAME}" in line for line in lines_of(old)] == [False, False, True]


def test_evaluate_prints_the_lag_of_the_logs(cli, folder: Path) -> None:
    logs = lines_of(folder / "with")
    outcome = cli("evaluate", folder / "with", folder / "data.hdf5", "--json")
    assert json.loads(outcome.out)["window_lag"] == logs[logs[-1]["best_epoch"] - 1][f"valid_{NAME}"]
    assert "Window lag" in cli("evaluate", folder / "with", folder / "data.hdf5").out


def test_lazy_data_shards_and_ensembles_have_it(cli, folder: Path, tmp_path: Path) -> None:
    options = [*OPTIONS, "--max-epochs", "1"]
    for name, more in (("lazy", ["--lazy"]), ("shards", ["--num-shards", "2"])):
        assert cli("train", tmp_path, name, folder / "data.hdf5", *options, *more).code == 0
    expected = lines_of(folder / "with")[0][f"valid_{NAME}"]
    assert lines_of(tmp_path / "lazy")[0][f"valid_{NAME}"] == expected
    assert lines_of(tmp_path / "shards")[0][f"valid_{NAME}"] == pytest.approx(expected, rel=1e-2)
    assert cli("train", tmp_path, "two", folder / "data.hdf5", *options, "--num-models", "2").code == 0
    assert lines_of(tmp_path / "two" / "0")[0][f"valid_{NAME}"] == pytest.approx(expected, rel=1e-2)
    assert "member of an ensemble" in cli("verify", tmp_path / "two" / "0").out


@pytest.mark.parametrize("model", ["tts", "ttst", "tto"])
def test_transformers_have_it_also_where_they_read_few_points(cli, folder: Path, tmp_path: Path, model: str) -> None:
    options = ["--model", model, "--max-epochs", "1", "--input-embedded-size", "4", "--max-len", "35", "--nheads", "1"]
    options += ["--n-layers-e", "1", *(["--target-embedded-size", "4"] if model == "ttst" else [])]
    assert cli("train", tmp_path, "run", folder / "data.hdf5", *options).err == ""
    assert 0 < lines_of(tmp_path / "run")[0][f"valid_{NAME}"] < 40


def test_short_streamlines_and_runs_without_validation_have_none(cli, folder: Path, tmp_path: Path) -> None:
    make_data(tmp_path / "short.hdf5", num_mm=40.0)
    assert cli("train", tmp_path, "short", tmp_path / "short.hdf5", *OPTIONS, "--max-epochs", "1").code == 0
    assert f"valid_{NAME}" not in lines_of(tmp_path / "short")[0]
    refused = cli("train", tmp_path, "monitored", tmp_path / "short.hdf5", *OPTIONS, "--monitor", NAME)
    assert refused.code == 2
    assert f"monitor: {NAME} needs validation streamlines with even steps, of 50 mm or more." in refused.err
    assert not (tmp_path / "monitored").exists()
    assert not refused.out
    make_data(tmp_path / "training.hdf5")
    with h5py.File(tmp_path / "training.hdf5", "r+") as file:
        file.attrs["validation_subjs"] = []
    assert cli("train", tmp_path, "no", tmp_path / "training.hdf5", *OPTIONS, "--max-epochs", "1").code == 0
    assert not any(name.startswith("valid_") and "minutes" not in name for name in lines_of(tmp_path / "no")[0])


def test_it_can_choose_the_best_epoch_and_is_drawn(cli, folder: Path, tmp_path: Path) -> None:
    from dwiml_func.experiment.figures.plots import draw_experiments

    options = [*OPTIONS, "--max-epochs", "3", "--monitor", NAME]
    assert cli("train", tmp_path, "run", folder / "data.hdf5", *options).code == 0
    lags = [line[f"valid_{NAME}"] for line in lines_of(tmp_path / "run")]
    assert lines_of(tmp_path / "run")[-1]["best_epoch"] == 1 + int(np.argmin(lags))
    drawn = []
    for experiment in (folder / "with", folder / "without", tmp_path / "run"):
        titles = [axes.get_title(loc="left") for axes in draw_experiments([experiment]).axes]
        drawn.append("Window lag" in titles)
    assert drawn == [True, False, True]


def test_an_ensemble_measures_and_monitors_that_of_each_member(cli, folder: Path, tmp_path: Path) -> None:
    data = folder / "data.hdf5"
    options = [*OPTIONS, "--sweep", "learning-rate=0.01,0.003", "--monitor", NAME]
    outcome = cli("train", tmp_path, "both", data, *options)
    assert outcome.code == 0, outcome.err
    dataset = open_dataset(data, "validation")
    windows = choose_windows(dataset, key=fold_in(Key(0), Stream.TRACK, 0x1A6))
    assert windows is not None
    volumes = list(dataset.volumes)
    logged = [[line[f"valid_{NAME}"] for line in lines_of(tmp_path / "both" / str(number))] for number in range(2)]
    assert logged[0] != logged[1]
    for number, own in enumerate(logged):
        assert lines_of(tmp_path / "both" / str(number))[-1]["best_epoch"] == 1 + int(np.argmin(own))
        model = load_model(tmp_path / "both" / str(number) / "best_model").tracker.eval()
        lags = window_lags(model, windows, lambda row: TrackingSpace(volume=volumes[row], voxel_sizes=(2.0, 2.0, 2.0)))
        assert min(own) == pytest.approx(lags.mean(), rel=1e-12)
    alone = [line[f"valid_{NAME}"] for line in lines_of(folder / "with")]  # the same seed and rate
    assert logged[0] == pytest.approx(alone, rel=1e-3)
