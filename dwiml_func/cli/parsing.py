"""From a dataclass to a command line, by tyro, with errors of one line."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro

__all__ = ["new_folder", "parse"]

T = TypeVar("T")


def parse(description: type[T], arguments: Sequence[str], program: str) -> T:
    """Read a command line into a dataclass. Options may be written with hyphens or underscores.

    Args:
        description: the dataclass; its fields are the options, its docstring the help.
        arguments: the command line without program and command.
        program: the program's name in help and errors.

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
        ValueError: --size: invalid literal for int() with base 10: 'x'
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                description,
                args=list(arguments),
                prog=program,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _one_line(errors.getvalue())
        if message.startswith("Missing"):  # tyro names what it misses, but not what it got, e.g. a name like an option
            message += f" Received: {shlex.join(arguments) or 'nothing'}"
        raise ValueError(message) from None


def new_folder(path: str) -> Path:
    """A folder that a command is about to make.

    Args:
        path: as the user gave it.

    Returns:
        The path, at which nothing stands yet.

    Raises:
        ValueError: something stands there.
        FileNotFoundError: its parent is no folder.

    Example:
        >>> new_folder("/no/such/folder/model")
        Traceback (most recent call last):
        ...
        FileNotFoundError: '/no/such/folder' is not a folder. Create it, or choose another place for 'model'.
    """
    folder = Path(path)
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{path!r} exists. Choose the name of a new folder.")
    if not folder.parent.is_dir():
        raise FileNotFoundError(
            f"{str(folder.parent)!r} is not a folder. Create it, or choose another place for {folder.name!r}."
        )
    return folder


def _one_line(boxed: str) -> str:
    """The message inside tyro's box (its frame is plain ASCII where the output's encoding lacks better), without hints.

    The first line is the title. Rules cut the rest into sections: the message, perhaps a suggestion, then hints.
    """
    rows = [line.strip("│╰╯ ") for line in boxed.splitlines()[1:]]
    sections = re.split(r"\s*[─-]{3,}\s*", " ".join(rows))
    hints = ("full helptext", "Argument helptext")
    message = " ".join(text for text in sections if text and not any(hint in text for hint in hints))
    return re.sub(r"^Error parsing (?:[a-z]\w*: )?", "", " ".join(message.split()))
