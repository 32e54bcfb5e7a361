"""Claims about the monitored metric and the interval of validations, from the command line to the logs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from experiment_cases import CONFIG, PHANTOM, latest_digest, restored

from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.core.early_stopping import Best
from dwiml_func.experiment.best_model import repair_best_model
from dwiml_func.experiment.config import CheckpointConfig, RunConfig
from dwiml_func.experiment.ensemble_run import prepare_ensemble, run_ensemble
from dwiml_func.experiment.folder import create_ensemble, create_experiment, read_config
from dwiml_func.experiment.model_store import load_model
from dwiml_func.experiment.resume import resume_experiment
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import RunParts, prepare
from dwiml_func.experiment.training_config import TrainingConfig

OPTIONS = ("--rnn-layer-sizes", "8", "--batch-size-training", "40", "--max-epochs", "2", "--skip-figures")
WORST = ("--monitor", "angular_error", "--monitor-mode", "max", "--validate-every", "2 batches")  # 4 batches an epoch


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps the state of the largest angular error, which is the first that is validated."""
    from dwiml_func.cli.main import main

    folder = tmp_path_factory.mktemp("monitor")
    data = shutil.copy(PHANTOM, folder / "data.hdf5")
    assert main(["train", str(folder), "worst", str(data), *OPTIONS, *WORST]) == 0
    return folder / "worst"


def test_the_metric_and_the_interval_of_the_command_line_decide(finished: Path) -> None:
    history = read(finished).history
    errors = [[*(each.means["angular_error"] for each in r.validations), r.valid["angular_error"]] for r in history]
    assert [[each.batch for each in report.validations] for report in history] == [[2], [2]]
    flat = [error for own in errors for error in own]
    best = history[-1].best
    assert (best.value, best.num_bad_epochs) == (max(flat), len(flat) - 1 - flat.index(max(flat)))
    assert {report.monitor for report in history} == {"angular_error"}
    assert (best.epoch, best.batch) == (1, 2)
    facts = load_model(finished / "best_model").facts
    assert (facts["epoch"], facts["batch"], facts["monitor"], facts["monitored"]) == (0, 2, "angular_error", max(flat))
    assert list_checkpoints(finished) == ["0-2", "1", "2"]
    losses = json.loads((finished / "best_epoch_losses.json").read_text())
    assert losses["valid_loss"] == history[0].validations[0].means["loss"]


