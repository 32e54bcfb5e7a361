"""Claims about the table of experiments."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_summary import report

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.cli.runs import format_runs
from dwiml_func.experiment.comparison.run_values import _order
from dwiml_func.experiment.comparison.runs import RunOverview, _last_change, list_runs, run_overview
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import read_config
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


def test_the_last_change_is_that_of_the_newest_file_of_a_run(tmp_path):
    (tmp_path / "checkpoint" / "1").mkdir(parents=True)
    for seconds, path in enumerate((tmp_path / "checkpoint" / "1", tmp_path / "checkpoint", tmp_path)):
        os.utime(path, (2e9 - seconds, 2e9 - seconds))
    assert _last_change(tmp_path).timestamp() == 2e9
    assert _last_change(tmp_path / "gone").timestamp() == 0


@pytest.mark.parametrize(("history", "monitor"), [((), "loss"), ((report(monitor="overlap"),), "overlap")])
def test_of_a_scripts_run_the_last_report_says_what_it_monitors(tmp_path, monkeypatch, history, monitor) -> None:
    checkpoint = SimpleNamespace(history=history, config={}, corrupt={}) if history else None
    monkeypatch.setattr("dwiml_func.experiment.comparison.runs.newest", lambda _: checkpoint)
    found = run_overview(tmp_path, "script")
    assert (found.monitor, found.epochs, found.max_epochs) == (monitor, len(history), None)
    assert (found.name, found.state) == ("script", "finished" if history else "unfinished")


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
        "window_lag_mm": None,
        "valid_share": None,
        "problems": [],
        "group": None,
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


def test_the_table_has_full_names_and_is_aligned() -> None:
    runs = [
        RunOverview(name="a", state="stopped early", epochs=1000, max_epochs=1000, minutes=6000.0, last_change=TIME),
        RunOverview(name="long " * 30 + "end", state="running", best_epoch=999, best_loss=-1e4, last_change=TIME),
        RunOverview(name="odd\n", state="corrupt", last_change=TIME, problems=("word " * 40,)),
    ]
    lines = format_runs(runs).splitlines()
    assert len({line.index("2026-01-31") for line in lines[1:4]}) == 1
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
    assert lines[2].startswith("long " * 30 + "end  running")
    assert "'odd\\n'" in lines[3]
    assert max(map(len, lines[4:])) <= 100


@pytest.fixture
def several(experiments: Path) -> Path:
    """`run`; `low`, of another learning rate, whose best model tracks better; `high`, with a text for a rate; and an
    ensemble and a sweep of two."""
    scores = {"run": 0.25, "low": 0.5, "seeds/0": 0.125, "seeds/1": 0.375, "swept/a": 0.0}
    (experiments / "seeds").mkdir()
    (experiments / "seeds" / "ensemble.json").touch()
    (experiments / "swept").mkdir()
    (experiments / "swept" / "sweep.json").touch()
    for name in ("low", "high", "seeds/0", "seeds/1", "swept/a", "swept/b"):
        shutil.copytree(experiments / "run", experiments / name)
    for name, share in scores.items():
        found = {"core": {"valid": share, "both_ends": 2 * share}, "free": {"valid": 0.0}}
        (experiments / name / "tracking.json").write_text(json.dumps({"scores": {"model": found}}))
    change(experiments / "low", learning_rate=("0.001",))
    change(experiments / "high", learning_rate=("cosine 0.1 9",))
    return experiments


def test_numbers_come_before_words_also_where_they_are_written_as_words() -> None:
    assert sorted(["b", 2, "a", "0.5", None, 1e6], key=_order) == [None, "0.5", 2, 1e6, "a", "b"]


def test_the_best_that_tracks_is_first_and_any_option_or_log_is_shown(cli, several: Path) -> None:
    record = newest(several / "run")
    assert record is not None
    loss = record.history[1].train["loss"]
    heading, *lines = cli(
        "runs", several, "--sort", "tracking", "--show", "lr,rnn-key,train_loss,monitor"
    ).out.splitlines()
    assert heading.split()[:5] == ["name", "lr", "rnn-key", "train_loss", "monitor"]
    assert "valid %" in heading
    assert [line.split("  ")[0] for line in lines] == [
        *("low", "seeds/1 (best of 2)", "run", "swept/a (best of 2)", "high")
    ]
    assert lines[0].split()[:5] == ["low", "0.001", "lstm", f"{loss:.6g}", "loss"]
    assert "50 / 0" in lines[0]
    assert "cosine 0.1 9" in lines[-1]
    names = [line.split("  ")[0] for line in cli("runs", several, "--sort", "tracking", "--reverse").out.splitlines()]
    assert names[1:] == ["swept/a (best of 2)", "run", "seeds/1 (best of 2)", "low", "high"]


def test_the_best_member_is_that_of_what_the_table_is_sorted_by(cli, several: Path) -> None:
    change(several / "seeds" / "0", patience_delta=1e-9)
    by_option = cli("runs", several, "--sort", "patience-delta").out
    assert "seeds/0 (best of 2)" in by_option
    members = cli("runs", several, "--members").out.splitlines()[1:]
    assert [line.split()[0] for line in members] == [
        *("high", "low", "run", "seeds/0", "seeds/1", "swept/a", "swept/b")
    ]
    assert [(row["name"], row["group"]) for row in rows(cli, several).values()][3:] == [
        *(("seeds/0", "seeds"), ("seeds/1", "seeds"), ("swept/a", "swept"), ("swept/b", "swept"))
    ]
    inner = cli("runs", several / "swept", "--members").out.splitlines()[1:]
    assert [line.split()[0] for line in inner] == ["a", "b"]


def test_values_of_runs_come_as_json_and_csv(cli, several: Path) -> None:
    asked = ("--sort", "tracking.core.both_ends", "--show", "tracking.core.both_ends,model.dg_key,valid_loss")
    found = json.loads(cli("runs", several, *asked, "--json").out)
    assert [row["tracking.core.both_ends"] for row in found] == [1.0, 0.75, 0.5, 0.25, 0.0, None, None]
    assert {row["model.dg_key"] for row in found} == {"cosine-regression"}
    table = list(csv.DictReader(cli("runs", several, *asked, "--csv").out.splitlines()))
    assert [row["name"] for row in table] == [row["name"] for row in found]
    assert [row["valid_core"] for row in table] == ["0.5", "0.375", "0.25", "0.125", "0.0", "", ""]
    assert float(table[0]["valid_loss"]) == found[0]["valid_loss"] == found[0]["best_loss"]
    cli("runs", several, "--json", "--csv").check_refusal("--json or --csv")
    cli("runs", several, "--sort", "los").check_refusal("--sort: expected", "'los'", "loss")
    cli("runs", several, "--show", "lr,learning_rat").check_refusal("--show", "'learning_rat'", "learning_rate")


def test_runs_are_listed_by_name_and_without_jax(experiments: Path) -> None:
    for name in ("b", "a", "c"):
        (experiments / name).symlink_to(experiments / "run")
    assert [run.name for run in list_runs(experiments)] == ["a", "b", "c", "run"]
    code = f"from dwiml_func.cli.main import main; main(['runs', {str(experiments)!r}]); import sys; "
    code += "print([name for name in ('jax', 'orbax', 'h5py', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[]"
