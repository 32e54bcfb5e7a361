"""Claims about runs: what is on disk after each epoch, and what may change the training."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from experiment_cases import (
    BATCHES,
    CONFIG,
    PHANTOM,
    latest_digest,
    restored,
    train_stopped_early,
    trained,
    without_digests,
    without_validation,
)

from dwiml_func import NonFiniteError, TrainState
from dwiml_func.checkpoint.checkpoint import read, restore
from dwiml_func.checkpoint.digest import leaf_digest, state_digest, state_leaves
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.non_finite import NON_FINITE
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.data.streamlines import directions
from dwiml_func.experiment.config import CheckpointConfig
from dwiml_func.experiment.folder import create_experiment, read_config
from dwiml_func.experiment.model_store import load_model
from dwiml_func.experiment.resume import check_same_data, resume_experiment
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.signals import StopRequest, TrainingStopped
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.files.fingerprint import fingerprint
from dwiml_func.types import Metrics
from dwiml_func.writers.npy import epoch_arrays


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_stopped_early(tmp_path_factory.mktemp("early"))


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
    assert list_checkpoints(stopped_early) == ["2", "3", "4"]

    loaded = load_model(stopped_early / "best_model")
    best = restore(stopped_early, prepare(read_config(stopped_early)).first_state(), name="2").state
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


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the parameters and optimizer state that the plain config ends with."""
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


def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_checkpoint_stands(tmp_path):
    rates = TrainingConfig(max_epochs=3, optimizer="SGD", learning_rate=("0.01*1", "1e38"))
    directory = create_experiment(tmp_path, "run", replace(CONFIG, training=rates))
    parts, reports = prepare(read_config(directory)), []
    with pytest.raises(NonFiniteError, match=r"in epoch 2, batch \d \(step \d\), ids \d+, "):
        reports.extend(run_experiment(directory, parts))
    state, history = restored(directory)
    assert (state.epoch, state.step, len(history)) == (1, 3, 1)
    assert list_checkpoints(directory) == ["1"]
    assert np.load(directory / "logs" / "train_loss_monitor_per_epoch.npy").shape == (1,)


def test_an_error_after_a_signal_is_told_beside_it_and_the_batches_before_it_are_saved(tmp_path):
    directory, stop = create_experiment(tmp_path, "run", CONFIG), StopRequest()

    def fail(state: TrainState, metrics: Metrics) -> None:
        if state.step == 2:
            stop.signal = signal.SIGTERM
            raise RuntimeError("no\nbar")

    with pytest.raises(TrainingStopped, match=r"^stopped by SIGTERM and by an error \(RuntimeError: no") as raised:
        list(run_experiment(directory, prepare(CONFIG), on_batch=fail, stop=stop))
    assert str(raised.value.__cause__) == "no\nbar"
    assert (raised.value.exit_code, raised.value.name) == (143, "0-2")
    assert list_checkpoints(directory) == ["0-2"]


def test_an_error_in_the_validation_costs_no_batch_and_the_resume_repeats_the_validation(tmp_path, plain):
    directory, parts = create_experiment(tmp_path, "run", CONFIG), prepare(CONFIG)

    def fail(state: TrainState, batch: object) -> Metrics:
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        list(run_experiment(directory, replace(parts, eval_step=fail)))
    assert list_checkpoints(directory) == ["0-3"]
    parts, state, history = resume_experiment(directory)
    reports = list(run_experiment(directory, parts, state=state, history=history))
    assert [bool(report.valid) for report in reports] == [True, True]
    assert {name: leaf_digest(leaf) for name, leaf in state_leaves(restored(directory)[0]).items()} == plain


def test_the_runs_number_of_threads_is_set_by_the_first_run_and_by_a_resume(tmp_path, threads):
    config = replace(CONFIG, training=TrainingConfig(max_epochs=1, num_threads=2))
    directory = trained(tmp_path, config)
    assert torch.get_num_threads() == 2
    assert restore(directory, prepare(config).first_state()).environment["num_threads"] == 2
    torch.set_num_threads(1)
    parts, state, history = resume_experiment(directory, new_max_epochs=2)
    list(run_experiment(directory, parts, state=state, history=history))
    assert torch.get_num_threads() == 2


def test_a_number_of_threads_that_cannot_be_had_is_warned_of(tmp_path, threads, monkeypatch, caplog):
    directory = create_experiment(
        tmp_path, "run", replace(CONFIG, training=TrainingConfig(max_epochs=1, num_threads=2))
    )
    parts = prepare(read_config(directory))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # as where a container allows one
    list(run_experiment(directory, parts))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "Expected 2 threads, got 1; results will not be bitwise identical." in record.getMessage()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("stopped", [False, True])
def test_once_a_deferred_check_failed_nothing_is_saved_and_the_last_good_checkpoint_resumes(tmp_path, stopped):
    rates = TrainingConfig(max_epochs=3, optimizer="SGD", learning_rate=("0.01*1", "1e38"))
    config = replace(CONFIG, training=rates, checkpoints=CheckpointConfig(checkpoint_every="1batches"))
    directory, parts, stop = create_experiment(tmp_path, "run", config), prepare(config), StopRequest()
    digests = []

    def on_batch(state: TrainState, metrics: Metrics) -> None:
        if state.sums[NON_FINITE].weight == 0:
            digests.append(state_digest(state))
        elif stopped:
            stop.signal = signal.SIGTERM

    deferring = replace(parts, step=partial(parts.step, non_finite="defer"))  # pyright: ignore[reportCallIssue]
    with pytest.raises(TrainingStopped if stopped else NonFiniteError, match=r"not finite in epoch 2, batch \d"):
        list(run_experiment(directory, deferring, on_batch=on_batch, stop=stop))
    parts, state, history = resume_experiment(directory)
    assert state_digest(state) == digests[-1]
    with pytest.raises(NonFiniteError, match="ids"):
        list(run_experiment(directory, parts, state=state, history=history))


def test_hashing_the_dataset_blocks_no_save(tmp_path, monkeypatch):
    """The first save has only the file's size and time, the last one waits for the hash."""
    released = threading.Event()

    def fingerprint_slowly(path, linked=()):
        released.wait()
        return fingerprint(path, linked)

    monkeypatch.setattr("dwiml_func.files.fingerprint.fingerprint", fingerprint_slowly)
    monkeypatch.setattr("dwiml_func.experiment.run_files.HASH_PATIENCE", 0.0)
    config = replace(CONFIG, training=replace(CONFIG.training, max_epochs=3))
    directory = create_experiment(tmp_path, "run", config)
    for report in run_experiment(directory, prepare(config)):
        if report.epoch == 2:  # its save has waited for the one before
            assert read(directory, "1").data.keys() == {"size", "mtime_ns"}
            check_same_data(read(directory, "1"), config)  # a run that was killed now could be resumed
            released.set()
    whole = fingerprint(PHANTOM)
    assert read(directory).data == whole

    parts, state, history = resume_experiment(directory, new_max_epochs=4)
    list(run_experiment(directory, parts, state=state, history=history))
    assert (read(directory).name, read(directory).data) == ("4", whole)
