"""Claims about experiments: what is on disk after each epoch, what may change the training, and how a run goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from dwiml_func import EpochReport, Key, NonFiniteError, TrainState
from dwiml_func.best import Best
from dwiml_func.config import BatchConfig, ModelConfig, RunConfig, TrainingConfig
from dwiml_func.data.batch_loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.data.hdf5 import open_dataset
from dwiml_func.data.streamlines import directions
from dwiml_func.digest import leaf_digest, state_leaves
from dwiml_func.experiment import (
    check_new_experiment,
    create_experiment,
    experiment_directory,
    read_config,
)
from dwiml_func.leaf_store import SnapshotError
from dwiml_func.models.model_directory import load_model
from dwiml_func.resumption import refuse_to_continue, resume_experiment
from dwiml_func.snapshot import latest_digest, list_snapshots, restore
from dwiml_func.training_run import run_experiment
from dwiml_func.wiring import prepare
from dwiml_func.writers.npy import epoch_arrays

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
MODEL = ModelConfig(rnn_layer_sizes=(8,), dg_dropout=0.25)
BATCHES = BatchConfig(batch_size_training=40, batch_size_validation=20)
CONFIG = RunConfig(hdf5_file=str(PHANTOM), model=MODEL, batches=BATCHES, training=TrainingConfig(max_epochs=2))


def trained(parent: Path, config: RunConfig, name: str = "run") -> Path:
    directory = create_experiment(parent, name, config)
    list(run_experiment(directory, prepare(config)))
    return directory


def restored(directory: Path) -> tuple[TrainState, tuple[EpochReport, ...]]:
    snapshot = restore(directory, prepare(read_config(directory)).state)
    return snapshot.state, snapshot.history


def without_digests(history: tuple[EpochReport, ...]) -> tuple[EpochReport, ...]:
    return tuple(replace(report, digest=None) for report in history)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs that learn and two that cannot: the best is epoch 2, and patience ends the run after epoch 4."""
    rates = TrainingConfig(max_epochs=9, patience=2, learning_rate=("0.01*2", "1e-30"))
    return trained(tmp_path_factory.mktemp("early"), replace(CONFIG, training=rates))


@pytest.fixture
def copy(stopped_early: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped_early, tmp_path / "run"))


def test_a_new_experiment_holds_its_config_and_nothing_else(tmp_path):
    directory = create_experiment(tmp_path, "first", CONFIG)
    assert directory == tmp_path / "first"
    assert os.listdir(tmp_path) == ["first"]
    assert os.listdir(directory) == ["config.json"]
    assert read_config(directory) == CONFIG


def test_an_experiment_that_exists_is_refused(tmp_path):
    create_experiment(tmp_path, "first", CONFIG)
    (tmp_path / "file").touch()
    for name in ("first", "file"):
        with pytest.raises(ValueError, match=f"Experiment '{name}' exists in .*resume"):
            check_new_experiment(tmp_path, name)
        with pytest.raises(ValueError, match=f"Experiment '{name}' exists in .*resume"):
            create_experiment(tmp_path, name, CONFIG)


def test_of_two_processes_that_create_one_experiment_one_is_refused(tmp_path, monkeypatch):
    def check_and_be_overtaken(path: Path, name: str) -> Path:
        directory = check_new_experiment(path, name)
        directory.mkdir()
        (directory / "config.json").write_text("the other's")
        return directory

    monkeypatch.setattr("dwiml_func.experiment.check_new_experiment", check_and_be_overtaken)
    with pytest.raises(OSError, match="not empty"):
        create_experiment(tmp_path, "first", CONFIG)
    assert contents(tmp_path) == {"first/config.json": b"the other's"}


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "-a", "a/b", "/a", "a\\b", "a\0b", "a\nb", "a\rb", "a\x1bb", "../a"]
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"Experiment name .* cannot be a folder's name") as raised:
        experiment_directory(tmp_path, name)
    assert repr(name) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a", "a b", "é", "a.b", "a-b", "1", "_", "日本"])
