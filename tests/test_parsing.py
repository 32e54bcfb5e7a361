"""Claims about command lines that cannot be read, and about where options may stand."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from preloaded import finished, start_program

from dwiml_func.cli.main import COMMANDS, _check_command

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


ELSE: dict[str, dict[str, Any]] = {  # what these commands need besides; none of the files is there
    "evaluate": {"model_dir": "none"},
    "visualize-loss": {"model_dir": "none", "hdf5_file": "none", "out_dir": "none", "subject": "none"},
    "score": {"tractogram": "none", "hdf5_file": "none", "subject": "none"},
    "page": {"experiment_dir": "none"},
    "verify": {"experiment_dir": "none", "all": True},
    "benchmark": {"model": ("none",)},
    "track": {"model_dir": "none", "paths": ("none", "out.trk"), "subject": "none"},
}


@pytest.mark.parametrize(
    ("command", "option", "least"),
    [
        *(
            ("evaluate", "batch_size", 1),
            ("evaluate", "num_threads", 1),
            ("score", "nb_seeds", 1),
            ("page", "sample", 1),
        ),
        *(("visualize-loss", "batch_size", 1), ("visualize-loss", "num_threads", 1)),
        *(("visualize-loss", "displacement", 0), ("verify", "jobs", 1), ("verify", "sample", 1)),
        *(("benchmark", "processes", 1), ("track", "processes", 1), ("track", "simultaneous_tracking", 1)),
        ("track", "skip", 0),
    ],
)
def test_a_number_may_be_as_small_as_its_bound(tmp_path, monkeypatch, command: str, option: str, least: int) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"dwiml_func.cli.{command.replace('-', '_')}")
    given = ELSE[command] | ({"all": False} if option == "sample" and command == "verify" else {})
    with pytest.raises(ValueError, match=f"^{option}: expected a finite number at least {least} and below"):
        module.run(module.Options(**given, **{option: least - 1}))
    with pytest.raises(OSError, match="none"):
        module.run(module.Options(**given, **{option: least}))


@pytest.mark.parametrize("size", [100_000, 10**9, 2**31 - 1])
def test_layers_that_no_memory_holds_are_refused(cli, tmp_path: Path, size: int) -> None:
    sizes = ("--rnn-layer-sizes", 8, size)
    cli("train", tmp_path, "new", PHANTOM, *sizes).check_refusal(f"rnn_layer_sizes (8, {size})", "Choose smaller")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [("", "run"), ("experiments", ""), ("experiments", "run", "--quiet", "-v", "a", "")]
)
def test_an_empty_argument_that_is_no_value_is_refused(cli, arguments: tuple[str, ...]) -> None:
    cli("resume", *arguments).check_refusal("Expected no empty argument", "Is a variable of the shell not set?")
    assert "empty argument" not in cli("resume", "experiments", "run", "--hdf5-file", "").err


def test_after_two_dashes_nothing_is_an_option(cli, tmp_path: Path) -> None:
    cli("digest", "--", "--help").check_refusal("No checkpoint in --help/checkpoint")


@pytest.mark.parametrize(("command", "meant"), [("trian", "train"), ("Train", "train"), ("import", "import-dwi-ml")])
def test_an_unknown_command_is_answered_with_the_nearest(cli, command: str, meant: str) -> None:
    cli(command).check_refusal(f"Received: {command!r}. Did you mean {meant}?", ", ".join(COMMANDS))


@pytest.mark.parametrize("command", ["divert", "plate", "-", "scores-of-all"])
def test_a_command_that_is_near_to_none_is_answered_without_a_guess(cli, command: str) -> None:
    with pytest.raises(ValueError, match=rf"Received: '{command}'\.$"):
        _check_command(command, [command])


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
