"""Files and directories that appear whole or not at all, and disappear so."""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_directory", "atomic_remove", "atomic_write", "make_directory", "remove_leftovers"]

_PREFIX = ".tmp-"  # what a crash leaves behind begins with this; no reader looks at such names
_OLD = ".old-"  # what stood in a place that is being replaced, where the system cannot swap two names in one step


@contextmanager
def atomic_directory(path: str | Path, *, replace: bool = True) -> Iterator[Path]:
    """Fill a directory beside its place, and move it there in one step when the block ends without an error.

    The bytes are flushed to the disk before that step, and what stood there is removed after it, so that a reader finds
    the old one or the new one at any moment. Where the system cannot swap two names in one step (Linux can, on all of
    its common file systems), a crash may leave the place empty for a moment; `remove_leftovers` puts the old one back.

    Args:
        path: where the directory shall appear; its parent exists.
        replace: whether to replace what stands at `path` by then.

    Yields:
        The directory to fill.

    Raises:
        OSError: a directory that is not empty stands at `path`, and `replace` is False; or the disk is full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with atomic_directory(Path(parent) / "run") as directory:
        ...         _ = (directory / "a.txt").write_text("a")
        ...     sorted(entry.name for entry in Path(parent).iterdir())
        ['run']
    """
    path = Path(path)
    temporary = _temporary(path)
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
        _name_place(error, path)
        raise


def atomic_write(path: str | Path, content: bytes | str, *, flush: bool = True) -> None:
    """Write a file beside its place, flush it, and rename it there.

    Args:
        path: the file; its parent exists. A file that stands there is replaced.
        content: what to write; text is encoded as UTF-8.
        flush: whether to wait until it is on the disk. What can be made again need not survive a loss of power.

    Raises:
        OSError: the disk is full, or the directory cannot be written to; what stood there stays.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     atomic_write(Path(parent) / "a.txt", "a")
        ...     (Path(parent) / "a.txt").read_text()
        'a'
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if flush:
            _fsync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name_place(error, path)
        raise


def atomic_remove(path: str | Path) -> None:
    """Remove a file or a directory such that no reader, and no crash, ever meets half of it.

    Args:
        path: what to remove.

    Raises:
        FileNotFoundError: there is no such thing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     (Path(parent) / "run").mkdir()
        ...     atomic_remove(Path(parent) / "run")
        ...     list(Path(parent).iterdir())
        []
    """
    path = Path(path)
    temporary = _temporary(path)
    path.rename(temporary)
    _remove(temporary)


def make_directory(path: str | Path) -> None:
    """Make a directory with those above it, such that a loss of power does not take it away again.

    Args:
        path: the directory; it may be there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     make_directory(Path(parent) / "a" / "b")
        ...     (Path(parent) / "a" / "b").is_dir()
        True
    """
    path = Path(path)
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _fsync(place.parent)


def remove_leftovers(directory: str | Path, name: str | None = None) -> None:
    """Remove what a crash of the functions above left in a directory, and put back what one had moved away.

    Args:
        directory: where to look; not below it. No other process may be writing there, or not what has this name.
        name: look only for what was to become an entry of this name; None looks for all.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     (Path(parent) / ".tmp-run-x").mkdir()
        ...     remove_leftovers(parent)
        ...     list(Path(parent).iterdir())
        []
    """
    directory = Path(directory)
    temporary = re.escape(_PREFIX) + (".*" if name is None else f"{re.escape(name)}-[a-z0-9_]{{8}}")
    for entry in list(directory.iterdir()) if directory.is_dir() else []:
        if re.fullmatch(temporary, entry.name, re.DOTALL):
            _remove(entry)
        elif entry.name.startswith(_OLD) and name in (None, entry.name.removeprefix(_OLD)):
            place = entry.with_name(entry.name.removeprefix(_OLD))
            if os.path.lexists(place):
                _remove(entry)
            else:
                entry.rename(place)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_PREFIX}{path.name}-{os.urandom(4).hex()}")


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _name_place(error: BaseException, path: Path) -> None:
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
    old = path.with_name(f"{_OLD}{path.name}")
    _remove(old)
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
    """The system call with RENAME_EXCHANGE: 0 or an error number. None where there is none."""
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
