"""Claims about runs in real processes: bitwise identical wherever a run was stopped, killed and resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import select
import termios
from pathlib import Path
from typing import Any

import pytest
from experiment_cases import latest_digest
from preloaded import Fork, finished, run_program, start_command, start_program
from reproduction_cases import logs

from dwiml_func.checkpoint.arrays import load_leaves
from dwiml_func.checkpoint.digest import leaf_digest
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.manifest import read_manifest
from dwiml_func.experiment.folder import read_config

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
OPTIONS = (
    *("--rnn-layer-sizes", "8", "8", "--dropout", "0.25", "--dg-dropout", "0.25", "--nb-previous-dirs", "1"),
    *("--batch-size-training", "30", "--batch-size-validation", "20", "--learning-rate", "0.01*2 0.001"),
    "--skip-figures",
)
RESUME = "import sys; from dwiml_func.cli.main import resume_training_from_checkpoint as main; sys.exit(main())"


def train_command(folder: Path, name: str, max_epochs: int, *options: str) -> list[str]:
    return ["train", str(folder), name, str(PHANTOM), *OPTIONS, "--max-epochs", str(max_epochs), *options]


def run_preloaded(*arguments: object) -> Fork:
    process = finished(start_command(*arguments))
    assert process.returncode == 0, process.err
    return process


@dataclasses.dataclass(frozen=True)
class Whole:
    directory: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Four epochs in one process."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_preloaded(*train_command(folder, "run", 4))
    return Whole(folder / "run", done.out, done.err)


def without_durations(data: Any) -> Any:
    """A manifest's history without what differs from run to run."""
    return [{name: value for name, value in row.items() if not name.endswith("_minutes")} for row in data]


def check_same_end(directory: Path, whole: Path) -> None:
    assert latest_digest(directory) == latest_digest(whole)
    assert list_checkpoints(directory) == list_checkpoints(whole)
    names = os.listdir(whole / "logs")
    assert len(names) == 10
    assert logs(directory) == logs(whole)
    assert sorted(os.listdir(directory / "logs")) == sorted(names)
    losses = "best_epoch_losses.json"
    assert (directory / losses).read_bytes() == (whole / losses).read_bytes()

    models = [path / "best_model" for path in (directory, whole)]
    ours, theirs = (read_manifest(path, "model.json") for path in models)
    assert ours["digest"] == theirs["digest"]
    assert (ours["epoch"], ours["loss"]) == (theirs["epoch"], theirs["loss"])
    assert [
        {name: leaf_digest(leaf) for name, leaf in load_leaves(path, manifest).items()}
        for path, manifest in zip(models, (ours, theirs), strict=True)
    ] == [{row["name"]: row["sha256"] for row in theirs["leaves"]}] * 2


def test_a_run_that_was_stopped_and_resumed_after_each_epoch_ends_bitwise_as_a_whole_one(whole, tmp_path):
    parts = [run_preloaded(*train_command(tmp_path, "run", 1))]
    assert "Finished after 1 epoch" in parts[0].out
    for stop in (2, 3, 4):
        assert latest_digest(tmp_path / "run") != latest_digest(whole.directory)
        parts.append(run_preloaded("resume", tmp_path, "run", "--new-max-epochs", stop))

    check_same_end(tmp_path / "run", whole.directory)
    assert (tmp_path / "run" / "config.json").read_bytes() == (whole.directory / "config.json").read_bytes()
    histories = [read_manifest(path / "checkpoint" / "4")["history"] for path in (tmp_path / "run", whole.directory)]
    assert [[report.pop("stop") for report in history] for history in histories] == [
        ["max_epochs"] * 4,  # that is how it was stopped
        [None, None, None, "max_epochs"],
    ]
    assert without_durations(histories[0]) == without_durations(histories[1])

    lines = [line.replace(f"/{stop} ", "/4 ") for stop, part in enumerate(parts, 1) for line in epoch_lines(part.out)]
    assert lines == epoch_lines(whole.out)
    assert [part.err for part in parts] == [""] * 4
    summaries = [text.split("\n\n")[1].splitlines()[1:] for text in (parts[-1].out, whole.out)]
    assert summaries[0] == summaries[1]


def epoch_lines(out: str) -> list[str]:
    """The lines of epochs, without their durations."""
    return [re.sub(r"  \d+\.\d s", "", line) for line in out.splitlines() if line.startswith("Epoch ")]


KILLED = """
import os, signal, sys
from dwiml_func.cli.main import main
from dwiml_func.experiment import setup
make_steps = setup.make_steps

def make_steps_that_kill(*args, **kwargs):
    step, *others = make_steps(*args, **kwargs)
    def kill(state, *rest, **options):
        if state.batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(state, *rest, **options)
    return kill, *others

setup.make_steps = make_steps_that_kill
main(sys.argv[1:])
"""


def test_a_run_that_was_killed_in_its_first_epoch_starts_again(whole, tmp_path):
    process = finished(start_program(KILLED, *train_command(tmp_path, "run", 4)))
    assert process.returncode == -9, process.err
    assert list_checkpoints(tmp_path / "run") == []
    run_program(RESUME, tmp_path, "run", "--new_max_epochs", 4)  # dwi_ml's name of the command and of its option
    check_same_end(tmp_path / "run", whole.directory)


def test_loading_processes_and_a_terminal_change_nothing_but_the_bar(cli, tmp_path):
    terminal, stderr = os.openpty()
    termios.tcsetwinsize(stderr, (24, 120))  # tqdm shows nothing in 0 columns
    shown = b""
    command = train_command(tmp_path, "run", 1, "--processes", "2")
    process = start_command(*command, err=Path(os.ttyname(stderr)))
    while process.poll() is None and not select.select([terminal], [], [], 0.1)[0]:
        pass  # it has the terminal open once it has written there
    os.close(stderr)
    while True:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # how Linux says that nobody has the terminal open any more
            break
    os.close(terminal)
    assert process.wait(timeout=300) == 0, shown.decode()

    here = cli(*train_command(tmp_path, "here", 1))  # without them, in this process
    check_same_end(tmp_path / "run", tmp_path / "here")
    assert epoch_lines(process.out) == epoch_lines(here.out)
    assert here.err == ""
    assert read_config(tmp_path / "run").batches.processes == 2

    text = shown.decode()
    assert "\rEpoch 1/1 training:" in text
    assert "\rEpoch 1/1 validation:" in text
    assert "\rEpochs: 100%" in text
    assert "points/s" in text
    assert re.search(r"loss \d\.\d{4}", text)
    assert text.count("\n") == text.count("\x1b[A")  # to the lower bar and back again: no line is left behind
    assert text.rsplit("\r", 2)[1].strip() == ""  # the last bar was wiped


def test_a_pipe_gets_the_epochs_lines_and_the_summary_only(whole):
    assert whole.err == ""
    lines = whole.out.splitlines()
    assert re.fullmatch(
        r".*/run: 96 streamlines of 2 training subjects, 48 of 1 validation subject, 6 features, \d+ parameters",
        lines[0],
    )
    assert [line.split()[1] for line in lines[1:5]] == ["1/4", "2/4", "3/4", "4/4"]
    assert lines[5] == ""
    assert lines[6].startswith("Finished after 4 epochs")
    assert "\r" not in whole.out


def test_the_digest_is_the_same_in_another_process(whole):
    done = run_preloaded("digest", whole.directory)
    assert done.err == ""
    assert done.out == latest_digest(whole.directory) + "\n"
    manifest = json.loads((whole.directory / "checkpoint" / "4" / "manifest.json").read_text())
    assert manifest["digest"] == done.out.strip()
