"""Runs of the transformers from the command line: shards, mixed precision, and an epoch that can be trained again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from experiment_cases import PHANTOM

SIZE = ("--input-embedded-size", 8, "--nheads", 2, "--n-layers-e", 1)
SHORT = ("--max-epochs", 2, "--batch-size-training", 24, "--skip-window-lag", "--reverse-ratio", 0.5)


def validation_loss(run: Path) -> float:
    return json.loads((run / "logs" / "metrics.jsonl").read_text().splitlines()[-1])["valid_loss"]


@pytest.mark.parametrize("kind", ["tts", "ttst", "tto"])
def test_shards_and_bf16_train_alike_and_every_bit_is_verified(cli, kind: str, tmp_path: Path) -> None:
    target = ("--target-embedded-size", 4) if kind == "ttst" else ()
    ways = {"plain": (), "shards": ("--num-shards", 2), "bf16": ("--precision", "bf16")}
    for name, options in ways.items():
        rates = ("--dropout-rate", 0.2 if name == "shards" else 0.0)
        outcome = cli("train", tmp_path, name, PHANTOM, "--model", kind, *SIZE, *target, *SHORT, *rates, *options)
        assert outcome.code == 0, outcome.err
        outcome = cli("verify", tmp_path / name)
        assert outcome.code == 0, outcome.err
    assert validation_loss(tmp_path / "bf16") == pytest.approx(validation_loss(tmp_path / "plain"), rel=0.05)
    assert validation_loss(tmp_path / "bf16") != validation_loss(tmp_path / "plain")
