"""Claims about what crashes leave: the next command for the same experiment removes it, and nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from experiment_cases import PHANTOM, contents
from preloaded import start_command, start_program

OPTIONS = (
    "--skip-figures",
    "--rnn-layer-sizes",
    "4",
    "--batch-size-training",
    "96",
    "--batch-size-validation",
    "48",
    "--max-epochs",
    "1",
)
WRITES = """
import sys
from pathlib import Path
from dwiml_func.files.atomic import atomic_directory
with atomic_directory(Path(sys.argv[1])) as folder:
    (folder / "a").write_text("complete")
    print(folder.name, flush=True)
    open(sys.argv[2]).readline()
"""


@contextmanager
def writing(path: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """The temporary of a process in the middle of an atomic write, and a function that lets it end well.

    It is killed otherwise.
    """
    with tempfile.TemporaryDirectory() as own:
        gate = Path(own) / "gate"
        os.mkfifo(gate)
        process = start_program(WRITES, path, gate)

        def end() -> int:
            gate.write_text("\n")
            return process.wait(300)

        while not process.out.endswith("\n"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise AssertionError(f"the process ended with {process.wait(0.01)}: {process.err}")
        try:
            yield process.out.strip(), end
        finally:
            process.kill()
            process.wait(300)


def killed_while_writing(path: Path) -> str:
    with writing(path) as (name, _):
        pass
    return name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dwiml_func.cli.main import main

    folder = tmp_path_factory.mktemp("source")
    assert main(["train", str(folder), "source", str(PHANTOM), *OPTIONS]) == 0
    return folder / "source"


def _train(cli: Callable[..., Any], folder: Path, name: str) -> None:
    assert cli("train", folder, name, PHANTOM, *OPTIONS).code == 0


def _train_ensemble(cli: Callable[..., Any], folder: Path, name: str) -> None:
    assert cli("train", folder, name, PHANTOM, *OPTIONS, "--num-models", "2").code == 0


def _fork(cli: Callable[..., Any], folder: Path, name: str) -> None:
    assert cli("fork", folder / "source", name, "--max-epochs", "2").code == 0


@pytest.mark.parametrize("make", [_train, _train_ensemble, _fork])
def test_a_new_experiment_removes_what_a_killed_start_of_it_left_and_nothing_of_others(cli, tmp_path, source, make):
    shutil.copytree(source, tmp_path / "source")
    for name in (".tmp-notes", ".old-results", "results", ".old-notes", ".dwiml-tmp-mine", ".tmp-a-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    killed_while_writing(tmp_path / "another")
    before = contents(tmp_path)
    leftover = killed_while_writing(tmp_path / "a")
    with writing(tmp_path / "figures") as (name, end):
        make(cli, tmp_path, "a")
        assert (tmp_path / name / "a").exists()
        assert end() == 0
    after = contents(tmp_path)
    assert not (tmp_path / leftover).exists()
    assert {path: after[path] for path in before} == before
    assert after["figures/a"] == b"complete"


def test_other_commands_write_into_the_folder_while_a_training_starts(cli, tmp_path, source):
    commands = [
        start_command("plot", source, "--out", tmp_path / "figure.png"),
        start_command("import-dwi-ml", Path(__file__).parent / "data" / "cos", tmp_path / "model"),
    ]
    while any(command.poll() is None for command in commands):
        _train(cli, tmp_path, "run")
        shutil.rmtree(tmp_path / "run")
    assert [command.poll() for command in commands] == [0, 0], [command.err for command in commands]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == ["figure.png", "model"]


@pytest.mark.parametrize("make", [_train, _train_ensemble])
def test_a_resume_removes_what_a_crash_left_anywhere_in_the_experiment(cli, tmp_path, make):
    make(cli, tmp_path, "a")
    run = tmp_path / "a"
    members = [run / "0", run / "1"] if make is _train_ensemble else [run]
    places = [folder / part for folder in members for part in ("", "checkpoint", "logs", "logs/comet", "plots")]
    places += [run, *(folder / "logs" / "tensorboard" for folder in members)]
    leftover = ".dwiml-tmp-x.999999999-0123abcd"  # of a process whose number is too large for one
    for place in places:
        (place / leftover).mkdir(parents=True, exist_ok=True)
        (place / ".tmp-notes").mkdir(exist_ok=True)
    (run / ".dwiml-old-moved").mkdir()  # not a name that our functions give
    for place in {tmp_path, run, *members}:
        (place / ".lock").touch()  # of a kill while it was made
    with writing(members[0] / "figure") as (temporary, end):
        assert cli("resume", tmp_path, "a", "--new-max-epochs", "2").code == 0
        assert (members[0] / temporary).exists()
        assert end() == 0
    assert [str(path) for path in run.rglob(".dwiml-*")] == [str(run / ".dwiml-old-moved")]
    assert list(tmp_path.rglob(".lock")) == []
    assert all((place / ".tmp-notes").is_dir() for place in places)
