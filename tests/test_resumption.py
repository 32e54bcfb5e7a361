"""Claims about resuming a run: when it is refused, and what is repaired first."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from experiment_cases import (
    CONFIG,
    PHANTOM,
    contents,
    latest_digest,
    restored,
    train_stopped_early,
    trained,
    without_digests,
)

from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.manifest import CheckpointError
from dwiml_func.checkpoint.provenance import environment
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.state import TrainState
from dwiml_func.data.config import DataConfig
from dwiml_func.experiment.config import CheckpointConfig, LoggingConfig, Origin, RunConfig
from dwiml_func.experiment.folder import create_ensemble, create_experiment, read_config
from dwiml_func.experiment.model_store import load_model
from dwiml_func.experiment.resume import (
    check_has_epochs_left,
    check_same_ensemble,
    check_same_run,
    resume_experiment,
    with_new_options,
    with_same_results,
)
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.signals import StopRequest, TrainingStopped
from dwiml_func.experiment.training_config import TrainingConfig


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_stopped_early(tmp_path_factory.mktemp("early"))


@pytest.fixture
def copy(stopped_early: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped_early, tmp_path / "run"))


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({}, r"with patience 2, early stopping ends this run after epoch 4 .*--new-patience of at least 3"),
    ({"new_max_epochs": 20}, r"with patience 2, early stopping"),
    ({"new_patience": 1}, r"with patience 1, .*in a row without improvement: 2.*at least 3"),
    ({"new_patience": 2}, r"with patience 2, early stopping"),
    ({"new_patience": 9, "new_max_epochs": 3}, r"the maximum is 3, epochs done: 4.*at least 5"),
    ({"new_patience": 9, "new_max_epochs": 4}, r"the maximum is 4"),
    ({"new_max_epochs": 0}, r"max_epochs: expected .* at least 1"),
    ({"new_patience": -1}, r"patience: expected .* at least 1"),
    ({"hdf5_file": "/no/such/file.hdf5"}, r"/no/such/file\.hdf5"),
]


@pytest.mark.parametrize(("values", "reason"), REFUSALS, ids=[str(values) for values, _ in REFUSALS])
def test_a_run_that_would_end_at_once_is_refused_and_nothing_changes(copy, values, reason):
    before = contents(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as raised:
        resume_experiment(copy, **values)
    assert "\n" not in str(raised.value)
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("epoch", "bad", "max_epochs", "patience", "new_max_epochs", "new_patience", "refused"),
    [
        (4, 0, 9, None, None, None, None),
        (9, 0, 9, None, None, None, "maximum is 9, epochs done: 9.*at least 10"),
        (9, 0, 9, None, 9, None, "the maximum is 9"),
        (9, 0, 9, None, 10, None, None),
        (12, 0, 9, None, None, None, "the maximum is 9"),
        (4, 1, 9, 2, None, None, None),
        (4, 2, 9, 2, None, None, "with patience 2"),
        (4, 2, 9, 2, 20, None, "with patience 2"),
        (4, 2, 9, 2, None, 2, "with patience 2"),
        (4, 2, 9, 2, None, 3, None),
        (4, 1, 9, 5, None, 1, "with patience 1"),
        (4, 3, 9, None, None, 3, "with patience 3"),
        (9, 2, 9, 2, None, None, "with patience 2"),
        (9, 2, 9, 2, None, 3, "the maximum is 9"),
        (9, 2, 9, 2, 10, 3, None),
    ],
)
def test_the_rules_of_refusal(epoch, bad, max_epochs, patience, new_max_epochs, new_patience, refused):
    state = prepare(CONFIG).first_state().replace(epoch=epoch, best=Best(0.5, epoch - bad, bad))
    config = replace(CONFIG, training=TrainingConfig(max_epochs=max_epochs, patience=patience))
    changed = with_new_options(config, new_max_epochs=new_max_epochs, new_patience=new_patience)

    def check() -> None:
        check_has_epochs_left(state, changed.training, option_prefix="--new-")

    if refused is None:
        check()
    else:
        with pytest.raises(ValueError, match=refused):
            check()


def test_after_new_values_the_run_uses_them(copy):
    before = restored(copy)[1]
    parts, state, history = resume_experiment(copy, new_max_epochs=6, new_patience=5)
    assert history == before
    assert state.epoch == 4
    training = read_config(copy).training
    assert (training.max_epochs, training.patience) == (6, 5)
    assert training == replace(read_config(copy).training, max_epochs=6, patience=5)
    reports = list(run_experiment(copy, parts, state=state, history=history))
    assert [report.epoch for report in reports] == [5, 6]
    assert reports[-1].best.epoch == 2  # the best of before the resume still counts
    assert restored(copy)[1][: len(before)] == before
    assert without_digests(restored(copy)[1]) == without_digests((*before, *reports))
    assert list_checkpoints(copy) == ["2", "5", "6"]
    assert load_model(copy / "best_model").facts["epoch"] == 2
    with pytest.raises(ValueError, match="the maximum is 6"):
        resume_experiment(copy)


def remove(copy: Path) -> None:
    shutil.rmtree(copy / "best_model")


def put_an_older_one(copy: Path) -> None:
    """As after a crash between the checkpoint of a best epoch and its best model."""
    shutil.rmtree(copy / "best_model")
    other = trained(copy.parent, replace(CONFIG, training=TrainingConfig(max_epochs=1)), "other")
    shutil.copytree(other / "best_model", copy / "best_model")


def corrupt(copy: Path) -> None:
    (copy / "best_model" / "model.json").write_text("{")


@pytest.mark.parametrize("spoil", [remove, put_an_older_one, corrupt])
def test_a_best_model_that_is_not_the_best_epochs_is_repaired(copy, spoil: Callable[[Path], None]):
    before = load_model(copy / "best_model").module.state_dict()
    spoil(copy)
    resume_experiment(copy, new_patience=9)
    loaded = load_model(copy / "best_model")
    assert loaded.facts["epoch"] == 2
    for name, tensor in loaded.module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_best_model_whose_checkpoint_is_gone_too_is_told(copy, caplog):
    shutil.rmtree(copy / "best_model")
    shutil.rmtree(copy / "checkpoint" / "2")
    resume_experiment(copy, new_patience=9)
    told = f"{copy / 'best_model'} is not the model of the best epoch, 2, and cannot be repaired: "
    assert [record.getMessage().startswith(told) for record in caplog.records] == [True]
    assert not (copy / "best_model").exists()


def test_logs_that_a_crash_left_behind_are_repaired(copy):
    logs = {name: file for name, file in contents(copy).items() if name.startswith(("logs", "best_epoch"))}
    for name in logs:
        (copy / name).unlink()
    np.save(copy / "logs" / "train_loss_monitor_per_epoch.npy", np.zeros(3))
    parts, state, history = resume_experiment(copy, new_patience=9)
    with pytest.raises(TrainingStopped):  # after the first batch
        list(run_experiment(copy, parts, state=state, history=history, stop=StopRequest(signal.SIGTERM)))
    after = contents(copy)
    assert {name: after[name] for name in logs} == logs


@pytest.mark.parametrize("spoil", [lambda file: b"", lambda file: file[: len(file) // 2], None])
def test_logs_of_a_run_that_has_ended_are_made_again_by_the_resume_that_is_refused(cli, copy, spoil):
    """Logs do not wait for the disk: after a power cut they may be empty, cut short or not there at all."""
    assert cli("evaluate", copy, "--write").code == 0  # a whole run, as the command leaves it
    before = contents(copy)
    logs = [name for name in before if name.startswith("logs/")]
    assert {"logs/metrics.jsonl", "logs/train_loss_monitor_per_epoch.npy"} <= set(logs)
    for name in logs:
        if spoil is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(spoil(before[name]))
    cli("resume", copy.parent, copy.name).check_refusal("early stopping", "--new-patience of at least 3")
    assert contents(copy) == before


def test_an_experiment_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    whole = trained(tmp_path, CONFIG, "whole")
    directory = create_experiment(tmp_path, "killed", CONFIG)
    parts, state, history = resume_experiment(directory)
    assert (state.epoch, history) == (0, ())
    list(run_experiment(directory, parts, state=state, history=history))
    assert latest_digest(directory) == latest_digest(whole)


def test_data_that_moved_is_found_where_one_says(copy, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(PHANTOM, tmp_path / "elsewhere" / "data.hdf5")
    monkeypatch.chdir(tmp_path)
    parts, _, _ = resume_experiment(copy, new_patience=9, hdf5_file="elsewhere/data.hdf5")
    assert parts.data.training.path == tmp_path / "elsewhere" / "data.hdf5"
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
    with pytest.raises(CheckpointError, match="does not fit") as raised:
        resume_experiment(copy, new_patience=9, hdf5_file=str(path))
    assert "(32, 6) in the checkpoint, float32 (32, 12) expected" in str(raised.value)
    assert str(raised.value).count(" in the checkpoint") == 3  # the weight and its two means
    assert contents(copy) == before


def test_another_version_or_machine_is_warned_of_once_and_the_run_resumes(copy, caplog, monkeypatch):
    resume_experiment(copy, new_patience=9)
    assert caplog.records == []
    now = environment()

    def elsewhere(state: TrainState) -> dict[str, Any]:
        return {**now, "torch": "9.9.9", "cpu": "Another", "num_threads": 64, "python": "4.0"}

    monkeypatch.setattr("dwiml_func.experiment.record.environment_of", elsewhere)
    _, state, _ = resume_experiment(copy)
    assert state.epoch == 4
    _, record = caplog.records  # the first is about the patience, of which no checkpoint knows yet
    assert record.getMessage() == (
        "From here on, results may not be bitwise identical: checkpoint 4 comes from other versions or another machine "
        f"(cpu: {now['cpu']!r}, now 'Another'; torch: {now['torch']!r}, now '9.9.9')."
    )


def test_what_is_no_experiment_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match="is not an experiment: it has no config"):
            resume_experiment(path)


def test_a_corrupt_checkpoint_is_set_aside_with_a_warning_and_the_run_resumes_from_the_one_before(
    copy, tmp_path, caplog
):
    (copy / "checkpoint" / "4" / "manifest.json").write_text("{}")
    corrupt = contents(copy / "checkpoint" / "4")
    parts, state, history = resume_experiment(copy, new_patience=9, new_max_epochs=5)
    assert (state.epoch, len(history)) == (3, 3)
    (record,) = caplog.records
    assert record.getMessage() == f"Checkpoint {copy}/checkpoint/4 is corrupt. Resuming from checkpoint 3."
    assert contents(copy / "checkpoint" / "4.corrupt") == corrupt
    list(run_experiment(copy, parts, state=state, history=history))
    whole = Path(shutil.copytree(copy, tmp_path / "again"))
    assert list_checkpoints(whole) == ["2", "4", "5"]
    assert [report.digest for report in restored(copy)[1]][-1] == latest_digest(copy)


def test_a_checkpoint_that_is_corrupt_a_second_time_replaces_the_one_set_aside(copy):
    for content in ("{}", "[]"):
        if not (copy / "checkpoint" / "4").exists():
            shutil.copytree(copy / "checkpoint" / "3", copy / "checkpoint" / "4")
        (copy / "checkpoint" / "4" / "manifest.json").write_text(content)
        assert resume_experiment(copy, new_patience=9)[1].epoch == 3
    assert (copy / "checkpoint" / "4.corrupt" / "manifest.json").read_text() == "[]"
    assert not (copy / "checkpoint" / "4").exists()


def test_batches_to_skip_are_added_once_and_none_are_lost():
    config = replace(CONFIG, training=replace(CONFIG.training, skip_batches=("1:2",)))
    assert with_new_options(config).training.skip_batches == ("1:2",)
    assert with_new_options(config, skip=["2:1", "1:2", "2:1"]).training.skip_batches == ("1:2", "2:1")
    assert with_new_options(CONFIG, skip=["2:1"]).training.skip_batches == ("2:1",)


@pytest.mark.parametrize(
    ("recorded", "given", "is_same"),
    [
        ((), (), True),
        (("5:1",), (), True),
        (("5:1",), ("5:1",), True),
        ((), ("5:1",), False),
        (("5:1",), ("6:1",), False),
    ],
)
def test_the_same_command_is_that_of_a_run_whose_resume_left_batches_out(tmp_path, recorded, given, is_same):
    with_recorded, with_given = (
        replace(CONFIG, training=replace(CONFIG.training, skip_batches=skip)) for skip in (recorded, given)
    )
    directory = create_experiment(tmp_path, "run", with_recorded)
    if is_same:
        check_same_run(directory, with_given)
        return
    with pytest.raises(
        ValueError, match=r"exists in .* with another config \(training\.skip_batches.*Choose another name"
    ):
        check_same_run(directory, with_given)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"max_epochs": 99}, r"or train on: dwiml-func resume \S+ run --new-max-epochs 99$"),
        ({"max_epochs": 1}, r"or resume it as it is: dwiml-func resume \S+ run$"),
        ({"max_epochs": 99, "rng": 5}, r"or resume it as it is: dwiml-func resume \S+ run$"),
        ({"rng": 5}, r"or resume it as it is: dwiml-func resume \S+ run$"),
    ],
)
def test_a_run_of_another_config_is_answered_with_what_can_be_done(tmp_path, changes, hint):
    directory = create_experiment(tmp_path, "run", CONFIG)
    with pytest.raises(ValueError, match=r"^Experiment 'run' exists in .*Choose another name, " + hint):
        check_same_run(directory, replace(CONFIG, training=replace(CONFIG.training, **changes)))


WEIGHTS = Origin(experiment="/models/a", checkpoint="0", digest="ab", start_digest="cd", weights_only=True)


@pytest.mark.parametrize(
    ("recorded", "given", "is_same"),
    [
        (WEIGHTS, "/models/a", True),
        (WEIGHTS, "/models/b", False),
        (None, "/models/a", False),
        (replace(WEIGHTS, weights_only=False), "/models/a", False),
        (WEIGHTS, None, False),
        (None, None, True),
    ],
)
def test_the_same_command_has_the_same_first_weights(tmp_path, recorded, given, is_same):
    directory = create_experiment(tmp_path, "run", replace(CONFIG, origin=recorded))
    if is_same:
        check_same_run(directory, CONFIG, init_from=given)
        return
    with pytest.raises(ValueError, match=r"with another config \(origin"):
        check_same_run(directory, CONFIG, init_from=given)


def test_where_something_else_is_nothing_is_resumed(tmp_path):
    ensemble = create_ensemble(tmp_path, "several", [CONFIG] * 2)
    (tmp_path / "empty").mkdir()
    for name in ("several", "empty"):
        with pytest.raises(ValueError, match=f"^Experiment '{name}' exists in .* or resume it: dwiml-func resume"):
            check_same_run(tmp_path / name, CONFIG)
    run = create_experiment(tmp_path, "run", CONFIG)
    with pytest.raises(ValueError, match=r"^Experiment 'run' exists in"):
        check_same_ensemble(run, [CONFIG])
    with pytest.raises(ValueError, match=r"exists in .* with 2 members\. Received: 3\."):
        check_same_ensemble(ensemble, [CONFIG] * 3)
    check_same_ensemble(ensemble, [CONFIG] * 2)
    with pytest.raises(ValueError, match=r"'several' exists in .* with another config \(training\.rng"):
        check_same_ensemble(ensemble, [CONFIG, replace(CONFIG, training=replace(CONFIG.training, rng=7))])


@pytest.mark.parametrize("num_shards", [1, 2])
def test_what_cannot_change_results_is_taken_from_the_new_command(num_shards):
    recorded = replace(CONFIG, training=replace(CONFIG.training, num_shards=num_shards, num_threads=2))
    given = RunConfig(
        hdf5_file="other.hdf5",
        training=replace(CONFIG.training, num_threads=3, max_epochs=77),
        data=DataConfig(lazy=True, cache_size="1GB", interpolation="nearest"),
        batches=replace(CONFIG.batches, processes=5, reverse_ratio=0.5),
        checkpoints=CheckpointConfig(keep=7),
        logging=LoggingConfig(log_every=3),
    )
    assert with_same_results(recorded, None) == recorded
    assert with_same_results(recorded, given) == replace(
        recorded,
        training=replace(recorded.training, num_threads=3 if num_shards > 1 else 2),
        data=replace(recorded.data, lazy=True, cache_size="1GB"),
        batches=replace(recorded.batches, processes=5),
        checkpoints=given.checkpoints,
        logging=given.logging,
    )


def test_options_that_are_not_given_keep_their_values_and_those_that_are_change_them():
    assert with_new_options(CONFIG) == CONFIG
    changed = with_new_options(CONFIG, hdf5_file="other.hdf5", processes=2, checkpoint_every="5batches", keep=7)
    assert changed.hdf5_file == str(Path("other.hdf5").absolute())
    checkpoints = changed.checkpoints
    assert (changed.batches.processes, checkpoints.checkpoint_every, checkpoints.keep) == (2, "5batches", 7)


@pytest.mark.parametrize("num_members", [1, 2])
def test_a_start_removes_what_a_killed_start_of_its_name_left(tmp_path, num_members):
    nobody = 1 << 22  # no process has this number on Linux
    ours, others = (tmp_path / f".dwiml-tmp-{name}.{nobody}-0123abcd" for name in ("run", "other"))
    for left in (ours, others):
        (left / "checkpoint").mkdir(parents=True)
    if num_members == 1:
        create_experiment(tmp_path, "run", CONFIG)
    else:
        create_ensemble(tmp_path, "run", [CONFIG] * num_members)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([others.name, "run"])
