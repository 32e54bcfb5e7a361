"""Runs that are killed at any moment, again and again, end as if nothing had happened."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from preloaded import Fork, run_command, start_command
from reproduction_cases import DATA, STOCHASTIC, differences, files, results

from dwiml_func.checkpoint.index import list_checkpoints

pytestmark = pytest.mark.soak

EPOCHS = 10  # a kill comes at most two epochs after the one before
OPTIONS = (*STOCHASTIC, "--max-epochs", EPOCHS, "--checkpoint-every", "1batches")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_command("train", folder, "run", DATA, *STOCHASTIC, "--max-epochs", EPOCHS)
    return folder / "run"


def _unfinished(directory: Path) -> set[Path]:
    return {
        *directory.glob("checkpoint/.dwiml-tmp-*"),
        *directory.glob("[0-9]/checkpoint/.dwiml-tmp-*"),
    }  # also of members


def _epoch(directory: Path) -> int:
    """The epoch of the latest checkpoint of a run, or of an ensemble's first member."""
    names = [*list_checkpoints(directory), *list_checkpoints(directory / "0")]
    return int(names[-1].partition("-")[0]) if names else 0


def _kill(process: Fork, directory: Path, rng: random.Random) -> bool:
    """Kill a process at a random moment: a third in its start or first two epochs, the others during a save.

    Returns whether it was saving.
    """
    left = _unfinished(directory)  # by the kill before

    def is_saving() -> bool:
        return not _unfinished(directory) <= left

    saving = False
    if rng.random() < 1 / 3:
        until, last = time.monotonic() + rng.uniform(0, 2), _epoch(directory) + 1
        _wait_while(lambda: time.monotonic() < until and _epoch(directory) <= last, process)
    else:
        for _ in range(rng.randint(0, 5)):  # saves that come to their end
            _wait_while(lambda: not is_saving(), process)
            _wait_while(is_saving, process)
        _wait_while(lambda: not is_saving(), process)
        _wait(process, rng.uniform(0, 0.05))
        saving = is_saving()
    assert process.poll() in (None, 0), process.err
    process.kill()
    assert process.wait(300) in (-signal.SIGKILL, 0)
    return saving


def _wait_while(condition: Callable[[], bool], process: Fork) -> None:
    while process.poll() is None and condition():
        _wait(process, 0.0005)


def _wait(process: Fork, seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


@pytest.mark.parametrize(("seed", "num_kills", "processes"), [(1, 4, 0), (4, 4, 2)], ids=lambda value: str(value))
def test_killed_at_random_moments(
    uninterrupted: Path, tmp_path: Path, seed: int, num_kills: int, processes: int
) -> None:
    rng, directory = random.Random(seed), tmp_path / "run"
    num_saving, seen = 0, set()
    for _ in range(num_kills):
        if (directory / "config.json").exists():
            process = start_command("resume", tmp_path, "run")
        else:
            process = start_command("train", tmp_path, "run", DATA, *OPTIONS, "--processes", processes)
        num_saving += _kill(process, directory, rng)
        seen.update(list_checkpoints(directory)[-1:])
    assert num_saving >= num_kills // 5, "the kills missed the saves: the test is not worth its name"
    assert len(seen) >= num_kills // 4, "the run did not move on between the kills"
    assert str(EPOCHS) not in seen, "the run ended before the last kill"
    run_command("resume", tmp_path, "run", "--checkpoint-every", "1epoch")
    assert differences(results(directory), results(uninterrupted)) == []
    assert files(directory) == files(uninterrupted)
    assert list(tmp_path.iterdir()) == [directory]


def test_an_ensemble_killed_at_random_moments(tmp_path: Path) -> None:
    options = (*STOCHASTIC, "--max-epochs", 7, "--num-models", 2, "--keep", 1)
    (tmp_path / "uninterrupted").mkdir()
    run_command("train", tmp_path / "uninterrupted", "run", DATA, *options)
    rng, directory = random.Random(5), tmp_path / "killed" / "run"
    directory.parent.mkdir()
    num_saving = 0
    for _ in range(4):
        if (directory / "ensemble.json").exists():
            process = start_command("resume", directory.parent, "run")
        else:
            process = start_command("train", directory.parent, "run", DATA, *options, "--checkpoint-every", "1batches")
        num_saving += _kill(process, directory, rng)
    assert num_saving >= 1, "the kills missed the saves: the test is not worth its name"
    run_command("resume", directory.parent, "run", "--checkpoint-every", "1epoch")
    for number in ("0", "1"):
        member, expected = directory / number, tmp_path / "uninterrupted" / "run" / number
        assert differences(results(member), results(expected)) == []
        assert files(member) == files(expected)
    assert list(directory.parent.iterdir()) == [directory]
