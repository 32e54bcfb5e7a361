"""Files and directories that appear complete or not at all, and disappear likewise.

Each is filled under a temporary name beside its target, flushed to the disk, and renamed. The temporary's name holds
our mark, the target's name and the process, so that `remove_leftovers` takes nothing of another program, of another
target, or of a running process.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "atomic_directory",
    "atomic_file",
    "atomic_remove",
    "atomic_write",
    "make_directory",
    "remove_leftovers",
    "temporary_beside",
]

_TEMPORARY = ".dwiml-tmp-"  # not complete, or to be removed
_REPLACED = ".dwiml-old-"  # to be replaced, where the system cannot swap two names in one step
_MAX_STEM = 255 - 40  # bytes; besides, there are the mark, the process and a random number
_LEFTOVER = re.compile(rf"({re.escape(_TEMPORARY)}|{re.escape(_REPLACED)})(.+)\.([0-9]+)-[0-9a-f]{{8}}", re.DOTALL)


@contextmanager
def atomic_directory(path: str | Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a directory to fill; move it to `path` in one step when the block ends without an error.

    With `replace`, what stands at `path` by then is replaced; else an OSError is raised if it is a directory that is
    not empty. A reader finds the old or the new directory at any moment, and a crash leaves one of them. Only where the
    system cannot swap two names in one step (Linux can) may `path` be missing until `remove_leftovers` restores it.
    """
    path = Path(path)
    temporary = _beside(path, _TEMPORARY)
    try:
        temporary.mkdir()
        yield temporary
        _flush(temporary)
        if replace and os.path.lexists(path):  # rename cannot replace a directory that holds something
            _swap(temporary, path)
        else:
            temporary.rename(path)
        _fsync(path.parent)
        _remove(temporary)  # what stood there before
    except BaseException as error:
        _remove(temporary)
        _add_path(error, path)
        raise


def atomic_write(path: str | Path, content: bytes | str, *, flush: bool = True) -> None:
    """Write a file, text as UTF-8, and move it to `path` in one step; what stands there is replaced.

    Without `flush` the function does not wait for the disk: for what can be made again after a loss of power.
    """
    with atomic_file(path, flush=flush) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: str | Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Yield a new file to write; move it to `path` in one step when the block ends without an error.

    What stands at `path` is replaced then. Without `flush` the function does not wait for the disk.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"Expected a file name. Received a folder: {path}")
    temporary = _beside(path, _TEMPORARY)
    try:
        with temporary.open("x+b") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if flush:
            _fsync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _add_path(error, path)
        raise


def atomic_remove(path: str | Path) -> None:
    """Remove a file or a directory, of which no reader and no crash ever sees a part."""
    path = Path(path)
    temporary = _beside(path, _TEMPORARY)
    path.rename(temporary)
    _remove(temporary)


def make_directory(path: str | Path) -> None:
    """Make a directory and its parents, where missing, such that a loss of power does not undo it."""
    path = Path(path)
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for parent in missing:
        _fsync(parent.parent)


def remove_leftovers(directory: str | Path, name: str | None = None) -> None:
    """Remove what a crash of the functions above left in a directory, and restore what one had moved away.

    Args:
        directory: only its entries are looked at, not those of folders in it.
        name: only what was to become an entry of this name; None takes all names.
    """
    directory = Path(directory)
    for entry in list(directory.iterdir()) if directory.is_dir() else []:
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or (name is not None and _stem(name) != match[2]) or _is_running(int(match[3])):
            continue
        target = entry.with_name(match[2] if name is None else name)
        if match[1] == _REPLACED and not os.path.lexists(target):
            entry.rename(target)
        else:
            _remove(entry)


def temporary_beside(path: str | Path) -> Path:
    """A new name for a temporary of this process, which `remove_leftovers` knows once the process has ended."""
    return _beside(Path(path), _TEMPORARY)


def _beside(path: Path, mark: str) -> Path:
    return path.with_name(f"{mark}{_stem(path.name)}.{os.getpid()}-{os.urandom(4).hex()}")


def _stem(name: str) -> str:
    """A name, or a hash of one with which a temporary's name would be longer than file systems take."""
    return name if len(os.fsencode(name)) <= _MAX_STEM else f"~{hashlib.sha256(os.fsencode(name)).hexdigest()}"


def _is_running(process: int) -> bool:
    """Whether a process other than this one has the number. In a new container, numbers begin at 1 again."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    return True


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _add_path(error: BaseException, path: Path) -> None:
    """An error about a full disk comes without a path."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


def _flush(directory: Path) -> None:
    def fail(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(directory, onerror=fail):
        for name in names:
            _fsync(Path(parent) / name)
        _fsync(Path(parent))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`, and what stood there in the place of `new`."""
    if _exchange(new, path):
        return
    old = _beside(path, _REPLACED)
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    old.rename(new)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two entries in one step; False where the system or the file system cannot."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    number = renameat2(os.fsencode(first), os.fsencode(second))
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    if number:
        raise OSError(number, os.strerror(number), str(second))
    return True


@functools.cache
def _renameat2() -> Callable[[bytes, bytes], int] | None:
    """The system call with RENAME_EXCHANGE: returns 0 or an error number. None where there is none."""
    try:
        import ctypes

        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (ImportError, OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE

    def swap(first: bytes, second: bytes) -> int:
        return ctypes.get_errno() if function(here, first, here, second, exchange) else 0

    return swap
