"""From a command line to a dataclass; tyro prints the help and usage errors."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Self, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from dwiml_func.cli._messages import Verbosity

__all__ = ["CommandOptions", "optional_value", "parse"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """The options of every command."""

    verbose: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(aliases=["-v"])] = False
    """Print more: log lines with their time, and the traceback of an error."""
    quiet: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(aliases=["-q"])] = False
    """Print only results, warnings and errors."""

    @property
    def verbosity(self) -> Verbosity:
        """How much to print; `--quiet` wins over `--verbose`."""
        return Verbosity.QUIET if self.quiet else Verbosity.VERBOSE if self.verbose else Verbosity.NORMAL

    @classmethod
    def parse(cls, arguments: Sequence[str], program: str) -> Self:
        """Read the options of this command; see `parse`."""
        return parse(cls, arguments, program)


def optional_value(kind: type[T], read: Callable[[str], T], metavar: str, *, alone: T) -> Any:
    """An option that may be given without a value, which means `alone`."""
    return PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar=metavar,
        instance_from_str=lambda strings: read(strings[0]) if strings else alone,
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


def parse(
    description: type[T], arguments: Sequence[str], program: str, *, default: T | None = None, is_silent: bool = False
) -> T:
    """Read a command line into a dataclass: its fields are the options, their docstrings the help.

    Raises SystemExit after tyro has printed the help (code 0) or what is wrong (code 2). `is_silent` prints neither.
    """
    for before, argument in pairwise(["", *arguments]):
        if not argument and not before.startswith("-"):
            raise ValueError(
                f"Expected no empty argument. Received: {shlex.join(arguments)}. Is a variable of the shell not set?"
            )
    try:
        return tyro.cli(
            description,
            args=list(arguments),
            prog=program,
            default=tyro.MISSING_NONPROP if default is None else default,
            console_outputs=not is_silent,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
        )
    except SystemExit:
        sys.stdout.flush()  # while a closed pipe can still be reported
        raise
