"""Claims about the logs: dwi_ml's file names, one value per epoch, always all of them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from report_cases import report

from dwiml_func.core.early_stopping import Best
from dwiml_func.writers.npy import epoch_arrays, npy

DWI_ML_NAMES = {
    "train_loss_monitor_per_epoch",
    "valid_local_loss_monitor_per_epoch",
    "unclipped_grad_norm_monitor_per_epoch",
    "grad_norm_monitor_per_epoch",
    "training_time_monitor_duration",
    "validation_time_monitor_duration",
}
"""Files that dwi_ml's trainer leaves in logs/, as its plotting scripts look for them."""


def logs(directory: Path) -> dict[str, np.ndarray]:
    files = sorted((directory / "logs").iterdir())
    assert all(file.suffix == ".npy" for file in files)
    return {file.stem: np.load(file) for file in files}


def test_the_files_have_dwi_mls_names_and_ours_beside_them():
    ours = {
        "learning_rate_per_epoch",
        "train_angular_error_monitor_per_epoch",
        "valid_angular_error_monitor_per_epoch",
    }
    assert set(epoch_arrays([report(1)])) == DWI_ML_NAMES | ours


def test_each_array_has_one_value_per_epoch_in_order():
    arrays = epoch_arrays([report(epoch, valid_minutes=0 if epoch == 1 else 0.125) for epoch in (1, 2, 4)])
    assert epoch_arrays([report(1, learning_rate=1)])["learning_rate_per_epoch"].dtype == np.float64
    assert {array.shape for array in arrays.values()} == {(3,)}
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float64)}
    expected = {
        "train_loss_monitor_per_epoch": [1.0, 0.5, 0.25],
        "valid_local_loss_monitor_per_epoch": [2.0, 1.0, 0.5],
        "unclipped_grad_norm_monitor_per_epoch": [5.0, 10.0, 20.0],
        "grad_norm_monitor_per_epoch": [1.0, 1.0, 1.0],
        "training_time_monitor_duration": [0.25, 0.5, 1.0],
        "validation_time_monitor_duration": [0.0, 0.125, 0.125],
        "learning_rate_per_epoch": [0.1, 0.05, 0.025],
        "train_angular_error_monitor_per_epoch": [30.0] * 3,
        "valid_angular_error_monitor_per_epoch": [40.0] * 3,
    }
    assert {name: array.tolist() for name, array in arrays.items()} == expected


def test_an_epoch_without_a_metric_has_nan_there():
    arrays = epoch_arrays([report(1, valid={}), report(2), report(3, train={"loss": math.inf})])
    np.testing.assert_array_equal(arrays["valid_local_loss_monitor_per_epoch"], [np.nan, 1.0, 2 / 3])
    np.testing.assert_array_equal(arrays["grad_norm_monitor_per_epoch"], [1.0, 1.0, np.nan])
    assert arrays["train_loss_monitor_per_epoch"][2] == np.inf


def test_without_validation_there_is_no_validation_loss():
    assert "valid_local_loss_monitor_per_epoch" not in epoch_arrays([report(1, valid={})])


def test_every_call_writes_the_whole_history(tmp_path):
    write = npy(tmp_path)
    write(report(1))
    write(report(2))
    written, expected = logs(tmp_path), epoch_arrays([report(1), report(2)])
    assert set(written) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(written[name], array)
        assert written[name].dtype == np.float64


def test_the_losses_of_the_best_epoch_are_in_dwi_mls_file(tmp_path):
    history = [report(1), report(2, best=Best(2.0, 1, 1), is_best=False)]
    write = npy(tmp_path)
    write(*history)
    text = (tmp_path / "best_epoch_losses.json").read_text()
    assert text == '{\n    "train_loss": 1.0,\n    "valid_loss": 2.0\n}\n'
    write(report(3))
    assert json.loads((tmp_path / "best_epoch_losses.json").read_text()) == {"train_loss": 1 / 3, "valid_loss": 2 / 3}


def test_without_validation_the_best_epoch_has_no_validation_loss(tmp_path):
    npy(tmp_path)(report(1, valid={}))
    assert json.loads((tmp_path / "best_epoch_losses.json").read_text()) == {"train_loss": 1.0, "valid_loss": None}


def test_without_a_best_epoch_there_is_no_file_of_it(tmp_path):
    npy(tmp_path)(report(1, best=Best(num_bad_epochs=1), is_best=False))
    assert os.listdir(tmp_path) == ["logs"]


def test_a_full_disk_leaves_the_older_logs_until_there_is_space_again(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    write = npy(tmp_path)
    write(report(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            write(report(2))
    assert {array.shape for array in logs(tmp_path).values()} == {(1,)}
    write(report(3))
    assert {array.shape for array in logs(tmp_path).values()} == {(3,)}


@pytest.mark.parametrize("name", ["acc/left", "../../out", "a%2Fb", "/root"])
def test_a_metrics_name_is_no_path(tmp_path, name):
    train = report(1).train | {name: 0.5}
    npy(tmp_path / "run")(report(1, train=train))
    files = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert len(files) == len(epoch_arrays([report(1)])) + 1
    assert f"train_{quote(name, safe=' ')}_monitor_per_epoch.npy" in files


def test_metrics_of_names_too_long_for_a_file_stay_apart(tmp_path):
    names = ["é" * 150, "é" * 149 + "e"]
    npy(tmp_path)(report(1, train=report(1).train | dict.fromkeys(names, 0.5)))
    assert len(list((tmp_path / "logs").iterdir())) == len(epoch_arrays([report(1)])) + 2
