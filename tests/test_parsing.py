"""Claims about command lines that cannot be read, and about where options may stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from preloaded import finished, start_program

from dwiml_func.cli.main import COMMANDS

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max-epoch", "3"], ["Unrecognized options: --max-epoch", "Perhaps you meant: --max-epochs"]),
        (["--drop_out", "0.1"], ["Unrecognized options: --drop_out", "Perhaps you meant: --dropout"]),
        (["--quite"], ["Unrecognized options: --quite", "Perhaps you meant:", "--quiet"]),
        (["--xyzzy"], ["Unrecognized options: --xyzzy", "dwiml-func train --help"]),
        (["--training.max-epochs=3"], ["Unrecognized options: --training.max-epochs"]),
        (["--max-epochs", "3.5"], ["--max-epochs: invalid literal for int() with base 10: '3.5'"]),
        (["--dropout", "much"], ["--dropout: could not convert string to float: 'much'"]),
        (["--keep", "some"], ["keep: expected a number of at least 1, all, or every:K", "Received: some"]),
        (["--keep", "every:0"], ["keep: expected a number of at least 1, all, or every:K", "Received: every:0"]),
        (["--optimizer", "adam"], ["invalid choice 'adam' for argument '--optimizer'", "'Adam', 'AdamW'"]),
        (["--patience"], ["Missing value for argument '--patience'"]),
        (["more"], ["Received also: more", "--input-group-name"]),
        (["--config"], ["Missing value for argument '--config'"]),
    ],
    ids=lambda value: " ".join(value)[:20],
)
def test_a_usage_error_names_the_option_and_the_nearest(cli, tmp_path: Path, arguments: list[str], named: list[str]):
    cli("train", tmp_path, "new", PHANTOM, *arguments).check_refusal(*named)
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
    cli(command).check_refusal(f"Received: {command!r}. Did you mean {meant}?", ", ".join(COMMANDS))


@pytest.mark.parametrize("command", ["train", "resume", "digest", "create-hdf5"])
def test_quiet_may_stand_before_or_after_the_command(cli, command: str) -> None:
    assert cli("--quiet", command, "--help").out == cli(command, "--help", "-q").out == cli(command, "--help").out


ENTRANCES = ["import dwiml_func.__main__", "from dwiml_func.cli.main import main"]  # of `python -m` and of the scripts


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_another_platform_is_refused_before_anything_that_it_lacks_is_imported(entrance: str) -> None:
    code = f"""import signal, sys
for name in [name for name in sys.modules if name.partition(".")[0] == "dwiml_func"]:
    del sys.modules[name]
del signal.SIGUSR1, signal.SIGALRM
sys.modules["fcntl"], sys.platform = None, "win32"
{entrance}"""
    ended = finished(start_program(code))
    assert (ended.returncode, ended.out) == (2, "")
    assert ended.err == "dwiml-func: Expected Linux or macOS. Received: win32.\n"
