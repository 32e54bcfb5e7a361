"""Real runs in processes of their own, and what must be equal between two of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dwiml_func.checkpoint.arrays import load_leaves
from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.checkpoint.digest import combine_digests, state_digest
from dwiml_func.checkpoint.history import history_to_json
from dwiml_func.checkpoint.manifest import read_manifest
from dwiml_func.experiment.model_store import MANIFEST

DATA = Path(__file__).parent / "data" / "phantom.hdf5"

WITH_FIGURES = (
    *("--rnn-layer-sizes", "8", "6"),
    *("--dropout", "0.3"),
    *("--nb-previous-dirs", "1"),
    *("--noise-gaussian-size-forward", "0.05"),
    *("--noise-gaussian-size-loss", "0.05"),
    *("--reverse-ratio", "0.5"),
    *("--split-ratio", "0.3"),
    *("--batch-size-training", "24"),
    *("--batch-size-validation", "24"),
)
"""Options of a small run in which everything is random that can be: 4 training and 2 validation batches an epoch."""
STOCHASTIC = (*WITH_FIGURES, "--skip-figures")

DURATIONS = ("training_time_monitor_duration.npy", "validation_time_monitor_duration.npy")


def command(*arguments: object) -> list[str]:
    """A `dwiml-func` command, to run in a process."""
    return [sys.executable, "-m", "dwiml_func", *map(str, arguments)]


def run_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, which must be good."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def train(folder: Path, name: str, *options: object, epochs: int = 2) -> Path:
    """Train a small run to its end in a separate process."""
    run_command("train", folder, name, DATA, *STOCHASTIC, "--max-epochs", epochs, *options)
    return folder / name


def results(directory: Path) -> dict[str, Any]:
    """All that a run has come to, durations aside."""
    manifest = read_manifest(directory / "best_model", MANIFEST)
    load_leaves(directory / "best_model", manifest)
    checkpoint = read(directory)
    history = [
        {name: value for name, value in report.items() if name != "timed_points" and not name.endswith("_minutes")}
        for report in history_to_json(checkpoint.history)
    ]
    return {
        "digest": state_digest(checkpoint.state),
        "history": history,
        "best_model": combine_digests({row["name"]: row["sha256"] for row in manifest["leaves"]}, {}),
        "best_epoch_losses": (directory / "best_epoch_losses.json").read_bytes(),
        **logs(directory),
    }


def logs(directory: Path) -> dict[str, Any]:
    """What stands in each of a run's logs, durations aside."""
    folder = directory / "logs"
    arrays = {path.name: path.read_bytes() for path in folder.glob("*.npy") if path.name not in DURATIONS}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [{name: value for name, value in json.loads(line).items() if "_minutes" not in name} for line in lines]
    assert all(name in arrays or name in DURATIONS or name == "metrics.jsonl" for name in os.listdir(folder))
    return {**arrays, "metrics.jsonl": rows}


def files(directory: Path) -> list[str]:
    """Every file of an experiment; except orbax's files of the arrays."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if "/leaves/" not in name)


def differences(one: dict[str, Any], other: dict[str, Any]) -> Sequence[str]:
    """What differs between two results."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
