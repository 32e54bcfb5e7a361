"""From a dataclass to a command line, by tyro, with errors of one line."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import tyro

from dwiml_func.cli._help import format_help
from dwiml_func.cli._messages import MESSAGE_OPTIONS
from dwiml_func.cli._options import Option, list_options

__all__ = ["nearest", "parse", "value_of"]

T = TypeVar("T")

_PLAINER = {  # what tyro says, and how we say it
    r"^Missing from \S+ \S+: (\S+) .*": r"\1 is missing.",
    r"^Missing value for argument '(\S+)'\. Expected \d+ values?\.": r"\1: expected a value.",
    r"^Unrecognized options: (.*)": r"unexpected arguments: \1.",
    r"^(\S+): invalid literal for int\(\) with base 10: (.*)": r"\1: expected a whole number, received \2.",
    r"^(\S+): could not convert string to float: (.*)": r"\1: expected a number, received \2.",
    r"^invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*?),?\)\.": r"\2: expected one of \3, "
    r"received '\1'.",
}


def parse(
    description: type[T],
    arguments: Sequence[str],
    program: str,
    *,
    default: T | None = None,
    subjects: Mapping[str, Sequence[str]] | None = None,
    inherits: str | None = None,
) -> T:
    """Read a command line into a dataclass. Options may be written with hyphens or underscores.

    Args:
        description: the dataclass; its fields are the options, its docstring the help.
        arguments: the command line without program and command.
        program: the program's name in help and errors.
        default: where the values of options come from that are not given; None takes the fields' defaults.
        subjects, inherits: how the help groups options, and tells of defaults, see `format_help`.

    Returns:
        An instance.

    Raises:
        ValueError: the arguments do not fit; one line says why.
        SystemExit: help was asked for and has been printed.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Options:
        ...     size: int = 3
        >>> parse(Options, ["--size", "x"], "demo")
        Traceback (most recent call last):
        ...
        ValueError: --size: expected a whole number, received 'x'.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if not argument and not before.startswith("-"):
            raise ValueError(
                f"an argument is empty, received {shlex.join(arguments)}. Is a variable of the shell not set?"
            )
    given = _before_dashes(arguments)
    if "--help" in given or "-h" in given:
        print(format_help(description, program, subjects=subjects, inherits=inherits))
        raise SystemExit(0)
    options = {flag: option for option in list_options(description) for flag in option.flags}
    # A switch that `default` turns on can be turned off
    options |= {f"--no-{flag.removeprefix('--')}": option for flag, option in options.items() if not option.value}
    _check_unknown(options, given, program)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                description,
                args=list(arguments),
                prog=program,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit:
        message = _one_line(errors.getvalue(), options)
        if "is missing" in message or "expected a value" in message:  # tyro does not say what it got
            message += f" Received: {shlex.join(arguments) or 'nothing'}"
        raise ValueError(message) from None


def nearest(name: str, known: Iterable[str]) -> str:
    """A question about a name that is not known.

    Args:
        name: the name.
        known: those that are known.

    Returns:
        " Did you mean ...?", or nothing where none is near.

    Example:
        >>> nearest("trian", ["train", "resume"])
        ' Did you mean train?'
    """
    names = list(known)
    found = [long for long in names if name and long.startswith(name)]
    found += difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f" Did you mean {found[0]}?" if found else ""


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The value of an option that must be known before the others can be read.

    Args:
        flag: how it is written, e.g. "--config".
        arguments: the command line.

    Returns:
        Its last value; None where it has none.

    Example:
        >>> value_of("--config", ["experiments", "--config=a.json", "run"])
        'a.json'
    """
    found = None
    options = _before_dashes(arguments)
    for option, following in zip(options, [*options[1:], None], strict=False):
        if option == flag:
            found = following
        elif option.startswith(f"{flag}="):
            found = option.partition("=")[2]
    return found


def _check_unknown(options: Mapping[str, Option], arguments: Sequence[str], program: str) -> None:
    known = [*options, *(flag for flags, _ in MESSAGE_OPTIONS for flag in flags.split(", ")), "--help"]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        flag = name.replace("_", "-")
        if name.startswith("--") and flag not in known:
            hint = nearest(flag.lower(), known)
            raise ValueError(f"unknown option {name}.{hint} {program} --help lists all options.")
        if equals and flag in options and not options[flag].value:
            raise ValueError(f"{name} is given without a value, received {value!r}.")


def _before_dashes(arguments: Sequence[str]) -> Sequence[str]:
    """The arguments before "--", after which nothing is an option."""
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _one_line(boxed: str, options: Mapping[str, Option]) -> str:
    """The message inside tyro's box (its frame is plain ASCII where the output's encoding lacks better), without hints.

    The first line is the title. Rules cut the rest into sections: the message, perhaps a suggestion, then hints.
    """
    rows = [line.strip("│╰╯ ") for line in boxed.splitlines()[1:]]
    sections = re.split(r"\s*[─-]{3,}\s*", " ".join(rows))
    hints = ("full helptext", "Argument helptext")
    message = " ".join(text for text in sections if text and not any(hint in text for hint in hints))
    message = re.sub(r"^Error parsing (?:[a-z]\w*: )?", "", " ".join(message.split()))
    if found := re.match(r"(\S+): no type matching .* instantiated from \[(.*?)\]\. ", message):
        return f"{found[1]}: expected {options[found[1]].value}, received {found[2]}."
    for theirs, ours in _PLAINER.items():
        message = re.sub(theirs, ours, message)
    return message