def test_a_plain_name_is_taken(tmp_path, name):
    assert experiment_directory(tmp_path, name) == tmp_path / name


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path / "file", "a\0b"):
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            experiment_directory(path, "a")


def test_after_the_last_report_everything_is_on_disk(tmp_path):
    directory = create_experiment(tmp_path, "run", CONFIG)
    batches = []
    seen = list(
        run_experiment(
            directory, prepare(CONFIG), on_batch=lambda state, metrics: batches.append((state.epoch, state.batch))
        )
    )
    state, history = restored(directory)
    assert without_digests(history) == tuple(seen)
    assert history[-1].digest == latest_digest(directory)
    assert (state.epoch, state.batch, state.best) == (seen[-1].epoch, 0, seen[-1].best)
    assert load_model(directory / "best_model").facts["epoch"] == seen[-1].best.epoch
    for name, array in epoch_arrays(seen).items():
        np.testing.assert_array_equal(np.load(directory / "logs" / f"{name}.npy"), array)
    assert [report.epoch for report in seen] == [1, 2]
    assert batches == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert sorted(os.listdir(directory)) == [
        "best_epoch_losses.json",
        "best_model",
        "checkpoint",
        "config.json",
        "logs",
        "parameters_latest.json",
    ]


def test_the_best_model_is_that_of_the_best_epoch_and_gives_its_loss(stopped_early):
    state, history = restored(stopped_early)
    assert state.best == Best(history[1].valid["loss"], 2, 2)
    assert history[-1].stop == "patience"
    assert list_snapshots(stopped_early) == ["2", "3", "4"]

    loaded = load_model(stopped_early / "best_model")
    best = restore(stopped_early, prepare(read_config(stopped_early)).state, name="2").state
    for name, parameter in loaded.module.named_parameters():
        assert torch.equal(parameter, best.params[name])

    dataset = open_dataset(PHANTOM, "validation")
    request = BatchRequest(np.arange(48), None, 0, 0)
    batch = load_batch(request, dataset=dataset, spec=LoaderSpec())
    with torch.no_grad():
        predicted = loaded.module(batch).double().numpy()
    targets = directions(batch.points, batch.offsets).double().numpy()
    cosines = (predicted * targets).sum(1) / np.linalg.norm(predicted, axis=1) / np.linalg.norm(targets, axis=1)
    losses = json.loads((stopped_early / "best_epoch_losses.json").read_text())
    assert losses == {"train_loss": history[1].train["loss"], "valid_loss": history[1].valid["loss"]}
    assert 1 - cosines.mean() == pytest.approx(losses["valid_loss"], abs=1e-6)
    assert loaded.facts["loss"] == losses["valid_loss"]


def test_parameters_latest_has_the_references_headings(stopped_early):
    parameters = json.loads((stopped_early / "parameters_latest.json").read_text())
    assert list(parameters) == [
        "Date",
        "hdf5 file",
        "Trainer params",
        "Sampler params",
        "Loader params",
        "Model params",
        "Patience",
        "Patience_delta",
    ]
    assert parameters["hdf5 file"] == str(PHANTOM)
    assert parameters["Trainer params"]["learning_rate"] == [0.01, 0.01, 1e-30]
    assert parameters["Sampler params"]["batch_size_training"] == 40
    assert parameters["Model params"]["nb_features"] == 6
    assert (parameters["Patience"], parameters["Patience_delta"]) == (2, 1e-6)


