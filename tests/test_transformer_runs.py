"""Runs of the transformers from the command line: shards, mixed precision, and an epoch that can be trained again."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from experiment_cases import PHANTOM, latest_digest

from dwiml_func import TrainState
from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.experiment.folder import create_experiment, read_config
from dwiml_func.experiment.resume import resume_experiment
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.signals import StopRequest, TrainingStopped

SIZE = ("--input-embedded-size", 8, "--nheads", 2, "--n-layers-e", 1)
SHORT = ("--max-epochs", 1, "--batch-size-training", 48, "--skip-window-lag", "--reverse-ratio", 0.5)


def trained_and_verified(cli: Any, run: Path, kind: str, *options: object) -> float:
    """The validation loss of a run, whose epoch gives the same bits when it is trained again."""
    target = ("--target-embedded-size", 4) if kind == "ttst" else ()
    outcome = cli("train", run.parent, run.name, PHANTOM, "--model", kind, *SIZE, *target, *SHORT, *options)
    assert outcome.code == 0, outcome.err
    outcome = cli("verify", run)
    assert outcome.code == 0, outcome.err
    return json.loads((run / "logs" / "metrics.jsonl").read_text().splitlines()[-1])["valid_loss"]


@pytest.mark.parametrize("kind", ["tts", "ttst", "tto"])
def test_an_epoch_of_shards_with_dropout_is_verified_bit_for_bit_also_stopped_within_it_and_resumed(
    cli, kind: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trained_and_verified(cli, run, kind, "--num-shards", 2, "--dropout-rate", 0.2)
    config, stop = read_config(run), StopRequest()
    stopped = create_experiment(tmp_path, "stopped", config)

    def after_batch(state: TrainState, _: object) -> None:
        if state.batch == 1:
            stop.signal = signal.SIGTERM

    with pytest.raises(TrainingStopped):
        list(run_experiment(stopped, prepare(config), on_batch=after_batch, stop=stop))
    assert read(stopped).state.batch == 1
    parts, state, history = resume_experiment(stopped)
    list(run_experiment(stopped, parts, state=state, history=history))
    assert latest_digest(stopped) == latest_digest(run)


def test_bf16_trains_alike_and_is_verified_bit_for_bit(cli, tmp_path: Path) -> None:
    plain = trained_and_verified(cli, tmp_path / "plain", "tto")
    half = trained_and_verified(cli, tmp_path / "half", "tto", "--precision", "bf16")
    assert half == pytest.approx(plain, rel=0.05)
    assert half != plain
