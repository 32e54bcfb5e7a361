"""Claims about help: each option with its text and its default, grouped by the parts of the config."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from dwiml_func.cli.main import COMMANDS
from dwiml_func.data.example.settings import ExampleSettings


def options_in(text: str) -> list[str]:
    """The entries of the options in a help: how each is written, its text and its default."""
    lines = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    return re.split(r"\n(?=-)", "\n".join(lines[next(i for i, line in enumerate(lines) if line.startswith("-")) :]))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_text_and_a_default(cli, command: str) -> None:
    help_option, *options = options_in(cli(command, "--help").out)
    assert help_option.startswith("-h, --help")
    assert len(options) >= 2  # --verbose and --quiet, of every command
    for option in options:
        words = " ".join(option.split())
        assert re.search(r" [A-Z\"][^.]{9,}.*[.:] \((default: .*|required)\)", words), words


DEFAULTS: dict[str, dict[str, Any]] = {  # of commands' own options, where they are not None, off or nothing
    "train": {"num_models": 1},
    "example-data": {"settings": ExampleSettings()},
    "create-hdf5": {"enforce_files_presence": True},
    "evaluate": {"subset": "validation", "batch_size": 100, "cache_size": "2GB", "num_threads": 1},
    "visualize-loss": {"best_and_worst": 10.0, "displacement": 1, "colormap": "viridis", "batch_size": 100}
    | {"num_threads": 1},
    "score": {"streamline_group": "streamlines"},
    "attention": {"ids": (0,), "colormap": "viridis"},
    "benchmark": {"out": "benchmark", "setting": "small"},
    "track": {"algo": "det", "mask_interp": "nearest", "min_length": 10.0, "max_length": 300.0, "theta": 90.0}
    | {"rng_seed": 1234, "processes": 1, "simultaneous_tracking": 1},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_defaults_of_commands(command: str) -> None:
    module: Any = importlib.util.find_spec(f"dwiml_func.cli.{command.replace('-', '_')}")
    options = runpy.run_path(module.origin)["Options"]  # read again: `tests/mutations.py` sees what a test reaches
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    given = {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}
    own = {name: value for name, value in given.items() if value not in (None, False, ())}
    assert own == DEFAULTS.get(command, {})
    assert ExampleSettings() == ExampleSettings(
        snr=20.0, nb_directions=60, distractors=0, crossings=0, test_subject="sub_5"
    )


def test_the_help_of_train_is_grouped_by_the_parts_of_the_config(cli) -> None:
    groups = dict(re.findall(r"╭─ ([a-z]+) options ─+╮\n(.*?)╰", cli("train", "--help").out, flags=re.DOTALL))
    assert list(groups) == ["training", "model", "batches", "data", "checkpoints", "logging"]
    assert re.findall(r"^│ --([a-z-]+)", groups["model"], flags=re.MULTILINE)[:2] == ["model", "input-embedding-key"]
    assert "{cosine-regression,l2-regression," in "".join(groups["model"].split())
    assert "--max-epochs INT" in groups["training"]


def test_the_help_of_fork_shows_the_values_of_the_source(cli, experiments: Path) -> None:
    helps = [cli("fork", *source, "--help").out for source in ((), (experiments / "run",))]
    lengths = [re.search(r"--max-epochs INT\b.*?\(default: (\d+)\)", text, flags=re.DOTALL) for text in helps]
    assert [length and length[1] for length in lengths] == ["100", "9"]


def test_the_version_and_the_help_need_no_command(cli) -> None:
    assert cli("--help").out == cli("-h").out == cli().out
    assert cli("--version").code == 0
