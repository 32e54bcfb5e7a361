"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_directory", "atomic_write", "remove_leftovers"]

_PREFIX = ".tmp-"  # what a crash leaves behind begins with this; no reader looks at such names


@contextmanager
def atomic_directory(path: str | Path, *, replace: bool = True) -> Iterator[Path]:
    """Fill a directory beside its place, and rename it there when the block ends without an error.

    The bytes are flushed to the disk before the rename.

    Args:
        path: where the directory shall appear; its parent exists.
        replace: whether to replace a directory that stands at `path` by then.

    Yields:
        The directory to fill.

    Raises:
        OSError: a directory that is not empty stands at `path`, and `replace` is False; or the disk is full.

    Example:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with atomic_directory(Path(parent) / "run") as directory:
        ...         _ = (directory / "a.txt").write_text("a")
        ...     sorted(entry.name for entry in Path(parent).iterdir())
        ['run']
    """
    path = Path(path)
    temporary = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{path.name}-", dir=path.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for parent, _, names in os.walk(temporary):
            for name in names:
                _fsync(Path(parent) / name)
            _fsync(Path(parent))
        if replace and path.exists():  # rename cannot replace a directory that holds something
            old = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{path.name}-", dir=path.parent))
            path.rename(old / path.name)
            try:
                temporary.rename(path)
            except BaseException:
                (old / path.name).rename(path)
                old.rmdir()
                raise
            shutil.rmtree(old)
        else:
            temporary.rename(path)
        _fsync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Write a file beside its place, flush it, and rename it there.

    Args:
        path: the file; its parent exists. A file that stands there is replaced.
        content: what to write; text is encoded as UTF-8.

    Example:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     atomic_write(Path(parent) / "a.txt", "a")
        ...     (Path(parent) / "a.txt").read_text()
        'a'
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(prefix=f"{_PREFIX}{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_leftovers(directory: str | Path) -> None:
    """Remove what an interrupted `atomic_directory` or `atomic_write` left in a directory.

    Args:
        directory: where to look; not below it. No other process may be writing there.

    Example:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     (Path(parent) / ".tmp-run-x").mkdir()
        ...     remove_leftovers(parent)
        ...     list(Path(parent).iterdir())
        []
    """
    for entry in Path(directory).glob(f"{_PREFIX}*"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
