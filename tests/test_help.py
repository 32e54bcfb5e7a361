"""Claims about help: what it says of each option, how it groups them, and that it fits the terminal."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import tyro

from dwiml_func.cli._help import format_help
from dwiml_func.cli._options import list_options
from dwiml_func.cli._run_options import RUN_SUBJECTS, RunOptions
from dwiml_func.cli.main import COMMANDS


@dataclass(frozen=True)
class AutodiffBackend:
    power: float = 2.5
    """Power, in kW."""
    gears: tuple[int, ...] = (1, 2)
    """Teeth of each gear."""


@dataclass(frozen=True, kw_only=True)
class CarOptions:
    """Drive a car.

    It has four wheels.

    Example: drive home --power 3
    """

    place: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLACE")]
    """Where to."""
    backend: AutodiffBackend = field(default_factory=AutodiffBackend)
    seats: int | Literal["all"] | None = None
    """Seats to fill. None: those that are there."""
    lights: Annotated[bool, tyro.conf.arg(aliases=["-l"])] = False
    """Switch them on, whatever the hour, and leave them on for as long as the car moves along the road to the place."""


def test_a_help_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = format_help(CarOptions, "drive", subjects={"AutodiffBackend": ("backend",)})
    assert (
        text
        == """\
usage: drive [OPTIONS] PLACE

Drive a car.

It has four wheels.

Example:
  drive home --power 3

Arguments:
  PLACE                     Where to.

Options:
  --seats N|all             Seats to fill. (default: those that are there)
  --lights, -l              Switch them on, whatever the hour, and leave them on
                            for as long as the car moves along the road to the
                            place.

AutodiffBackend:
  --power X                 Power, in kW. (default: 2.5)
  --gears N [N ...]         Teeth of each gear. (default: 1 2)

Common options:
  --verbose, -v             Tell more: log lines with their time, and where an
                            error comes from.
  --quiet, -q               Print results, warnings and errors only.
  --help, -h                Print this and exit."""
    )


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)], ids=" ".join)
def test_every_help_fits_the_terminal(
    cli, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = cli(*command, "--help").out.splitlines()
    usage_and_example = 2 * len(command)
    assert sum(len(line) > min(columns, 100) for line in lines) <= usage_and_example


def test_every_option_has_a_text_and_every_value_without_a_default_says_what_that_means() -> None:
    needed = {  # they must be given where their embedding is chosen
        *("input_embedded_size", "prev_dirs_embedded_size", "nb_cnn_filters", "kernel_size"),
        *("neighborhood_radius", "neighborhood_resolution"),
    }
    for command in COMMANDS:
        module = importlib.import_module(f"dwiml_func.cli.{command.replace('-', '_')}")
        (description,) = (getattr(module, name) for name in module.__all__ if name.endswith("Options"))
        for option in list_options(description):
            assert option.text.endswith("."), f"{command}: {option.name}"
            if option.flags and option.value and option.name not in needed:
                assert option.default, f"{command}: {option.name} has no default to show"


def test_the_subjects_of_a_run_name_options_and_parts_that_there_are() -> None:
    options = list_options(RunOptions)
    known = {option.name for option in options} | {option.part for option in options}
    assert {name for names in RUN_SUBJECTS.values() for name in names} <= known


def test_the_help_of_fork_gives_no_default_of_its_own_for_the_options_of_a_run(cli) -> None:
    blocks = cli("fork", "--help").out.split("\n\n")
    runs = [block for block in blocks if block.split(":\n")[0] in RUN_SUBJECTS]
    assert len(runs) == len(RUN_SUBJECTS)
    defaults = re.findall(r"\(default: (.*?)\)", " ".join(" ".join(runs).split()))
    assert set(defaults) == {"the source's"}
    assert len(defaults) == len(list_options(RunOptions))
    assert "(default: Adam)" in cli("train", "--help").out


def test_the_help_of_train_is_grouped_by_subject(cli) -> None:
    text = cli("train", "--help").out
    machine = text.split("\n\nMachine:\n")[1].split("\n\n")[0]
    assert re.findall(r"^  --([a-z-]+)", machine, flags=re.MULTILINE)[:5] == [
        *("use-gpu", "num-threads", "compile", "precision", "processes")
    ]
    getter = text.split("\n\nDirection getter:\n")[1].split("\n\n")[0]
    assert "--dg-key NAME" in getter
    assert "One of: cosine-regression, " in " ".join(getter.split())
