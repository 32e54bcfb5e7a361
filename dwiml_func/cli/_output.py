"""Where the output of commands goes: folders that are made with it, and standard streams that may be closed or full."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dwiml_func.files.atomic import make_directory, remove_leftovers

__all__ = [
    "check_new_file",
    "drop_unwritable_output",
    "enduring_output",
    "folders_above",
    "new_folder",
    "open_standard_streams",
]

_STREAMS = ("stdin", "stdout", "stderr")


@contextlib.contextmanager
def folders_above(path: str | Path) -> Iterator[Path]:
    """Make the missing folders above a file or folder that the block writes; remove them again when the block fails."""
    if not Path(path).name:
        raise ValueError(f"Expected the name of a file or folder to write. Received: {str(path)!r}.")
    path = Path(path)
    missing = [folder for folder in path.parents if not os.path.lexists(folder)]
    nearest = next(folder for folder in path.parents if folder not in missing)
    if not nearest.is_dir():
        raise ValueError(f"{str(nearest)!r} is not a folder. Choose another folder for {path.name!r}.")
    try:
        make_directory(path.parent)
        remove_leftovers(path.parent, path.name)
        yield path
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def check_new_file(path: str | Path, *, overwrite: bool) -> None:
    """Raise FileExistsError where there is a file, unless it may be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"The file exists: {path}. Choose another name, or overwrite it with --overwrite.")


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[Path]:
    """The same as `folders_above`, for a folder that the block makes and that must not exist yet."""
    if os.path.lexists(path):
        raise ValueError(f"{path!r} exists. Choose the name of a new folder.")
    with folders_above(path) as folder:
        yield folder


def open_standard_streams() -> None:
    """Give standard streams that are closed the null device; the next file that opens would take their numbers."""
    for number, name in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w" if number else "r"))


@contextlib.contextmanager
def enduring_output() -> Iterator[None]:
    """While the block runs, standard output and error that cannot be written to are dropped, and end nothing."""
    before = {name: getattr(sys, name) for name in _STREAMS[1:]}
    for number, (name, stream) in enumerate(before.items(), start=1):
        if isinstance(stream, io.TextIOWrapper) and stream.fileno() == number:
            stream.flush()
            binary = io.BufferedWriter(_Enduring(number, "wb", closefd=False))
            text = io.TextIOWrapper(binary, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
            setattr(sys, name, text)
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def drop_unwritable_output() -> OSError | None:
    """Flush what was printed. What cannot be written is dropped: Python would flush once more at its end, and complain.

    Returns the error of standard output.
    """
    found = None
    for number, name in ((2, "stderr"), (1, "stdout")):
        stream: Any = getattr(sys, name)
        try:
            stream.flush()
        except OSError as error:
            found = error
            _to_null(number)
            stream.flush()
    return found


class _Enduring(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            number = self.fileno()
            _to_null(number)
            if number == 1:
                with contextlib.suppress(OSError):
                    reason = f"warning: standard output cannot be written to ({error.strerror})"
                    os.write(2, f"dwiml-func: {reason}. Training continues.\n".encode())
            return len(data)


def _to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
