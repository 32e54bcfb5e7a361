"""Claims about batches that are left out: after a loss that is not finite, one command resumes without the batch."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from experiment_cases import CONFIG, PHANTOM, latest_digest, trained

from dwiml_func import NonFiniteError, TrainState, init_state, module_loss, sgd, train_and_validate, train_step
from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.cli._training import train_with_progress
from dwiml_func.core.skip_batches import parse_batch, skip_batches
from dwiml_func.experiment.config import CheckpointConfig
from dwiml_func.experiment.folder import create_experiment
from dwiml_func.experiment.setup import prepare

OPTIONS = ("--rnn-layer-sizes", "8", "--dg-dropout", "0.25", "--batch-size-training", "40")
OPTIONS = (*OPTIONS, "--batch-size-validation", "20", "--max-epochs", "2", "--keep", "all", "--skip-figures")


def test_all_but_the_batches_that_are_left_out_is_trained():
    model = torch.nn.Linear(2, 1)
    loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
    step = partial(train_step, loss_fn=loss_fn, optimizer=sgd())
    batches = [torch.full((4, 2), float(number)) for number in range(1, 5)]

    def train(skip: list[tuple[int, int]], without: tuple[int, ...]) -> TrainState:
        kept = [batch for number, batch in enumerate(batches, start=1) if number not in without]
        epochs = train_and_validate(
            init_state(model, sgd(), seed=0),
            train=lambda key, epoch, start: (batches if skip else kept)[start:],
            step=skip_batches(step, skip),
            learning_rate=0.01,
            max_epochs=1,
        )
        return [state for state, _ in epochs][-1]

    left_out, never_there = train([(1, 1), (1, 3), (2, 2)], ()), train([], (1, 3))
    assert torch.equal(left_out.params["weight"], never_there.params["weight"])
    assert (left_out.step, never_there.step) == (4, 2)


def test_the_error_prints_the_command_that_goes_on_and_the_record_names_the_batch(cli, tmp_path):
    config = replace(CONFIG, checkpoints=CheckpointConfig(keep="all"))
    directory, parts = create_experiment(tmp_path, "run", config), prepare(config)

    def step(state: TrainState, batch: Any, *, lr: float) -> Any:
        is_bad = (state.epoch, state.batch) == (1, 1)
        return parts.step(state, replace(batch, inputs=batch.inputs * torch.inf) if is_bad else batch, lr=lr)

    with pytest.raises(NonFiniteError, match=r"The loss is nan in epoch 2, batch 2 \(step \d\), ids ") as caught:
        train_with_progress(directory, replace(parts, step=step), None, ())
    program, *arguments = shlex.split(str(caught.value).partition("To leave this batch out: ")[2])
    assert (program, arguments) == ("dwiml-func", ["resume", str(tmp_path), "run", "--skip", "2:2"])
    assert cli(*arguments).code == 0
    assert read(directory).config["training"]["skip_batches"] == ["2:2"]
    assert cli("verify", directory, "--all", "-j", "1").code == 0

    digest, command = latest_digest(directory), ("train", tmp_path, "run", PHANTOM, *OPTIONS)
    assert cli(*command).code == 0  # the same command again sums up the run that has ended
    assert latest_digest(directory) == digest
    assert cli(*command[:2], "whole", *command[3:], "--skip-batches", "2:2").code == 0
    assert latest_digest(tmp_path / "whole") == digest


def test_a_batch_that_was_left_out_changes_the_digest_and_other_batches_do_not(tmp_path):
    plain = trained(tmp_path, CONFIG, "plain")
    for name, batch, is_same in [("late", "9:1", True), ("there", "2:1", False)]:
        config = replace(CONFIG, training=replace(CONFIG.training, skip_batches=(batch,)))
        assert (latest_digest(trained(tmp_path, config, name)) == latest_digest(plain)) is is_same


def test_a_batch_that_was_trained_already_is_refused(cli, tmp_path):
    trained(tmp_path, replace(CONFIG, checkpoints=CheckpointConfig(keep="all")))
    outcome = cli("resume", tmp_path, "run", "--new-max-epochs", "3", "--skip", "2:1")
    outcome.check_refusal("--skip 2:1: this batch was trained", "fork an earlier checkpoint with --skip-batches 2:1")
    assert read(tmp_path / "run").config["training"]["skip_batches"] == []
    assert cli("resume", tmp_path, "run", "--new-max-epochs", "3", "--skip", "3:1").code == 0
    state = read(tmp_path / "run").state
    assert (state.epoch, state_digest(state)) == (3, read(tmp_path / "run").digest)


@pytest.mark.parametrize("text", ["12", "0:1", "1:0", "a:b", "1:2:3", "-1:2"])
def test_only_an_epoch_and_a_batch_name_a_batch(text):
    with pytest.raises(ValueError, match=r"expected an epoch and a batch, counted from 1, such as 12:40"):
        parse_batch(text)


def test_an_ensemble_leaves_no_batch_out(cli, tmp_path):
    options = (*OPTIONS, "--num-models", "2", "--skip-batches", "1:1")
    cli("train", tmp_path, "two", PHANTOM, *options).check_refusal("An ensemble leaves no batch out")
