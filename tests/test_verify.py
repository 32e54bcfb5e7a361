"""Claims about `verify` and `diff`: equal bits are said to be equal, and a planted fault is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dwiml_func.experiment import read_config
from dwiml_func.leaf_store import load_leaves, read_manifest, save_leaves

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
OPTIONS = ("--rnn-layer-sizes", "8", "--batch-size-training", "40", "--max-epochs", "3", "--reverse-ratio", "0.5")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dwiml_func.cli.main import main

    folder = tmp_path_factory.mktemp("verify")
    data = shutil.copy(PHANTOM, folder / "data.hdf5")
    assert main(["train", str(folder), "run", str(data), *OPTIONS]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_run_is_replayed_to_the_same_bits(cli, run):
    for epoch in ("1", "3"):
        outcome = cli("verify", run, "--epoch", epoch)
        assert (outcome.code, len(outcome.out.splitlines())) == (0, 1)
        assert f"epoch {epoch}," in outcome.out


def test_one_float_changed_by_one_ulp_is_found(cli, run):
    path = run / "checkpoint" / "2"
    manifest, leaves = read_manifest(path), load_leaves(path)
    name = "params/rnn_model.rnn_0.weight_hh_l0"
    flat = leaves[name].view(-1)
    flat[5] = torch.nextafter(flat[5], torch.tensor(torch.inf))
    facts = {key: manifest[key] for key in ("history", "config", "data", "environment")}
    save_leaves(path, leaves, facts, numbers=manifest["numbers"])  # with digests that fit
    outcome = cli("verify", run)
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert "params/" in outcome.out


def test_a_streamline_changed_in_the_data_is_found(cli, finished, tmp_path):
    data = Path(shutil.copy(read_config(finished).hdf5_file, tmp_path / "data.hdf5"))
    with h5py.File(data, "r+") as file:
        points = file["subj0/streamlines/data"]
        assert isinstance(points, h5py.Dataset)
        points[3] = points[3] + np.float32(0.25)
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace(str(finished.parent / "data.hdf5"), str(data)))
    outcome = cli("verify", run)
    assert outcome.code == 1
    assert "data" in outcome.out
    cli("resume", tmp_path, "run", "--new-max-epochs", "4").check_refusal("not the dataset")


def test_a_changed_config_is_found(cli, run):
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"reverse_ratio": 0.5', '"reverse_ratio": 0.25'))
    outcome = cli("verify", run)
    assert outcome.code == 1
    assert "reverse_ratio" in outcome.out


def test_an_epoch_that_is_not_in_the_record_is_refused(cli, run):
    cli("verify", run, "--epoch", "9").check_refusal("9")


def test_diff_tells_the_first_epoch_that_differs(cli, run, tmp_path):
    assert cli("diff", run, run).code == 0
    data = read_config(run).hdf5_file
    assert cli("train", tmp_path, "other", data, *OPTIONS, "--learning-rate", "0.001*2 0.01").code == 0
    outcome = cli("diff", run, tmp_path / "other")
    assert outcome.code == 1
    assert "training.learning_rate" in outcome.out
    assert "first differ after epoch 3" in outcome.out
