"""Claims about an experiment's logs: a full or read-only disk costs one warning, and the next resume completes them."""

from __future__ import annotations

import json
import logging
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from experiment_cases import latest_digest
from reproduction_cases import logs

from dwiml_func.core.report import EpochReport
from dwiml_func.data.config import BatchConfig
from dwiml_func.experiment.config import LoggingConfig, RunConfig
from dwiml_func.experiment.folder import create_experiment
from dwiml_func.experiment.logs import experiment_writer
from dwiml_func.experiment.resume import resume_experiment
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models.config import ModelConfig
from dwiml_func.writers.npy import epoch_arrays
from dwiml_func.writers.writer import Writer

CONFIG = RunConfig(
    hdf5_file=str(Path(__file__).parent / "data" / "phantom.hdf5"),
    model=ModelConfig(rnn_layer_sizes=(4,)),
    batches=BatchConfig(batch_size_training=40, batch_size_validation=48),
    training=TrainingConfig(max_epochs=2),
)


def full_disk(directory: Path, write: Writer) -> Writer:
    """The system refuses to write more than 100 bytes into a file while the writer runs."""

    def limited(*reports: EpochReport) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            write(*reports)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def read_only(directory: Path, write: Writer) -> Writer:
    """A folder in which nobody can make a file, not even root."""
    (directory / "logs").symlink_to("/proc/self")
    return write


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = create_experiment(tmp_path_factory.mktemp("whole"), "run", CONFIG)
    list(run_experiment(directory, prepare(CONFIG)))
    return directory


@pytest.mark.parametrize("spoil", [full_disk, read_only])
def test_training_continues_with_one_warning_and_the_next_resume_completes_the_logs(
    tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path, Writer], Writer]
) -> None:
    first = replace(CONFIG, training=TrainingConfig(max_epochs=1))
    directory = create_experiment(tmp_path, "run", first)
    write = spoil(directory, experiment_writer(directory, first))
    with caplog.at_level(logging.WARNING):
        reports = list(run_experiment(directory, prepare(first), write=write))
    assert [report.epoch for report in reports] == [1]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1  # of several writers
    assert "Logs were not written: [Errno" in messages[0]
    assert str(directory) in messages[0]
    assert not (directory / "logs" / "metrics.jsonl").exists()

    if (directory / "logs").is_symlink():
        os.unlink(directory / "logs")
    parts, state, history = resume_experiment(directory, new_max_epochs=2)
    history = (*history, *run_experiment(directory, parts, state=state, history=history))
    assert latest_digest(directory) == latest_digest(whole)
    assert logs(directory) == logs(whole)
    for name, array in epoch_arrays(history).items():
        np.testing.assert_array_equal(np.load(directory / "logs" / f"{name}.npy"), array)
    lines = (directory / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_what_is_logged_is_what_the_config_says(tmp_path: Path) -> None:
    config = replace(CONFIG, training=TrainingConfig(max_epochs=1), logging=LoggingConfig(tensorboard=True))
    directory = create_experiment(tmp_path, "run", config)
    list(run_experiment(directory, prepare(config)))
    names = {path.name for path in (directory / "logs").iterdir() if path.suffix != ".npy"}
    assert names == {"metrics.jsonl", "tensorboard"}
