"""Claims about runs with a schedule in words: its rates are used and reported, resumed exactly, and replayed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dwiml_func import adam, init_state, jit_step, module_loss, per_step, train_and_validate, warm_up
from dwiml_func.checkpoint import list_checkpoints
from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.cli.main import main
from dwiml_func.experiment.figures.panel import Panel, PlottedRun
from dwiml_func.experiment.figures.run_panels import draw_rates
from dwiml_func.experiment.folder import read_config
from dwiml_func.optim.schedules import cosine
from dwiml_func.types import Plateau

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
OPTIONS = (
    *("--rnn-layer-sizes", "4", "--nb-previous-dirs", "1", "--batch-size-training", "30"),
    *("--batch-size-validation", "20", "--max-epochs", "4", "--checkpoint-every", "2batches", "--keep", "all"),
    "--skip-figures",
)
BY_STEP = ("warmup", "3", "cosine", "0.01", "20", "steps")  # several arguments, or one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schedules")
    for name, rate in {"by_step": BY_STEP, "plateau": ("plateau 0.3 0.5 0",)}.items():
        assert main(["train", str(folder), name, str(PHANTOM), *OPTIONS, "--learning-rate", *rate]) == 0
    return folder


def test_the_rates_of_the_words_are_those_of_the_epochs(folder):
    history = read(folder / "by_step").history
    schedule, num_batches = warm_up(cosine(0.01, length=20), length=3), history[0].num_batches
    assert num_batches > 2
    for report in history:
        rates = [schedule(step) for step in range((report.epoch - 1) * num_batches, report.epoch * num_batches)]
        assert report.learning_rate == rates[-1]
        assert (report.learning_rate_min, report.learning_rate_max) == (min(rates), max(rates))
    rows = [json.loads(line) for line in (folder / "by_step" / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate_max"] for row in rows] == [report.learning_rate_max for report in history]
    parameters = json.loads((folder / "by_step" / "parameters_latest.json").read_text())
    assert parameters["Trainer params"]["learning_rate"] == "warmup 3 cosine 0.01 20 steps"


def test_the_figure_shows_the_rates_of_the_last_step_and_the_range(folder):
    history = read(folder / "by_step").history
    _, axes = plt.subplots()
    panel = Panel(axes, is_alone=True)
    draw_rates(panel, PlottedRun(label="run", history=history), 0)
    panel.finish(num_epochs=4)
    drawn = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()}
    assert drawn == {
        "last step": [report.learning_rate for report in history],
        "highest": [report.learning_rate_max for report in history],
        "lowest": [report.learning_rate_min for report in history],
    }
    plt.close()


def test_a_plateau_halves_the_rate_when_the_validation_does_not_improve(folder):
    checkpoint = read(folder / "plateau")
    losses = [report.valid["loss"] for report in checkpoint.history]
    expected, best, rate = [], float("inf"), 0.3
    for loss in losses:
        expected.append(rate)
        rate, best = (rate, loss) if loss < best * (1 - 1e-4) else (rate / 2, best)
    assert [report.learning_rate for report in checkpoint.history] == expected
    assert expected[-1] < 0.3  # else nothing was shown


@pytest.mark.parametrize("name", ["by_step", "plateau"])
def test_verify_replays_the_last_epoch(folder, name, cli):
    done = cli("verify", folder / name)
    assert done.code == 0, done.out + done.err


@pytest.mark.parametrize("name", ["by_step", "plateau"])
def test_a_run_stopped_within_an_epoch_ends_in_the_same_digest(folder, name, cli, tmp_path):
    shutil.copytree(folder / name, tmp_path / name)
    digest = read(folder / name).digest
    within = [saved for saved in list_checkpoints(tmp_path / name) if saved.startswith("3-")]
    for saved in list_checkpoints(tmp_path / name):
        if int(saved.partition("-")[0]) >= 3 and saved not in within:
            shutil.rmtree(tmp_path / name / "checkpoint" / saved)
    assert cli("resume", tmp_path, name).code == 0
    assert read(tmp_path / name).digest == digest


def test_a_fork_with_another_schedule_starts_without_reductions(folder, cli, tmp_path):
    shutil.copytree(folder / "plateau", tmp_path / "plateau")
    reduced = read(tmp_path / "plateau").state.plateau
    assert reduced.num_reductions > 0
    done = cli("fork", tmp_path / "plateau", "constant", "--learning-rate", "0.001", "--max-epochs", "5")
    assert done.code == 0
    assert "The reductions of the learning rate are reset: the fork has another schedule." in done.out
    assert read(tmp_path / "constant").state.plateau == Plateau()
    assert read_config(tmp_path / "constant").training.learning_rate == ("0.001",)
    assert cli("verify", tmp_path / "constant").code == 0


def test_a_fork_within_an_epoch_with_another_optimizer_counts_its_steps_from_zero(folder, cli, tmp_path):
    shutil.copytree(folder / "by_step", tmp_path / "by_step")
    options = ("--from", "1-2", "--optimizer", "SGD", "--max-epochs", "2")
    done = cli("fork", tmp_path / "by_step", "sgd", *options)
    assert done.code == 0, done.err
    state, report = read(tmp_path / "sgd").state, read(tmp_path / "sgd").history[-1]
    schedule = warm_up(cosine(0.01, length=20), length=3)
    assert (report.learning_rate_min, report.learning_rate) == (schedule(0), schedule(state.step - 1))


def test_members_of_a_sweep_have_their_own_schedules(cli, tmp_path):
    sweep = f"learning-rate={' '.join(BY_STEP)},plateau 0.01 0.5 0"
    done = cli("train", tmp_path, "sweep", PHANTOM, *OPTIONS, "--sweep", sweep)
    assert done.code == 0, done.err
    assert "0: learning rate warmup 3 cosine 0.01 20 steps, weight decay 0.01" in done.out
    by_step, plateau = (read(tmp_path / "sweep" / number).history for number in "01")
    schedule = warm_up(cosine(0.01, length=20), length=3)
    assert by_step[0].learning_rate_min == schedule(0)
    assert by_step[-1].learning_rate == schedule(4 * by_step[0].num_batches - 1)
    assert plateau[0].learning_rate == 0.01
    assert plateau[0].learning_rate_max is None


def test_a_mistake_is_one_line_before_anything_is_written(cli, tmp_path):
    cli("train", tmp_path, "x", PHANTOM, "--learning-rate", "cosine 0.01").check_refusal("expected cosine RATE LENGTH")
    assert list(tmp_path.iterdir()) == []


def test_a_rate_by_step_compiles_once():
    model = torch.nn.Linear(3, 1)
    loss_fn = module_loss(model, lambda model, x: ((model(x) - 1).square().mean(), len(x)))
    step = jit_step(loss_fn=loss_fn, optimizer=adam(), backend="eager")
    epochs = train_and_validate(
        init_state(model, adam(), seed=0),
        train=lambda key, epoch, start: [torch.ones(4, 3)] * (5 - start),
        step=step,
        learning_rate=per_step(warm_up(cosine(0.01, length=10), length=3)),
        max_epochs=2,
    )
    assert [report.epoch for _, report in epochs] == [1, 2]
    assert (step.num_compilations, step.eager_reason) == (1, None)


@pytest.mark.parametrize(
    ("values", "scale", "bottom"),
    [([0.0, 1, 2], "linear", 0), ([5.0, 9], "linear", 0), ([-1.0, 2], "linear", None), ([0.1, 5], "log", None)],
)
def test_all_values_lie_within_the_axes_and_more_than_a_decade_is_logarithmic(values, scale, bottom):
    axes = Figure().subplots()
    axes.plot(range(len(values)), values)
    Panel(axes, is_alone=True).scale()
    low, high = axes.get_ylim()
    assert low <= min(values)
    assert high >= max(values)
    assert axes.get_yscale() == scale
    assert bottom is None or low == bottom
    assert len([tick for tick in axes.get_yticks() if low <= tick <= high]) >= 3
