"""Runs of transformers from the command line: shards, bf16, compiled steps, and an epoch that can be trained again."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from experiment_cases import CONFIG, PHANTOM, latest_digest, trained

from dwiml_func import TrainState
from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.compiled.step import JitStep, jit_step
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import create_experiment, read_config
from dwiml_func.experiment.resume import resume_experiment
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.signals import StopRequest, TrainingStopped
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models.config import ModelConfig

SIZE = ("--skip-figures", "--input-embedded-size", 8, "--nheads", 2, "--n-layers-e", 1)
SHORT = ("--max-epochs", 1, "--batch-size-training", 48, "--skip-window-lag", "--reverse-ratio", 0.5)


def trained_and_verified(cli: Any, run: Path, kind: str, *options: object) -> float:
    """The validation loss of a run, whose epoch is bitwise identical when it is trained again."""
    target = ("--target-embedded-size", 4) if kind == "ttst" else ()
    outcome = cli("train", run.parent, run.name, PHANTOM, "--model", kind, *SIZE, *target, *SHORT, *options)
    assert outcome.code == 0, outcome.err
    outcome = cli("verify", run)
    assert outcome.code == 0, outcome.err
    return json.loads((run / "logs" / "metrics.jsonl").read_text().splitlines()[-1])["valid_loss"]


def stopped_and_resumed(parent: Path, config: RunConfig) -> Path:
    """A run that is stopped after its first batch, and resumed to its end."""
    directory, stop = create_experiment(parent, "stopped", config), StopRequest()

    def after_batch(state: TrainState, _: object) -> None:
        if state.batch == 1:
            stop.signal = signal.SIGTERM

    with pytest.raises(TrainingStopped):
        list(run_experiment(directory, prepare(config), on_batch=after_batch, stop=stop))
    assert read(directory).state.batch == 1
    parts, state, history = resume_experiment(directory)
    list(run_experiment(directory, parts, state=state, history=history))
    return directory


@pytest.mark.parametrize("kind", ["tts", "ttst", "tto"])
def test_an_epoch_of_shards_with_dropout_is_verified_bit_for_bit_also_stopped_within_it_and_resumed(
    cli, kind: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trained_and_verified(cli, run, kind, "--num-shards", 2, "--dropout-rate", 0.2)
    assert latest_digest(stopped_and_resumed(tmp_path, read_config(run))) == latest_digest(run)


@pytest.mark.compiles
@pytest.mark.parametrize(("kind", "processes"), [("tts", 0), pytest.param("tto", 2, marks=pytest.mark.soak)])
def test_a_compiled_run_stopped_within_its_epoch_and_resumed_ends_with_the_bits_of_a_whole_one_by_any_processes(
    kind: Any, processes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps: list[JitStep] = []

    def compiled(**options: Any) -> JitStep:
        """One step for all runs, as compiling takes most of the time."""
        if not steps:
            steps.append(jit_step(**options, backend="eager"))
        return steps[0]

    monkeypatch.setattr("dwiml_func.experiment.setup.jit_step", compiled)
    config = replace(
        CONFIG,
        model=ModelConfig(model=kind, input_embedded_size=4, nheads=2, n_layers_e=1),
        batches=replace(CONFIG.batches, reverse_ratio=0.5),
        training=TrainingConfig(max_epochs=1, compile=True),
    )
    whole = trained(tmp_path, config, "whole")
    other = stopped_and_resumed(tmp_path, replace(config, batches=replace(config.batches, processes=processes)))
    assert latest_digest(other) == latest_digest(whole)
    assert steps[0].eager_reason is None
    assert steps[0].num_compilations == 1


def test_bf16_trains_alike_and_is_verified_bit_for_bit(cli, tmp_path: Path) -> None:
    plain = trained_and_verified(cli, tmp_path / "plain", "tto")
    half = trained_and_verified(cli, tmp_path / "half", "tto", "--precision", "bf16")
    assert half == pytest.approx(plain, rel=0.05)
    assert half != plain
