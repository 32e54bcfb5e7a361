"""Claims about runs whose folder others read, move, remove or take over while they train."""

from __future__ import annotations

import queue
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from experiment_cases import CONFIG, contents

from dwiml_func.checkpoint.checkpoint import save
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.retention import kept_checkpoints
from dwiml_func.experiment.config import CheckpointConfig, RunConfig
from dwiml_func.experiment.ensemble_run import prepare_ensemble, run_ensemble
from dwiml_func.experiment.folder import create_ensemble, create_experiment
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.sweep import member_configs
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.files.lock import FolderLostError, experiment_lock

LONG = replace(CONFIG, training=TrainingConfig(max_epochs=40), checkpoints=CheckpointConfig(keep=1))


def move(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def take_over(folder: Path) -> None:
    """Another training of the same name begins."""
    shutil.rmtree(folder)
    create_experiment(folder.parent, folder.name, LONG)
    (folder / ".lock").write_text("of the other process")


@pytest.mark.parametrize("lose", [move, shutil.rmtree, take_over])
def test_a_run_whose_folder_is_lost_stops_with_an_error_and_writes_nothing_more(tmp_path, lose):
    folder = create_experiment(tmp_path, "run", LONG)
    after: dict[str, bytes] = {}
    written: queue.Queue[int] = queue.Queue()  # what is done last of an epoch's checkpoint, best model and logs

    def train() -> None:
        with experiment_lock(folder):
            epochs = run_experiment(folder, prepare(LONG), write=lambda *reports: written.put(reports[-1].epoch))
            for report in epochs:
                if not after:
                    assert written.get(timeout=300) == report.epoch
                if report.epoch == 2:
                    lose(folder)
                    after.update({"": b""} | contents(tmp_path))

    with pytest.raises(FolderLostError, match="moved, removed or taken over"):
        train()
    assert {"": b""} | contents(tmp_path) == after


def test_a_folder_that_is_lost_while_a_checkpoint_is_written_gets_no_model_and_no_logs(tmp_path, monkeypatch):
    folder = create_experiment(tmp_path, "run", LONG)

    def save_and_lose(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        take_over(folder)

    monkeypatch.setattr("dwiml_func.checkpoint.background.save", save_and_lose)
    with pytest.raises(FolderLostError, match="moved, removed or taken over"):
        list(run_experiment(folder, prepare(LONG), write=lambda *reports: pytest.fail("logs were written")))
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "config.json"]


@pytest.mark.parametrize("lost", ["run", "run/1"])
def test_an_ensemble_whose_folder_or_a_members_is_lost_stops_with_an_error(tmp_path, lost):
    configs: Sequence[RunConfig] = member_configs(replace(LONG, model=replace(LONG.model, dg_dropout=0)), num_models=2)
    folder = create_ensemble(tmp_path, "run", configs)
    after: dict[str, bytes] = {}

    def train() -> None:
        for report in run_ensemble(folder, prepare_ensemble(configs)):
            if report.epoch == 1:
                (tmp_path / lost).rename(tmp_path / "moved")
                after.update(contents(tmp_path))

    with pytest.raises(FolderLostError, match="moved, removed or taken over"):
        train()
    assert contents(tmp_path) == after


def test_what_is_read_is_not_removed_meanwhile_and_is_removed_by_a_later_save(tmp_path):
    state = prepare(CONFIG).first_state()
    save(tmp_path, state.replace(epoch=1), keep=1)
    with kept_checkpoints(tmp_path) as names:
        assert names == ["1"]
        save(tmp_path, state.replace(epoch=2), keep=1)
        assert list_checkpoints(tmp_path) == ["1", "2"]
    save(tmp_path, state.replace(epoch=3), keep=1)
    assert list_checkpoints(tmp_path) == ["3"]


def verify(cli: Callable, folder: Path) -> None:
    assert cli("verify", folder).code == 0


def digest(cli: Callable, folder: Path) -> None:
    assert cli("digest", folder).code == 0


def runs(cli: Callable, folder: Path) -> None:
    done = cli("runs", folder.parent)
    assert (done.code, done.err, "(!)" in done.out) == (0, "", False)


def diff(cli: Callable, folder: Path) -> None:
    assert "corrupt" not in cli("diff", folder, folder).out


def test_a_look_at_a_run_that_is_being_trained_gives_no_false_alarm(cli, tmp_path):
    folder = create_experiment(tmp_path, "run", LONG)
    with experiment_lock(folder):
        for report in run_experiment(folder, prepare(LONG)):
            if report.epoch > 1:  # its checkpoint is being saved, and the one before is about to be removed
                for look in (verify, digest, runs, diff):
                    look(cli, folder)
            if report.epoch == 8:
                break