def without_validation(folder: Path) -> Path:
    path = folder / "no_validation.hdf5"
    shutil.copy(PHANTOM, path)
    with h5py.File(path, "r+") as file:
        file.attrs["validation_subjs"] = np.array([], dtype=float)  # as the reference writes an empty list
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the parameters and moments that the plain config ends with."""
    state, _ = restored(trained(tmp_path_factory.mktemp("plain"), CONFIG))
    return {name: leaf_digest(leaf) for name, leaf in state_leaves(state).items()}


@pytest.mark.parametrize(
    "change",
    [{"batch_size_validation": 7}, {"max_batches_per_epoch_validation": 1}, {"batch_size_validation": 1}, None],
    ids=["smaller batches", "capped", "one by one", "no validation"],
)
def test_validation_cannot_touch_training(tmp_path, plain, change):
    if change is None:
        config = replace(CONFIG, hdf5_file=str(without_validation(tmp_path)))
    else:
        config = replace(CONFIG, batches=replace(BATCHES, **change))
    state, history = restored(trained(tmp_path, config))
    assert {name: leaf_digest(leaf) for name, leaf in state_leaves(state).items()} == plain
    assert all(bool(report.valid) == (change is not None) for report in history)


def test_training_can_be_touched(tmp_path, plain):
    """The test above could tell: another order of the training batches gives other parameters."""
    state, _ = restored(trained(tmp_path, replace(CONFIG, training=replace(CONFIG.training, rng=1235))))
    assert not {leaf_digest(leaf) for leaf in state.params.values()} & set(plain.values())


def test_without_validation_the_training_loss_decides(tmp_path):
    rates = TrainingConfig(max_epochs=3, learning_rate=("0.01*2", "10"))
    directory = trained(tmp_path, replace(CONFIG, hdf5_file=str(without_validation(tmp_path)), training=rates))
    state, history = restored(directory)
    losses = [report.train["loss"] for report in history]
    assert state.best == Best(losses[1], 2, 1)
    assert losses[1] == min(losses)
    assert [report.is_best for report in history] == [True, True, False]
    assert json.loads((directory / "best_epoch_losses.json").read_text()) == {
        "train_loss": losses[1],
        "valid_loss": None,
    }
    assert load_model(directory / "best_model").facts["epoch"] == 2
    assert not (directory / "logs" / "valid_local_loss_monitor_per_epoch.npy").exists()


def test_a_capped_validation_sees_the_same_streamlines_every_epoch():
    setup = prepare(replace(CONFIG, batches=replace(BATCHES, max_batches_per_epoch_validation=1)))
    assert setup.valid is not None
    ids = [[batch.ids.tolist() for batch in setup.valid(Key(1234), epoch, 0)] for epoch in (0, 1)]
    assert ids[0] == ids[1]
    assert [len(batch) for batch in ids[0]] == [20]


def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_snapshot_stands(tmp_path):
    rates = TrainingConfig(max_epochs=3, optimizer="SGD", learning_rate=("0.01*1", "1e38"))
    directory = create_experiment(tmp_path, "run", replace(CONFIG, training=rates))
    setup, reports = prepare(read_config(directory)), []
    with pytest.raises(NonFiniteError, match=r"in epoch 2, batch \d \(step \d\), ids \d+, "):
        reports.extend(run_experiment(directory, setup))
    state, history = restored(directory)
    assert (state.epoch, state.step, len(history)) == (1, 3, 1)
    assert list_snapshots(directory) == ["1"]
    assert np.load(directory / "logs" / "train_loss_monitor_per_epoch.npy").shape == (1,)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({}, r"stopped early: patience 2 was reached after epoch 4, .*--new-patience of at least 3"),
    ({"new_max_epochs": 20}, r"stopped early: patience 2 was reached after epoch 4"),
    ({"new_patience": 1}, r"2 epochs in a row without improvement.*new patience of 1 .*at least 3"),
    ({"new_patience": 2}, r"new patience of 2 would stop it at once"),
    ({"new_patience": 9, "new_max_epochs": 3}, r"has done 4 epochs already, so a new maximum of 3 .*at least 5"),
    ({"new_patience": 9, "new_max_epochs": 4}, r"a new maximum of 4 would stop it at once"),
    ({"new_max_epochs": 0}, r"max_epochs: expected .* at least 1"),
    ({"new_patience": -1}, r"patience: expected .* at least 1"),
    ({"hdf5_file": "/no/such/file.hdf5"}, r"/no/such/file\.hdf5"),
]


@pytest.mark.parametrize(("values", "reason"), REFUSALS, ids=[str(values) for values, _ in REFUSALS])
def test_a_run_that_would_end_at_once_is_refused_and_nothing_changes(copy, values, reason):
    (copy / "checkpoint" / ".tmp-5-killed").mkdir()
    (copy / "logs" / "train_loss_monitor_per_epoch.npy").unlink()
    before = contents(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as raised:
        resume_experiment(copy, **values)
    assert "\n" not in str(raised.value)
    assert contents(copy) == before
    assert (copy / "checkpoint" / ".tmp-5-killed").exists()


@pytest.mark.parametrize(
    ("epoch", "bad", "max_epochs", "patience", "new_max_epochs", "new_patience", "refused"),
    [
        (4, 0, 9, None, None, None, None),
        (9, 0, 9, None, None, None, "all of its 9 epochs.*at least 10"),
        (9, 0, 9, None, 9, None, "9 epochs already"),
        (9, 0, 9, None, 10, None, None),
        (12, 0, 9, None, None, None, "all of its 9 epochs"),
        (4, 1, 9, 2, None, None, None),
        (4, 2, 9, 2, None, None, "stopped early"),
        (4, 2, 9, 2, 20, None, "stopped early"),
        (4, 2, 9, 2, None, 2, "new patience of 2"),
        (4, 2, 9, 2, None, 3, None),
        (4, 1, 9, 5, None, 1, "new patience of 1"),
        (4, 3, 9, None, None, 3, "new patience of 3"),
        (9, 2, 9, 2, None, None, "stopped early"),
        (9, 2, 9, 2, None, 3, "all of its 9 epochs"),
        (9, 2, 9, 2, 10, 3, None),
    ],
)
def test_the_rules_of_refusal(epoch, bad, max_epochs, patience, new_max_epochs, new_patience, refused):
    state = prepare(CONFIG).state.replace(epoch=epoch, best=Best(0.5, epoch - bad, bad))
    training = TrainingConfig(max_epochs=max_epochs, patience=patience)

    def check() -> None:
        refuse_to_continue(state, training, new_max_epochs=new_max_epochs, new_patience=new_patience)

    if refused is None:
        check()
    else:
        with pytest.raises(ValueError, match=refused):
            check()


def test_after_new_values_the_run_goes_on_with_them(copy):
    before = restored(copy)[1]
    setup, state, history = resume_experiment(copy, new_max_epochs=6, new_patience=5)
    assert history == before
    assert state.epoch == 4
    training = read_config(copy).training
    assert (training.max_epochs, training.patience) == (6, 5)
    assert training == replace(read_config(copy).training, max_epochs=6, patience=5)
    reports = list(run_experiment(copy, setup, state=state, history=history))
    assert [report.epoch for report in reports] == [5, 6]
    assert reports[-1].best.epoch == 2  # the best of before the resume still counts
    assert restored(copy)[1][: len(before)] == before
    assert without_digests(restored(copy)[1]) == without_digests((*before, *reports))
    assert list_snapshots(copy) == ["2", "5", "6"]
    assert load_model(copy / "best_model").facts["epoch"] == 2
    with pytest.raises(ValueError, match="all of its 6 epochs"):
        resume_experiment(copy)


def remove(copy: Path) -> None:
    shutil.rmtree(copy / "best_model")


def put_an_older_one(copy: Path) -> None:
    """As after a crash between the snapshot of a best epoch and its best model."""
    shutil.rmtree(copy / "best_model")
    other = trained(copy.parent, replace(CONFIG, training=TrainingConfig(max_epochs=1)), "other")
    shutil.copytree(other / "best_model", copy / "best_model")


def damage(copy: Path) -> None:
    (copy / "best_model" / "model.json").write_text("{")


@pytest.mark.parametrize("spoil", [remove, put_an_older_one, damage])
def test_a_best_model_that_is_not_the_best_epochs_is_mended(copy, spoil: Callable[[Path], None]):
    before = load_model(copy / "best_model").module.state_dict()
    spoil(copy)
    resume_experiment(copy, new_patience=9)
    loaded = load_model(copy / "best_model")
    assert loaded.facts["epoch"] == 2
    for name, tensor in loaded.module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_logs_and_leftovers_of_a_kill_are_mended(copy):
    logs = {name: file for name, file in contents(copy).items() if name.startswith(("logs", "best_epoch"))}
    for name in logs:
        (copy / name).unlink()
    np.save(copy / "logs" / "train_loss_monitor_per_epoch.npy", np.zeros(3))
    for folder in (copy, copy / "checkpoint", copy / "logs"):
        (folder / ".tmp-x-killed").mkdir()
    resume_experiment(copy, new_patience=9)
    after = contents(copy)
    assert {name: after[name] for name in logs} == logs
    assert not list(copy.rglob(".tmp-*"))


def test_an_experiment_without_a_snapshot_starts_from_the_beginning(tmp_path):
    whole = trained(tmp_path, CONFIG, "whole")
    directory = create_experiment(tmp_path, "killed", CONFIG)
    setup, state, history = resume_experiment(directory)
    assert (state.epoch, history) == (0, ())
    list(run_experiment(directory, setup, state=state, history=history))
    assert latest_digest(directory) == latest_digest(whole)


def test_data_that_moved_is_found_where_one_says(copy, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(PHANTOM, tmp_path / "elsewhere" / "data.hdf5")
    monkeypatch.chdir(tmp_path)
    setup, _, _ = resume_experiment(copy, new_patience=9, hdf5_file="elsewhere/data.hdf5")
    assert setup.training_set.path == tmp_path / "elsewhere" / "data.hdf5"
    monkeypatch.chdir("/")
    assert read_config(copy).hdf5_file == str(tmp_path / "elsewhere" / "data.hdf5")
    resume_experiment(copy)


def test_data_of_another_width_is_refused_with_every_difference(copy, tmp_path):
    path = tmp_path / "wide.hdf5"
    shutil.copy(PHANTOM, path)
    with h5py.File(path, "r+") as file:
        for subject in ("subj0", "subj1", "subj2"):
            group = file[subject]["input"]  # type: ignore[index]
            wide = np.repeat(group["data"][()], 2, axis=3)  # type: ignore[index]
            del group["data"]  # type: ignore[attr-defined]
            group["data"] = wide  # type: ignore[index]
    before = contents(copy)
    with pytest.raises(SnapshotError, match="does not fit") as raised:
        resume_experiment(copy, new_patience=9, hdf5_file=str(path))
    assert "(32, 6) in the snapshot, float32 (32, 12) expected" in str(raised.value)
    assert str(raised.value).count(" in the snapshot") == 3  # the weight and its two moments
    assert contents(copy) == before


def test_what_is_no_experiment_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match="is not an experiment: it has no config"):
            resume_experiment(path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[" * 100_000, b'{"hdf5_file": 1}', b'{"hdf5_file": "a", "colour": 1}']
)
def test_a_damaged_config_is_refused_by_name(copy, content):
    (copy / "config.json").write_bytes(content)
    before = contents(copy)
    with pytest.raises(ValueError, match=r"run/config\.json: ") as raised:
        resume_experiment(copy, new_patience=9)
    assert "\n" not in str(raised.value)
    assert contents(copy) == before


def test_batches_on_another_device_are_as_many_and_arrive_there(monkeypatch):
    monkeypatch.setattr("dwiml_func.wiring._device", lambda training: torch.device("meta"))
    batches: Any = prepare(CONFIG).train(Key(1234), 0, 1)
    assert len(batches) == 2
    assert [batch.points.device.type for batch in batches] == ["meta", "meta"]


def test_a_model_is_never_judged_on_augmented_streamlines(tmp_path):
    augmented = replace(BATCHES, split_ratio=1.0, noise_gaussian_size_forward=0.01)
    setup = prepare(replace(CONFIG, hdf5_file=str(without_validation(tmp_path)), batches=augmented))
    assert setup.evaluation_set is setup.training_set
    assert sum(len(batch) for batch in setup.train(Key(1234), 0, 0)) > 96
    batches = list(setup.evaluation(Key(1234), 0, 0))
    assert sum(len(batch) for batch in batches) == 96
    assert all(batch.noisy_points is None for batch in batches)
