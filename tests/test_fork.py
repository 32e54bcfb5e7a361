"""Claims about `fork`: it ends as its source would have but for the changes, and is complete or absent."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from experiment_cases import latest_digest
from reproduction_cases import DATA, STOCHASTIC, differences, results
from torch.utils._pytree import tree_leaves, tree_structure

from dwiml_func import init_state, sgd
from dwiml_func.checkpoint.arrays import load_leaves, save_leaves
from dwiml_func.checkpoint.checkpoint import read, restore
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.manifest import read_manifest
from dwiml_func.cli.main import main
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.report import EpochReport
from dwiml_func.core.rng import Key
from dwiml_func.experiment.config import Origin, RunConfig
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.fork import _best, create_fork, prepare_fork
from dwiml_func.experiment.model_store import load_model
from dwiml_func.experiment.setup import prepare
from dwiml_func.files.fingerprint import fingerprint


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 epochs of 4 batches, with all its checkpoints, also one within each epoch."""
    folder = tmp_path_factory.mktemp("fork")
    data = shutil.copy(DATA, folder / "data.hdf5")
    options = (*STOCHASTIC, "--checkpoint-every", "3batches", "--keep", "all", "--max-epochs", "4")
    assert main(["train", str(folder), "source", str(data), *options]) == 0
    return folder / "source"


@pytest.fixture
def source(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "source"))


def history(directory: Path) -> tuple[EpochReport, ...]:
    return read(directory).history


