"""The README is true: its script runs as it stands there, and does what the command does."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"


def _blocks(language: str, heading: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


def _run(*command: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_script_of_an_ensemble_runs(tmp_path: Path) -> None:
    (script,) = _blocks("python", "Many models at once")
    (tmp_path / "script.py").write_text(script)
    last = _run(sys.executable, "script.py", folder=tmp_path).splitlines()[-1]
    assert re.fullmatch(r"10 \{0: \d[^ ]*, 1: \d[^ ]*, 2: \d[^ ]*\}", last)


def test_the_script_trains_to_the_bits_of_the_command(tmp_path: Path) -> None:
    script, pieces = _blocks("python", "Compose your own loop")
    assert len([line for line in script.splitlines() if line.strip()]) <= 30
    experiments = tmp_path / "experiments"
    experiments.mkdir()
    shutil.copy(PHANTOM, experiments / "example_data.hdf5")
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "pieces.py").write_text(pieces)

    printed = _run(sys.executable, "script.py", folder=tmp_path)
    again = _run(sys.executable, "script.py", folder=tmp_path)
    command = [sys.executable, "-m", "dwiml_func", "train", "experiments", "command"]
    _run(*command, "experiments/example_data.hdf5", *["--max-epochs", "3", "--nb-previous-dirs", "1"], folder=tmp_path)

    assert re.fullmatch(
        r"\d+ batches; \d+ streamlines in the first; \(5, 6\)\n", _run(sys.executable, "pieces.py", folder=tmp_path)
    )
    assert [line.split()[0] for line in printed.splitlines()] == ["1", "2", "3"]
    assert again == ""  # the run is restored, and has no epoch left
    digests = [
        _run(sys.executable, "-m", "dwiml_func", "digest", f"experiments/{name}", folder=tmp_path)
        for name in ("my_loop", "command")
    ]
    assert digests[0] == digests[1]


def test_a_model_of_ones_own_is_short_and_learns(tmp_path: Path) -> None:
    (script,) = _blocks("python", "Bring your own model")
    own = re.search(r"^class .*?(?=^def batches_of)", script, flags=re.MULTILINE | re.DOTALL)
    assert own is not None
    assert len([line for line in own[0].splitlines() if line.strip()]) <= 20  # the module and its loss
    (tmp_path / "experiments").mkdir()
    shutil.copy(PHANTOM, tmp_path / "experiments" / "example_data.hdf5")
    (tmp_path / "script.py").write_text(script)
    epochs = [line.split() for line in _run(sys.executable, "script.py", folder=tmp_path).splitlines()]
    assert [epoch for epoch, _, _ in epochs] == ["1", "2", "3", "4", "5"]
    assert float(epochs[-1][1]) < 0.9 * float(epochs[0][1])  # of the training
    assert float(epochs[-1][2]) < float(epochs[0][2])  # of the validation


def test_two_commands_do_all_the_set_up() -> None:
    blocks = _blocks("sh", "Set up")
    assert [len(block.splitlines()) for block in blocks] == [1, 1]
    assert "dwiml-func train" in blocks[0]
    assert "pytest" in blocks[1]


def test_every_command_has_its_line_in_the_readme() -> None:
    from dwiml_func.cli.main import COMMANDS

    text = (ROOT / "README.md").read_text()
    missing = [command for command in COMMANDS if f"dwiml-func {command}" not in text]
    assert missing == []


def test_the_example_of_gradients_through_training_gives_gradients(tmp_path: Path) -> None:
    [script] = _blocks("python", "Gradients through training")
    (tmp_path / "script.py").write_text(script)
    printed = _run(sys.executable, "-W", "error", "script.py", folder=tmp_path).split()
    assert len(printed) == 2
    assert all(abs(float(number)) > 0 for number in printed)


def test_the_commands_that_reproduce_and_verify_run_as_they_stand(tmp_path: Path) -> None:
    (block,) = _blocks("sh", "Reproduce and verify")
    experiments = tmp_path / "experiments"
    experiments.mkdir()
    shutil.copy(PHANTOM, experiments / "example_data.hdf5")
    program = shlex.join([sys.executable, "-m", "dwiml_func"])
    _run(*shlex.split(program), "train", "experiments", "first_run", "--max-epochs", "2", folder=tmp_path)
    script = "set -eu\n" + block.replace("dwiml-func", program).replace("--max-epochs 32", "--max-epochs 3")
    printed = _run("bash", "-c", script, folder=tmp_path)
    assert "experiments/first_run: epoch 2, replayed from snapshot 1, is equal to the record bit for bit" in printed
    assert "training.learning_rate" in printed  # what differs
    assert re.search(r"^slower +finished +3/3 ", printed, flags=re.MULTILINE)
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
