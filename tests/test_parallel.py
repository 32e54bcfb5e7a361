"""Runs of several processes: bitwise identical for any number, stopped together, resumed with any number."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from preloaded import TORCHRUN, Fork, finished, run_command, run_ranks, start_program, start_ranks
from reproduction_cases import DATA, STOCHASTIC, differences, files, results

from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.distributed.process_group import ProcessLostError, join_process_group

pytestmark = pytest.mark.soak

SHARDS = ("--num-shards", 4)
EPOCHS = 2
ENDLESS = (*STOCHASTIC, "--max-epochs", 1000, *SHARDS, "--checkpoint-every", "1batches")
ENDLESS = (*ENDLESS, "--monitor", "loss")  # torchrun has options of such names


def _start(num_processes: int, folder: Path) -> Fork:
    """A run that saves after every batch, once it is past its first epoch. It does not end by itself."""
    launcher = ("--standalone", "--nproc-per-node", num_processes, "-m", "dwiml_func", "--")
    process = start_program(TORCHRUN, *launcher, "train", folder, "run", DATA, *ENDLESS)
    _wait_for_second_epoch(process, folder / "run")
    assert process.poll() is None, process.err
    return process


def _wait_for_second_epoch(process: Fork, directory: Path) -> None:
    while process.poll() is None and not any(name.startswith("1-") for name in list_checkpoints(directory)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)  # between two looks at the disk


def _resumed_as_alone(num_processes: int, folder: Path) -> Sequence[str]:
    """Resume a stopped run with other processes to the end of its next epoch, and compare it with one process's run."""
    epochs = read(folder / "run").state.epoch + 2
    run_ranks(num_processes, "resume", folder, "run", "--checkpoint-every", "1epoch", "--new-max-epochs", epochs)
    run_ranks(1, "train", folder, "alone", DATA, *STOCHASTIC, "--max-epochs", epochs, *SHARDS)
    return _same(folder / "run", folder / "alone")


def _same(directory: Path, expected: Path) -> Sequence[str]:
    assert files(directory) == files(expected)
    return differences(results(directory), results(expected))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run_command("train", folder, "run", DATA, *STOCHASTIC, "--max-epochs", EPOCHS, *SHARDS)
    return folder / "run"


@pytest.mark.parametrize("num_processes", [2, 4])
def test_several_processes_end_with_the_bits_and_files_of_one(alone: Path, tmp_path: Path, num_processes: int) -> None:
    out = run_ranks(num_processes, "train", tmp_path, "run", DATA, *STOCHASTIC, "--max-epochs", EPOCHS, *SHARDS)
    assert [text.count("Epoch 1/") for text in out] == [1, *[0] * (num_processes - 1)]  # the first prints, no other
    assert _same(tmp_path / "run", alone) == []


def test_in_bfloat16_two_processes_end_with_the_bits_of_one(alone: Path, tmp_path: Path) -> None:
    options = (*STOCHASTIC, "--max-epochs", 1, *SHARDS, "--precision", "bf16")
    for num_processes, name in ((1, "one"), (2, "two")):
        run_ranks(num_processes, "train", tmp_path, name, DATA, *options)
    assert _same(tmp_path / "two", tmp_path / "one") == []
    assert results(tmp_path / "one")["history"][0] != results(alone)["history"][0]


def test_stopped_with_two_and_resumed_with_four_processes(tmp_path: Path) -> None:
    process = _start(2, tmp_path)
    os.kill(process.pid, signal.SIGTERM)
    err = finished(process).err
    assert err.count("stopped by SIGTERM and saved as checkpoint ") == 1
    assert err.count("To resume: dwiml-func resume") == 1
    assert _resumed_as_alone(4, tmp_path) == []


def test_a_process_that_is_killed_ends_the_others_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    first, second = start_ranks(2, "train", tmp_path, "run", DATA, *ENDLESS)
    _wait_for_second_epoch(first, tmp_path / "run")
    second.kill()  # not the first, which saves
    assert finished(first).returncode == 1  # the process group itself waits for half an hour
    assert finished(second).returncode == -signal.SIGKILL
    assert "Another of the 2 processes of this run has ended" in first.err
    assert "Traceback" not in first.err
    assert _resumed_as_alone(1, tmp_path) == []


def test_processes_that_cannot_share_the_shards_are_refused(tmp_path: Path) -> None:
    ranks = [finished(rank) for rank in start_ranks(2, "train", tmp_path, "run", DATA, "--num-shards", 3)]
    for rank in ranks:
        assert rank.returncode == 2
        assert "2 processes cannot share 3 shards a batch evenly. Expected 1, 3 of processes" in rank.err
    assert list(tmp_path.iterdir()) == []


RESTARTED = """
import os, signal, sys
import torch
from dwiml_func.distributed.process_group import join_process_group

with join_process_group() as group:
    numbers = group.gather(torch.tensor([group.rank + 1.0]))
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.gather(torch.zeros(1))
    if group.rank == 0:
        print("sum", sum(number.item() for number in numbers))
"""


def test_processes_that_torchrun_starts_again_find_each_other_not_those_that_ended(tmp_path: Path) -> None:
    (tmp_path / "restarted.py").write_text(RESTARTED)
    launcher = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 1)
    launcher = (*launcher, "--monitor-interval", 1)  # by 0.1 s it may end the other before that has told of the loss
    done = finished(start_program(TORCHRUN, *launcher, tmp_path / "restarted.py"))
    assert done.returncode == 0, done.err
    assert done.out == "sum 3.0\n"
    assert "ProcessLostError: Another of the 2 processes of this run has ended" in done.err
    assert "refused" not in done.err


def test_a_process_that_cannot_reach_the_others_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dwiml_func.distributed.process_group._TIMEOUT", timedelta(seconds=1))
    with pytest.raises(ProcessLostError, match="could not join the others of this run"), join_process_group():
        pass