def test_the_summary_runs_and_logs_name_the_metric(cli: Any, finished: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(finished, tmp_path / "worst")
    best = read(directory).history[-1].best
    rows = [json.loads(line) for line in (directory / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["best_angular_error"]) for row in rows] == [(1, best.value), (2, best.value)]
    *_, angle, _, _, _, _, chosen_by = cli("runs", tmp_path).out.splitlines()[-1].split()
    assert (angle, chosen_by) == (f"{best.value:.2f}", "angular_error")
    (run,) = json.loads(cli("runs", tmp_path, "--json").out)
    assert (run["monitor"], run["best_value"], run["best_epoch"]) == ("angular_error", best.value, 1)
    assert run["angular_error_deg"] == best.value
    assert run["state"] == "finished"
    outcome = cli("resume", tmp_path, "worst", "--new-max-epochs", "3")
    assert outcome.code == 0
    assert f"Best epoch 1, batch 2: training loss {rows[0]['train_loss']:.4f}" in outcome.out
    assert f"monitored angular_error {best.value:.4f}" in outcome.out
    assert "Epoch 3/3, batch 2  training loss" in outcome.out


def test_it_is_verified_drawn_and_compared(cli: Any, finished: Path, tmp_path: Path) -> None:
    assert cli("verify", finished).code == 0
    assert cli("verify", finished, "--epoch", "1").code == 0
    assert cli("diff", finished, finished).code == 0
    assert cli("plot", finished, "--out", tmp_path / "figure.svg").code == 0


def test_a_metric_that_is_not_there_is_refused_before_anything_is_made(cli: Any, tmp_path: Path) -> None:
    for more in ((), ("--num-models", "2")):
        outcome = cli("train", tmp_path, "run", PHANTOM, *OPTIONS, "--monitor", "accuracy", *more)
        outcome.check_refusal("metric to monitor among angular_error, loss, tracking_window_lag. Received: 'accuracy'")
        assert list(tmp_path.glob("run*")) == []
    outcome = cli("train", tmp_path, "run", PHANTOM, *OPTIONS, "--validate-every", "10minutes")
    outcome.check_refusal("validate_every: expected a number and a unit, such as 50batches or 1epoch")


def test_a_fork_that_monitors_another_metric_resets_the_best_epoch(cli: Any, finished: Path) -> None:
    outcome = cli("fork", finished, "other", "--monitor", "loss", "--monitor-mode", "min", "--max-epochs", "3")
    assert outcome.code == 0
    assert "another training.monitor, training.monitor_mode changes the monitored metric" in outcome.out
    assert read(finished.parent / "other").history[-1].best.epoch == 3
    same = cli("fork", finished, "same", "--max-epochs", "3")
    assert same.code == 0
    assert "reset" not in same.out
    assert read(finished.parent / "same").history[-1].best.epoch == 1
    assert load_model(finished.parent / "same" / "best_model").facts["batch"] == 2


def test_an_ensemble_monitors_each_of_its_members(tmp_path: Path) -> None:
    training = TrainingConfig(max_epochs=2, monitor="angular_error", monitor_mode="max", validate_every="2epochs")
    configs = [replace(CONFIG, training=replace(training, rng=seed, data_rng=1)) for seed in (1, 2)]
    directory = create_ensemble(tmp_path, "both", configs)
    reports = list(run_ensemble(directory, prepare_ensemble(configs)))
    assert [[bool(own.valid) for own in report.members.values()] for report in reports] == [[False] * 2, [True] * 2]
    for own in reports[-1].members.values():
        assert own.best == Best(own.valid["angular_error"], 2, 0)
    within = [replace(config, training=replace(config.training, validate_every="2batches")) for config in configs]
    directory = create_ensemble(tmp_path, "within", within)
    reports = list(run_ensemble(directory, prepare_ensemble(within)))
    assert {report.batch for report in reports} >= {0, 2}
    for number in range(len(within)):
        own = [report.members[number] for report in reports]
        best = max(own, key=lambda report: report.valid["angular_error"])  # the first of equal ones
        assert own[-1].best[:2] == (best.valid["angular_error"], best.epoch)
        facts = load_model(directory / str(number) / "best_model").facts
        assert (own[-1].best.batch, facts["batch"]) == (best.batch, best.batch)


def parts_that_fail(config: RunConfig, error: Exception, *, at: int) -> RunParts:
    """The parts of a run whose validation fails at its batch of this number, counted from 1."""
    parts, calls = prepare(config), 0

    def evaluate(state: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return parts.eval_step(state, batch)

    return replace(parts, eval_step=evaluate)


@pytest.mark.parametrize("every", ["1epoch", "2batches"])
def test_a_crash_in_a_validation_loses_no_batch(tmp_path: Path, every: str) -> None:
    training = TrainingConfig(max_epochs=2, validate_every=every)
    config = replace(CONFIG, training=training, checkpoints=CheckpointConfig(checkpoint_every="9epochs"))
    whole = create_experiment(tmp_path, "whole", config)
    list(run_experiment(whole, prepare(config)))
    directory = create_experiment(tmp_path, "crashed", config)
    with pytest.raises(MemoryError):
        list(run_experiment(directory, parts_that_fail(config, MemoryError("in validation"), at=1)))
    trained = 2 if every == "2batches" else 3
    assert list_checkpoints(directory) == [f"0-{trained}"]
    parts, state, history = resume_experiment(directory)
    assert state.batch == trained
    list(run_experiment(directory, parts, state=state, history=history))
    assert latest_digest(directory) == latest_digest(whole)
    assert [r.valid for r in restored(directory)[1]] == [r.valid for r in restored(whole)[1]]


def test_stopped_within_an_epoch_by_patience_a_run_is_ended_logged_and_may_continue(tmp_path: Path) -> None:
    training = TrainingConfig(max_epochs=2, patience=1, validate_every="1batch", learning_rate=("1e-30",))
    config = replace(CONFIG, training=training)
    directory = create_experiment(tmp_path, "run", config)
    *_, last = run_experiment(directory, prepare(config))
    assert (last.epoch, last.batch, last.stop) == (1, 2, "patience")
    rows = (directory / "logs" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == last.epoch
    with pytest.raises(ValueError, match="No epoch is left to train"):
        resume_experiment(directory)
    parts, state, history = resume_experiment(directory, new_patience=99)
    reports = list(run_experiment(directory, parts, state=state, history=history))
    longer = create_experiment(tmp_path, "longer", replace(config, training=replace(training, patience=99)))
    list(run_experiment(longer, prepare(replace(config, training=replace(training, patience=99)))))
    assert (reports[-1].epoch, reports[-1].batch, latest_digest(directory)) == (2, 0, latest_digest(longer))


def test_the_best_model_within_an_epoch_is_repaired_from_its_checkpoint(finished: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(finished, tmp_path / "run")
    before = load_model(directory / "best_model").module.state_dict()
    shutil.rmtree(directory / "best_model")
    state, _ = restored(directory)
    parts = prepare(read_config(directory))
    repair_best_model(directory, state, parts)
    after = load_model(directory / "best_model").module.state_dict()
    assert all((before[name] == after[name]).all() for name in before)
