"""Messages of commands: progress on standard output, log records and warnings as single lines on standard error."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum

__all__ = ["Verbosity", "is_quiet", "messages", "print_progress", "set_verbosity"]


class Verbosity(IntEnum):
    """How much a command prints."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


_verbosity = Verbosity.NORMAL


@contextmanager
def messages(program: str) -> Iterator[None]:
    """Within the block, each log record and warning is a line on standard error that begins with `program`."""
    root, package = logging.getLogger(), logging.getLogger("dwiml_func")
    handler, level, before = _Handler(program), package.level, _verbosity
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: package.warning("%s", message)
        root.addHandler(handler)
        set_verbosity(Verbosity.NORMAL)
        try:
            yield
        finally:
            root.removeHandler(handler)
            set_verbosity(before)
            package.setLevel(level)


def set_verbosity(verbosity: Verbosity) -> None:
    """Set what `print_progress` and, with `VERBOSE`, the debug records of the package print."""
    global _verbosity
    _verbosity = verbosity
    if verbosity is Verbosity.VERBOSE:
        logging.getLogger("dwiml_func").setLevel(logging.DEBUG)


def is_quiet() -> bool:
    """Whether the command prints only results, warnings and errors."""
    return _verbosity is Verbosity.QUIET


def print_progress(text: str) -> None:
    """Print a line about the progress of a command, unless it is quiet."""
    if not is_quiet():
        print(text, flush=True)  # a file or a pipe would hold it back for a long time


class _Handler(logging.Handler):
    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program
        self.setFormatter(logging.Formatter(datefmt="%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # prints above a progress bar

        assert self.formatter is not None
        text = " ".join(record.getMessage().split())
        if _verbosity is Verbosity.VERBOSE:
            time = self.formatter.formatTime(record, self.formatter.datefmt)
            text = f"{time} {record.levelname.lower()} {record.name}: {text}"
            if record.exc_info:
                text += "\n" + self.formatter.formatException(record.exc_info)
        else:
            text = f"{record.levelname.lower()}: {text}"
        with suppress(OSError, ValueError):  # standard error was closed, or its terminal is gone
            tqdm.write(f"{self._program}: {text}", file=sys.stderr)
