"""What commands say about their work: `--quiet` and `--verbose`, log lines and warnings."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum

__all__ = ["MESSAGE_OPTIONS", "Verbosity", "is_quiet", "messages", "pluralize", "print_progress", "take_verbosity"]

MESSAGE_OPTIONS = (
    ("--verbose, -v", "Tell more: log lines with their time, and where an error comes from."),
    ("--quiet, -q", "Print results, warnings and errors only."),
)
"""The options that every command has, with their texts."""


class Verbosity(IntEnum):
    """How much a command tells.

    Example:
        >>> Verbosity.QUIET < Verbosity.NORMAL < Verbosity.VERBOSE
        True
    """

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


_FLAGS = {
    "--quiet": Verbosity.QUIET,
    "-q": Verbosity.QUIET,
    "--verbose": Verbosity.VERBOSE,
    "-v": Verbosity.VERBOSE,
}
_verbosity: ContextVar[Verbosity] = ContextVar("verbosity", default=Verbosity.NORMAL)


def take_verbosity(arguments: Sequence[str]) -> tuple[Verbosity, list[str]]:
    """Take `--verbose` and `--quiet` out of a command line, wherever they stand; the last one counts.

    Args:
        arguments: the command line.

    Returns:
        The verbosity, and the other arguments.

    Example:
        >>> take_verbosity(["train", "-q", "experiments", "--", "-v"])
        (<Verbosity.QUIET: 0>, ['train', 'experiments', '--', '-v'])
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given = [_FLAGS[argument] for argument in arguments[:end] if argument in _FLAGS]
    others = [argument for argument in arguments[:end] if argument not in _FLAGS]
    return (given[-1] if given else Verbosity.NORMAL), [*others, *arguments[end:]]


@contextmanager
def messages(program: str, verbosity: Verbosity) -> Iterator[None]:
    """While the block runs, log records and warnings go to standard error, a line each, above any bar.

    Args:
        program: the program's name, which begins each line.
        verbosity: with `VERBOSE`, the package's debug records are shown too.

    Example:
        >>> with messages("dwiml-func train", Verbosity.QUIET):
        ...     print_progress("Epoch 1")
    """
    root, package = logging.getLogger(), logging.getLogger("dwiml_func")
    handler, level = _Handler(program, verbosity), package.level
    token = _verbosity.set(verbosity)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: package.warning("%s", message)
        root.addHandler(handler)
        if verbosity is Verbosity.VERBOSE:
            package.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            root.removeHandler(handler)
            package.setLevel(level)
            _verbosity.reset(token)


def print_progress(text: str) -> None:
    """Print a line about the progress of a command on standard output, unless it shall be quiet.

    Args:
        text: the line.

    Example:
        >>> print_progress("Making the example data")
        Making the example data
    """
    if not is_quiet():
        print(text, flush=True)  # a file or pipe would hold it back for a long time


def pluralize(number: int, noun: str) -> str:
    """A number of things.

    Args:
        number: how many.
        noun: one of them; an s makes it several.

    Returns:
        The number and the noun.

    Example:
        >>> pluralize(1, "testing subject"), pluralize(0, "epoch")
        ('1 testing subject', '0 epochs')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def is_quiet() -> bool:
    """Whether the command shall tell nothing but results, warnings and errors.

    Returns:
        True with `--quiet`.

    Example:
        >>> is_quiet()
        False
    """
    return _verbosity.get() is Verbosity.QUIET


class _Handler(logging.Handler):
    def __init__(self, program: str, verbosity: Verbosity) -> None:
        super().__init__()
        self._program = program
        self._is_verbose = verbosity is Verbosity.VERBOSE
        self.setFormatter(logging.Formatter(datefmt="%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        assert self.formatter is not None
        text = " ".join(record.getMessage().split())
        if self._is_verbose:
            time = self.formatter.formatTime(record, self.formatter.datefmt)
            text = f"{time} {record.levelname.lower()} {record.name}: {text}"
            if record.exc_info:
                text += "\n" + self.formatter.formatException(record.exc_info)
        else:
            text = f"{record.levelname.lower()}: {text}"
        tqdm.write(f"{self._program}: {text}", file=sys.stderr)
