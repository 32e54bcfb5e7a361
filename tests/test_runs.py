"""Claims about the table of experiments."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.cli.runs import format_runs
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.runs import RunOverview, list_runs
from dwiml_func.files.lock import experiment_lock

TIME = datetime(2026, 1, 31, 14, 5, 9)


def rows(cli, folder: Path) -> dict[str, dict]:
    outcome = cli("runs", folder, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    return {row["name"]: row for row in json.loads(outcome.out)}


def change(run: Path, **training: object) -> None:
    config = read_config(run)
    (run / "config.json").write_text(
        dataclasses.replace(config, training=dataclasses.replace(config.training, **training)).to_json()
    )


def test_a_run_is_listed_as_recorded(cli, experiments: Path) -> None:
    record = newest(experiments / "run")
    assert record is not None
    best = record.history[1]
    (row,) = rows(cli, experiments).values()
    assert datetime.fromisoformat(row.pop("last_change")) <= datetime.now()
    assert row.pop("minutes") == pytest.approx(sum(r.train_minutes + r.valid_minutes for r in record.history))
    assert row == {
        "name": "run",
        "state": "stopped early",
        "epochs": 3,
        "max_epochs": 9,
        "best_epoch": 2,
        "best_loss": best.valid["loss"],
        "monitor": "loss",
        "best_value": best.valid["loss"],
        "angular_error_deg": best.valid["angular_error"],
        "problems": [],
    }
    heading, line = cli("runs", experiments).out.splitlines()
    assert heading.split()[:3] == ["name", "state", "epochs"]
    assert line.startswith("run   stopped early     3/9 ")


def test_the_state_follows_from_lock_config_and_position(cli, experiments: Path) -> None:
    run = experiments / "run"
    change(run, max_epochs=3)
    assert rows(cli, experiments)["run"]["state"] == "finished"
    change(run, max_epochs=9, patience=2)
    assert rows(cli, experiments)["run"]["state"] == "interrupted"
    with experiment_lock(run):
        assert rows(cli, experiments)["run"]["state"] == "running"
    (experiments / "begun").mkdir()
    (experiments / "begun" / "config.json").write_text(RunConfig(hdf5_file="a.hdf5").to_json())
    begun = rows(cli, experiments)["begun"]
    assert (begun["state"], begun["epochs"], begun["best_loss"]) == ("interrupted", 0, None)


def test_corrupt_runs_are_marked(cli, experiments: Path) -> None:
    run = experiments / "run"
    (run / "checkpoint" / "3" / "manifest.json").write_text("{")
    row = rows(cli, experiments)["run"]
    assert (row["state"], row["epochs"]) == ("interrupted", 2)
    (problem,) = row["problems"]
    assert "checkpoint/3 is corrupt" in problem
    assert "interrupted (!)" in cli("runs", experiments).out
    (run / "checkpoint" / "2" / "manifest.json").write_text("{")
    row = rows(cli, experiments)["run"]
    assert (row["state"], row["epochs"], row["max_epochs"]) == ("corrupt", 0, None)
    (run / "config.json").write_text("{")
    assert rows(cli, experiments)["run"]["state"] == "corrupt"
    outcome = cli("runs", experiments)
    assert outcome.code == 0
    assert "config.json: invalid JSON" in " ".join(outcome.out.split())


def test_folders_that_are_not_experiments_are_skipped(cli, tmp_path: Path) -> None:
    assert cli("runs", tmp_path).out == f"No experiments in {tmp_path}.\n"
    assert rows(cli, tmp_path) == {}
    (tmp_path / "data.hdf5").write_bytes(b"")
    (tmp_path / "notes").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "odd" / "config.json").mkdir(parents=True)
    assert rows(cli, tmp_path) == {}
    cli("runs", tmp_path / "nothing").check_refusal("nothing", "is not a folder")


def test_the_table_fits_100_columns_and_is_sorted() -> None:
    runs = [
        RunOverview(name="a", state="stopped early", epochs=1000, max_epochs=1000, minutes=6000.0, last_change=TIME),
        RunOverview(name="long " * 30, state="running", best_epoch=999, best_loss=-1e4, last_change=TIME),
        RunOverview(name="odd\n", state="corrupt", last_change=TIME, problems=("word " * 40,)),
    ]
    lines = format_runs(runs).splitlines()
    assert max(len(line) for line in lines) <= 100
    assert lines[1].split() == [
        "a",
        "stopped",
        "early",
        "1000/1000",
        "-",
        "-",
        "-",
        "100.0",
        "h",
        "2026-01-31",
        "14:05",
    ]
    assert "long long" in lines[2]
    assert "..." in lines[2]
    assert "'odd\\n'" in lines[3]


def test_runs_are_listed_by_name_and_without_jax(experiments: Path) -> None:
    for name in ("b", "a", "c"):
        (experiments / name).symlink_to(experiments / "run")
    assert [run.name for run in list_runs(experiments)] == ["a", "b", "c", "run"]
    code = f"from dwiml_func.cli.main import main; main(['runs', {str(experiments)!r}]); import sys; "
    code += "print([name for name in ('jax', 'orbax', 'h5py', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[]"