def tree(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def fork(cli: Callable[..., Any], source: Path, name: str, *options: object) -> Path:
    outcome = cli("fork", source, name, *options)
    assert (outcome.code, outcome.err) == (0, "")
    return source.parent / name


@pytest.mark.parametrize("name", ["1", "2-3", "3"])
def test_a_fork_without_changes_ends_as_its_source(cli, source, name):
    before = tree(source)
    same = fork(cli, source, "same", "--from", name)
    assert differences(results(same), results(source)) == []
    assert tree(source) == before
    config = read_config(same)
    digest = read(source, name).digest
    assert config.origin == Origin(experiment=str(source), checkpoint=name, digest=digest, start_digest=digest)
    assert dataclasses.replace(config, origin=None) == read_config(source)
    assert name in list_checkpoints(same)


def test_another_learning_rate_makes_a_difference_from_that_epoch_on(cli, source):
    # options first, and fewer checkpoints kept than it takes to hold on to the first one by chance
    outcome = cli("fork", "--learning-rate", "0.01", "--keep", "1", source, "faster", "--from", "2")
    assert outcome.code == 0
    faster = source.parent / "faster"
    assert 'training.learning_rate: ["0.001"] there, ["0.01"] here' in outcome.out
    assert [report.learning_rate for report in history(faster)] == [0.001, 0.001, 0.01, 0.01]
    assert history(faster)[:2] == history(source)[:2]

    outcome = cli("diff", source, faster)
    assert outcome.code == 1
    assert "states: first differ after epoch 3" in outcome.out
    assert "metrics: first differ in epoch 3" in outcome.out

    assert "2" in list_checkpoints(faster)
    outcome = cli("verify", faster, "--epoch", "3")
    assert outcome.code == 0, outcome.out
    assert "replayed from checkpoint 2, is bitwise identical to the recorded epoch" in outcome.out
    cli("verify", faster, "--epoch", "2").check_refusal("before this run was forked", str(source))


def test_another_optimizer_begins_with_a_reset_optimizer_state(cli, source):
    outcome = cli("fork", source, "other", "--from", "3", "--optimizer", "RAdam", "--rng", "5")
    assert outcome.code == 0
    assert "Another optimizer: the optimizer state is reset." in outcome.out
    other = source.parent / "other"
    parts = prepare(read_config(other))
    start, taken = (
        restore(place, parts.first_state().replace(key=Key(seed)), name="3").state
        for place, seed in ((other, 5), (source, 1234))
    )
    assert start.step == 0 < taken.step
    assert all(not tensor.any() for by_name in start.opt_state.values() for tensor in by_name.values())
    assert all(torch.equal(start.params[name], taken.params[name]) for name in taken.params)
    assert (start.best, start.epoch) == (taken.best, 3)
    assert [report.digest for report in history(other)[:3]] == [report.digest for report in history(source)[:3]]
    assert cli("verify", other).code == 0
    assert restore(other, parts.first_state()).state.step == taken.step // 3

    # a start with other bytes, whose own digests fit, is not what was forked
    path = other / "checkpoint" / "3"
    manifest, leaves = read_manifest(path), load_leaves(path)
    leaves["opt_state/exp_avg/rnn_model.rnn_0.bias_hh_l0"][0] = 1e-30
    facts = {key: manifest[key] for key in ("history", "config", "data", "environment")}
    save_leaves(path, leaves, facts, numbers=manifest["numbers"])
    outcome = cli("verify", other)
    assert outcome.code == 1
    assert "checkpoint 3, where the replay began: digest" in outcome.out


def test_options_of_the_source_stay_unless_given(cli, source):
    config = dataclasses.replace(read_config(source), model=dataclasses.replace(read_config(source).model, dropout=0.1))
    fork(cli, source, "a", "--from", "3", "--dropout", "0.1", "--lazy")
    a = read_config(source.parent / "a")
    assert a.data.lazy
    assert dataclasses.replace(a, origin=None, data=config.data) == config
    b = read_config(fork(cli, source.parent / "a", "b", "--from", "3", "--no-lazy", "--max-epochs", "5"))
    assert not b.data.lazy
    assert b.model == a.model
    assert len(history(source.parent / "b")) == 5
    assert b.origin is not None
    assert b.origin.experiment == str(source.parent / "a")


def test_a_model_of_another_structure_is_refused_with_its_first_differences(cli, source):
    before = tree(source.parent)
    cli("fork", source, "wide", "--rnn-layer-sizes", "8", "7", "--max-epochs", "9").check_refusal(
        *("float32 (3, 4) expected", " more. A fork keeps the model's tensors", "model.rnn_layer_sizes"),
    )
    assert tree(source.parent) == before


def test_what_cannot_be_forked_is_refused_and_leaves_nothing(cli, source):
    flip_a_byte(source / "checkpoint" / "2")
    (source.parent / "empty").mkdir()
    before = tree(source.parent)
    cli("fork", source, "a", "--from", "7").check_refusal("No checkpoint '7'", "There are:")
    cli("fork", source, "a", "--from", "../source").check_refusal("No checkpoint '../source'")
    cli("fork", source, "a", "--from", "2").check_refusal(str(source / "checkpoint" / "2"), "corrupt")
    cli("fork", source, "source", "--from", "7").check_refusal("exists", "Choose another name")  # before all else
    cli("fork", source, "..", "--from", "1").check_refusal("'..'")
    cli("fork", source.parent / "empty", "a").check_refusal("is not an experiment")
    cli("fork", source.parent / "nowhere", "a").check_refusal("is not an experiment")
    cli("fork", source).check_refusal("NEW_NAME")
    cli("fork", source, "a", "--from", "1", "--max-epochs", "nine").check_refusal("--max-epochs")
    cli("fork", source, "a").check_refusal("epochs done: 4", "--max-epochs of at least 5")
    cli("fork", source, "a", "--from", "2-3", "--batch-size-training", "9", "--rng", "1").check_refusal(
        "within epoch 3", "batches.batch_size_training", "training.rng"
    )
    assert tree(source.parent) == before


def test_a_source_may_be_the_folder_one_is_in(cli, source, monkeypatch):
    monkeypatch.chdir(source)
    cli("fork", ".", source.name).check_refusal(f"{source.name!r} exists in {str(source.parent)!r}")
    monkeypatch.chdir(source / "logs")
    cli("fork", "..", source.name).check_refusal(f"{source.name!r} exists in {str(source.parent)!r}")


def test_without_a_name_the_newest_valid_checkpoint_is_forked(cli, source):
    end = latest_digest(source)
    flip_a_byte(source / "checkpoint" / "4")
    outcome = cli("fork", source, "a")
    assert outcome.code == 0
    assert "checkpoint 3-3" in outcome.out
    assert f"Checkpoint 4 of {source} is corrupt. Forking from checkpoint 3-3." in outcome.err
    assert latest_digest(source.parent / "a") == end


def test_a_fork_that_was_killed_before_its_first_save_is_resumed(cli, source):
    other = fork(cli, source, "other", "--from", "3", "--learning-rate", "0.01")
    config = dataclasses.replace(read_config(other), origin=None)
    directory = create_fork(source.parent, "killed", prepare_fork(source, config, name="3"))
    assert sorted(path.name for path in directory.iterdir()) == ["best_model", "checkpoint", "config.json"]
    outcome = cli("resume", source.parent, "killed")
    assert (outcome.code, outcome.err) == (0, "")
    assert differences(results(directory), results(other)) == []


def test_a_fork_that_cannot_be_written_leaves_nothing(cli, source, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dwiml_func.experiment.fork.save_evaluated", fail)
    before = tree(source.parent)
    cli("fork", source, "a", "--from", "3").check_refusal("No space left on device")
    assert tree(source.parent) == before
    assert sorted(path.name for path in source.parent.iterdir()) == ["source"]


def test_the_best_epoch_is_reset_with_another_loss(cli, source):
    outcome = cli("fork", source, "other", "--from", "2", "--dg-key", "l2-regression")
    assert outcome.code == 0
    assert "are reset: another model.dg_key changes the monitored loss." in outcome.out
    other = source.parent / "other"
    assert history(other)[1].best == history(source)[1].best
    assert history(other)[2].best == Best(history(other)[2].monitored, 3, 0)
    assert load_model(other / "best_model").facts["epoch"] == history(other)[-1].best.epoch
    assert cli("verify", other, "--epoch", "3").code == 0


@pytest.mark.parametrize(
    ("change", "resets"),
    [
        ({"optimizer": "SGD"}, True),
        ({"rule": ("*bias*: lr=0.1",)}, True),
        ({"accumulate": 2}, True),
        ({"ema": 0.5}, True),
        ({"skip_not_finite": 1}, True),
        ({"weight_decay": 0.5, "clip_grad": 1.0, "learning_rate": ("0.5",)}, False),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_options_of_which_the_optimizer_state_is_made_reset_it(stopped_early, change, resets):
    source = stopped_early / "run"
    recorded = read_config(source)
    training = dataclasses.replace(recorded.training, patience=9, **change)
    found = prepare_fork(source, dataclasses.replace(recorded, training=training))
    fresh = found.parts.optimizer.init(found.state.params)
    assert tree_structure(found.state.opt_state) == tree_structure(fresh)
    assert any("the optimizer state is reset" in note for note in found.notes) == resets
    assert (found.state.step == 0) == resets
    same = [
        torch.equal(*map(torch.as_tensor, pair))
        for pair in zip(*map(tree_leaves, (found.state.opt_state, fresh)), strict=True)
    ]
    assert all(same) == resets


def test_the_options_that_keep_the_meaning_of_the_monitored_loss(tmp_path):
    """Those of loading, and of a validated training those that act on training batches alone; of the training all but
    what is monitored."""
    config, best = RunConfig(hdf5_file=""), Best(0.5, 1, 0)
    state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0).replace(epoch=1, best=best)
    names = ("model", "data", "batches", "training")
    parts = {name: [f"{name}.{option}" for option in dataclasses.asdict(getattr(config, name))] for name in names}

    def kept(is_validated: bool) -> set[str]:
        every = [option for options in parts.values() for option in options]
        return {
            option for option in every if _best(tmp_path, state, state, {option}, is_validated=is_validated)[1] is None
        }

    always = {"data.lazy", "data.cache_size", "batches.processes"}
    always |= {*parts["training"]} - {"training.monitor", "training.monitor_mode"}
    assert kept(False) == always
    assert kept(True) - always == {
        *("model.dropout", "model.dropout_rate", "model.dg_dropout"),
        *("batches.batch_size_training", "batches.max_batches_per_epoch_training"),
        *("batches.noise_gaussian_size_forward", "batches.noise_gaussian_size_loss"),
        *("batches.split_ratio", "batches.reverse_ratio"),
    }


def test_the_best_epoch_is_reset_where_its_model_is_gone(cli, stopped_early, tmp_path):
    experiments = Path(shutil.copytree(stopped_early, tmp_path / "experiments"))
    source = experiments / "run"  # best epoch 2 of 3
    cli("fork", source, "a").check_refusal("in a row without improvement: 1", "--patience of at least 2")
    kept = fork(cli, source, "kept", "--patience", "2", "--max-epochs", "4")
    assert history(kept)[-1].best.epoch == load_model(kept / "best_model").facts["epoch"] == 2
    assert "2" not in list_checkpoints(kept)
    shutil.rmtree(source / "checkpoint" / "2")
    outcome = cli("fork", source, "again", "--max-epochs", "4")
    assert outcome.code == 0
    assert "the model of epoch 2 is missing" in outcome.out
    assert load_model(experiments / "again" / "best_model").facts["epoch"] == 4


def test_other_data_are_taken_when_asked_for_and_noticed_when_not(cli, source):
    data = Path(shutil.copy(DATA, source.parent / "other.hdf5"))
    with h5py.File(data, "r+") as file:
        points = file["subj0/streamlines/data"]
        assert isinstance(points, h5py.Dataset)
        points[3] = points[3] + np.float32(0.25)
    outcome = cli("fork", source, "other", "--from", "3", "--hdf5-file", data)
    assert outcome.code == 0
    assert "another hdf5_file changes the monitored loss" in outcome.out
    found = read(source.parent / "other", "3").data
    assert found["sha256"] == fingerprint(data)["sha256"] != read(source, "3").data["sha256"]
    assert cli("verify", source.parent / "other").code == 0

    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"hdf5_file": str(data)}))
    cli("fork", source, "a", "--from", "3").check_refusal("whose bytes differ", "--hdf5-file")


