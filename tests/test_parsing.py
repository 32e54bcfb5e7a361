"""Claims about command lines: what is said when they cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dwiml_func.cli.main import COMMANDS

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-epoch", "3"], "unknown option --max-epoch. Did you mean --max-epochs?"),
        (["--batch_size", "3"], "unknown option --batch_size. Did you mean --batch-size"),
        (["--training.max-epochs=3"], "unknown option --training.max-epochs. Did you mean --max-epochs?"),
        (["--quite"], "unknown option --quite. Did you mean --quiet?"),
        (["--xyzzy"], "unknown option --xyzzy. dwiml-func train --help lists all options."),
        (["--lazy=True"], "--lazy is given without a value, received 'True'."),
        (["--max-epochs", "3.5"], "--max-epochs: expected a whole number, received '3.5'."),
        (["--dropout", "much"], "--dropout: expected a number, received 'much'."),
        (["--keep", "some"], "--keep: expected N|all, received 'some'."),
        (["--optimizer", "adam"], "--optimizer: expected one of 'Adam', 'AdamW', 'RAdam', 'SGD', received 'adam'."),
        (["--patience"], "--patience: expected a value. Received: "),
        (["more"], "unexpected arguments: more."),
    ],
    ids=lambda value: " ".join(value)[:20],
)
def test_what_cannot_be_read_is_said_plainly(cli, tmp_path: Path, arguments: list[str], said: str) -> None:
    outcome = cli("train", tmp_path, "new", PHANTOM, *arguments)
    outcome.check_refusal(f"dwiml-func train: {said}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [100_000, 10**9, 2**31 - 1])
def test_layers_that_no_memory_holds_are_refused(cli, tmp_path: Path, size: int) -> None:
    sizes = ("--rnn-layer-sizes", 8, size)
    cli("train", tmp_path, "new", PHANTOM, *sizes).check_refusal(f"rnn_layer_sizes (8, {size})", "Choose smaller")
    assert list(tmp_path.iterdir()) == []


def test_after_two_dashes_nothing_is_an_option(cli, tmp_path: Path) -> None:
    cli("digest", "--", "--help").check_refusal("No checkpoint in --help/checkpoint")


@pytest.mark.parametrize(("command", "meant"), [("trian", "train"), ("Train", "train"), ("import", "import-dwi-ml")])
def test_an_unknown_command_is_answered_with_the_nearest(cli, command: str, meant: str) -> None:
    cli(command).check_refusal(f"unknown command {command!r}. Did you mean {meant}?", ", ".join(COMMANDS))
