"""Bitwise identical results of two runs of one config, whatever else differs: every run is a separate process.

One of each pair starts as a user starts it, the other by `preloaded`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from experiment_cases import without_validation
from preloaded import run_command, run_program
from reproduction_cases import DATA, STOCHASTIC, differences, files, results
from reproduction_cases import train as train_from_scratch

from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.checkpoint.digest import leaf_digest, state_leaves
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.experiment.folder import create_experiment, read_config

pytestmark = pytest.mark.soak

EPOCHS = 2
BATCHES = 4


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_from_scratch(tmp_path_factory.mktemp("uninterrupted"), "run", epochs=EPOCHS)


def train(folder: Path, *options: object, epochs: int = EPOCHS) -> Path:
    run_command("train", folder, "run", DATA, *STOCHASTIC, "--max-epochs", epochs, *options)
    return folder / "run"


@pytest.mark.parametrize(
    "options",
    [
        ("--lazy",),
        ("--lazy", "--processes", "2"),
        ("--checkpoint-every", "1batches"),
        ("--checkpoint-every", "3batches", "--keep", "all"),
        ("--checkpoint-every", "0.001minutes"),
    ],
    ids=" ".join,
)
def test_options_that_cannot_change_the_results(uninterrupted: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert differences(results(train(tmp_path, *options)), results(uninterrupted)) == []


def test_other_seeds_give_other_results(uninterrupted: Path, tmp_path: Path) -> None:
    assert "digest" in differences(results(train(tmp_path, "--rng", "7")), results(uninterrupted))


STEP_BY_STEP = """
import sys
from pathlib import Path
from dwiml_func.experiment.signals import StopRequest, TrainingStopped
from dwiml_func.files.lock import experiment_lock
from dwiml_func.experiment.resume import resume_experiment
from dwiml_func.experiment.run import run_experiment
import signal

directory, where, processes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
stop = StopRequest()

def track(batches, label, **position):
    for batch in batches:
        if label == where:
            stop.signal = signal.SIGTERM
        yield batch

with experiment_lock(directory):
    parts, state, history = resume_experiment(directory, processes=processes)
    try:
        list(run_experiment(directory, parts, state=state, history=history, track=track, stop=stop))
    except TrainingStopped as stopped:
        print(stopped.name)
"""


def _go_on(directory: Path, where: str, processes: int = 0) -> str:
    """Resume in a new process, stop after a batch or within the validation; returns the checkpoint's name."""
    return run_program(STEP_BY_STEP, directory, where, processes).strip()


def test_stopped_and_resumed_at_every_batch(uninterrupted: Path, tmp_path: Path) -> None:
    """One run, stopped at every position once, and twice within a validation: on its first batch and on its last."""
    directory = create_experiment(tmp_path, "run", read_config(uninterrupted))
    for epoch in range(EPOCHS):
        for batch in range(BATCHES):
            assert _go_on(directory, "training", processes=int(batch == epoch)) == f"{epoch}-{batch + 1}"
        assert _go_on(directory, "validation") == f"{epoch}-{BATCHES}"
    run_command("resume", tmp_path, "run", "--checkpoint-every", "1epoch")
    assert differences(results(directory), results(uninterrupted)) == []
    assert files(directory) == files(uninterrupted)


def test_stopped_twice_with_workers_and_resumed_with_another_save_interval(uninterrupted: Path, tmp_path: Path) -> None:
    directory = create_experiment(tmp_path, "run", read_config(uninterrupted))
    assert _go_on(directory, "training") == "0-1"
    assert _go_on(directory, "training", 2) == "0-2"
    run_command("resume", tmp_path, "run", "--checkpoint-every", "3batches", "--processes", 2)
    assert differences(results(directory), results(uninterrupted)) == []


WITHOUT_WRITERS = """
import sys
from pathlib import Path
from dwiml_func.experiment.folder import create_experiment, read_config
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.writers.writer import fan_out

folder, config = Path(sys.argv[1]), read_config(Path(sys.argv[2]))
list(run_experiment(create_experiment(folder, "run", config), prepare(config), write=fan_out()))
assert "sympy" not in sys.modules, "torch imports it for few calls, in half a second"
"""


def test_without_writers(uninterrupted: Path, tmp_path: Path) -> None:
    run_program(WITHOUT_WRITERS, tmp_path, uninterrupted)
    assert not (tmp_path / "run" / "logs").exists()
    assert read(tmp_path / "run").digest == read(uninterrupted).digest


def test_without_validation_the_leaves_are_equal(uninterrupted: Path, tmp_path: Path) -> None:
    data = without_validation(tmp_path)
    run_command("train", tmp_path, "run", data, *STOCHASTIC, "--max-epochs", EPOCHS)
    directory = tmp_path / "run"
    leaves, others = (
        {name: leaf_digest(leaf) for name, leaf in state_leaves(read(path).state).items()}
        for path in (directory, uninterrupted)
    )
    assert leaves == others
    assert all(report.valid == {} for report in read(directory).history)


def test_the_record_has_the_digest_of_every_epoch(tmp_path: Path) -> None:
    directory = train(tmp_path, "--keep", "all", epochs=3)
    assert list_checkpoints(directory) == ["1", "2", "3"]
    assert [report.digest for report in read(directory).history] == [
        read(directory, name).digest for name in ("1", "2", "3")
    ]