def test_a_resume_keeps_the_checkpoint_from_which_a_run_was_forked_and_removes_other_old_ones(cli, source):
    config = read_config(source)
    new = dataclasses.replace(config, checkpoints=dataclasses.replace(config.checkpoints, keep=1))
    forked = create_fork(source.parent, "forked", prepare_fork(source, new, name="1-3"))
    assert cli("resume", source.parent, "forked", "--new-max-epochs", 3, "--checkpoint-every", "1epoch").code == 0
    kept = list_checkpoints(forked)
    assert kept[0] == "1-3"
    shutil.copytree(source / "checkpoint" / "2", forked / "checkpoint" / "2", dirs_exist_ok=True)  # as a kill leaves it
    cli("resume", source.parent, "forked").check_refusal("epoch")
    assert list_checkpoints(forked) == kept


def flip_a_byte(checkpoint: Path) -> None:
    for file in [path for path in (checkpoint / "leaves").rglob("*") if path.is_file()]:
        content = bytearray(file.read_bytes())
        content[32::64] = bytes(byte ^ 1 for byte in content[32::64])  # some of them belong to a tensor
        file.write_bytes(content)


def test_what_a_crash_after_the_last_epoch_left_unwritten_a_refused_resume_writes(cli, experiments):
    run = experiments / "run"
    whole = results(run)
    shutil.rmtree(run / "best_model")
    (run / "checkpoint" / ".dwiml-tmp-3.999999999-00000000").mkdir()
    cli("resume", experiments, "run").check_refusal("early stopping")
    assert differences(results(run), whole) == []
    assert not list(run.rglob(".dwiml-*"))
