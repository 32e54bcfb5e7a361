"""Claims about a resume compared with what was recorded: no option, data or list of members changes in silence."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from experiment_cases import CONFIG, PHANTOM, contents, trained

from dwiml_func.checkpoint.checkpoint import Checkpoint, newest, read
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import create_experiment, read_config
from dwiml_func.experiment.logs import run_parameters, write_parameters
from dwiml_func.experiment.record import check_same_config, may_change
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.training_config import TrainingConfig

ONE_EPOCH = replace(CONFIG, training=TrainingConfig(max_epochs=1))
RESULTS = ("data", "batches", "model", "training", "origin")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs"), ONE_EPOCH)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def deciding(config: RunConfig) -> dict[str, Any]:
    """The options that decide results, apart from when the run ends."""
    values = {name: config.to_dict()[name] for name in RESULTS}
    for name in ("max_epochs", "patience"):
        values["training"].pop(name)
    values["training"]["learning_rate"] = run_parameters(config, nb_features=1)["Trainer params"]["learning_rate"]
    for part, name in (("data", "lazy"), ("data", "cache_size"), ("batches", "processes")):
        values[part].pop(name)
    return values


@pytest.mark.parametrize("has_shards", [False, True])
def test_the_options_of_which_a_resume_may_give_others(has_shards):
    config = CONFIG.to_dict()
    parts = ("data", "batches", "model", "training", "checkpoints", "logging")
    names = {f"{part}.{option}" for part in parts for option in config[part]}
    free = {f"{part}.{option}" for part in ("checkpoints", "logging") for option in config[part]}
    free |= {"training.max_epochs", "training.patience", "training.skip_batches"}
    free |= {"batches.processes", "data.lazy", "data.cache_size"}
    found = {name for name in names if may_change(name, has_shards=has_shards)}
    assert found == free | ({"training.num_threads"} if has_shards else set())


def told(
    directory: Path, content: bytes, recorded: Checkpoint | None, caplog: pytest.LogCaptureFixture
) -> tuple[bool, RunConfig | None]:
    """Whether a resume refuses a config or warns of it, and the config with which it would continue."""
    (directory / "config.json").write_bytes(content)
    caplog.clear()
    try:
        config = read_config(directory)
        check_same_config(directory, config, recorded)
    except ValueError:
        return True, None
    return bool(caplog.records), config


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_no_flipped_bit_of_a_config_is_taken_in_silence(copy, tmp_path, caplog, has_checkpoint):
    config = read_config(copy)
    if not has_checkpoint:
        copy = create_experiment(tmp_path, "killed", config)
        write_parameters(copy, config, nb_features=5, now=datetime.now())
    original, draws = (copy / "config.json").read_bytes(), random.Random(17)
    in_silence, recorded = [], newest(copy)
    assert (recorded is not None) == has_checkpoint
    for place in range(len(original)):
        flipped = bytearray(original)
        flipped[place] ^= 1 << draws.randrange(8)
        is_told, taken = told(copy, bytes(flipped), recorded, caplog)
        if not is_told and taken is not None and deciding(taken) != deciding(config):
            in_silence.append((place, original[place], flipped[place]))
    assert in_silence == []


def test_an_edited_option_is_refused_by_name_and_taken_when_it_is_accepted(cli, copy):
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"dg_dropout": 0.25', '"dg_dropout": 0.5'))
    before = contents(copy)
    resume = ("resume", copy.parent, "run", "--new-max-epochs", "2")
    cli(*resume).check_refusal("model.dg_dropout 0.5, recorded 0.25", "--accept dg_dropout")
    cli("fork", copy, "fork", "--max-epochs", "2").check_refusal("model.dg_dropout 0.5, recorded 0.25", "--accept")
    assert contents(copy) == before
    done = cli(*resume, "--accept", "dg_dropout")
    assert done.code == 0
    assert "model.dg_dropout 0.5, recorded 0.25" in done.err
    checkpoint = newest(copy)
    assert checkpoint is not None
    assert (checkpoint.name, checkpoint.config["model"]["dg_dropout"]) == ("2", 0.5)
    assert cli("resume", copy.parent, "run", "--new-max-epochs", "3").err == ""  # from now on, that is recorded


def test_an_option_that_a_resume_may_change_is_shown(copy, caplog):
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"max_epochs": 1', '"max_epochs": 5'))
    check_same_config(copy, read_config(copy), newest(copy))
    (record,) = caplog.records
    assert "training.max_epochs 5, recorded 1" in record.getMessage()


def test_options_of_a_later_version_are_no_difference(copy, caplog):
    checkpoint = newest(copy)
    assert checkpoint is not None
    recorded = json.loads(json.dumps(checkpoint.config))
    del recorded["training"]["clip_grad"]
    check_same_config(copy, read_config(copy), replace(checkpoint, config=recorded))
    assert caplog.records == []


def change_in_secret(path: Path, change: Callable[[Any], None]) -> None:
    """Write other values into a file; its size and the time of its last change stay."""
    before = path.stat()
    with h5py.File(path, "r+") as file:
        change(file)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def move_a_point(file: Any) -> None:
    file["subj0/streamlines/data"][5, 0] += 0.25


def as_it_is(path: Path) -> Path:
    return path


def by_an_external_link(path: Path) -> Path:
    """The streamlines of a subject stand in another file; returns that file."""
    other = path.with_name("other.hdf5")
    with h5py.File(path, "r+") as file, h5py.File(other, "w") as target:
        file.copy("subj0", target)
        del file["subj0"]
        file["subj0"] = h5py.ExternalLink("other.hdf5", "/subj0")
    return other


def by_a_virtual_source(path: Path) -> Path:
    other = path.with_name("other.hdf5")
    with h5py.File(path, "r+") as file, h5py.File(other, "w") as target:
        group: Any = file["subj0/streamlines"]
        target["subj0/streamlines/data"] = group["data"][()]
        source = h5py.VirtualSource("other.hdf5", "subj0/streamlines/data", shape=group["data"].shape)
        del group["data"]
        layout = h5py.VirtualLayout(source.shape, dtype=np.float32)
        layout[:] = source
        group.create_virtual_dataset("data", layout)
    return other


@pytest.mark.parametrize("arrange", [as_it_is, by_an_external_link, by_a_virtual_source])
def test_data_with_other_bytes_end_the_run_whatever_size_and_time_say(cli, tmp_path, arrange):
    data = Path(shutil.copy(PHANTOM, tmp_path / "data.hdf5"))
    source = arrange(data)
    run = trained(tmp_path, replace(ONE_EPOCH, hdf5_file=str(data)))
    assert cli("verify", run).code == 0
    change_in_secret(source, move_a_point)
    before = contents(run / "checkpoint")
    for command in (("resume", tmp_path, "run"), ("fork", run, "fork")):
        done = cli(*command, "--new-max-epochs" if "resume" in command else "--max-epochs", 2)
        assert done.code == 2
        assert f"Received: {data}, whose bytes differ" in done.err.splitlines()[-1]
    assert contents(run / "checkpoint") == before
    assert not (run / "evaluation.json").exists()
    assert list_checkpoints(tmp_path / "fork") == ["1"]
    assert cli("verify", run).code == 1


def test_an_ensemble_refuses_other_bytes_too(cli, tmp_path):
    data = Path(shutil.copy(PHANTOM, tmp_path / "data.hdf5"))
    options = ("--rnn-layer-sizes", 4, "--batch-size-training", 96, "--batch-size-validation", 48, "--num-models", 2)
    assert cli("train", tmp_path, "run", data, *options, "--max-epochs", 1, "--skip-figures").code == 0
    change_in_secret(data, move_a_point)
    done = cli("resume", tmp_path, "run", "--new-max-epochs", 2)
    assert (done.code, list_checkpoints(tmp_path / "run" / "1")) == (2, ["1"])
    assert "whose bytes differ" in done.err


def test_data_that_were_changed_after_they_were_read_are_not_recorded(tmp_path, caplog):
    data = Path(shutil.copy(PHANTOM, tmp_path / "data.hdf5"))
    parts = prepare(replace(ONE_EPOCH, hdf5_file=str(data)))
    os.utime(data, ns=(1, 1))
    list(run_experiment(create_experiment(tmp_path, "run", parts.config), parts))
    assert "was changed after it was read" in caplog.text
    assert read(tmp_path / "run").data == {}
