"""One process at a time in an experiment's directory: a kernel lock on a file `.lock`, which ends with its process.

Besides: whether a path still leads to the same directory, and shared locks with which a reader keeps directories.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = [
    "FolderLostError",
    "LockedError",
    "experiment_lock",
    "is_kept",
    "is_locked",
    "kept_folders",
    "remove_left_lock",
    "same_folder",
]

_NAME = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EINVAL}  # what file systems without flock answer, beside ENOSYS
_SECONDS = 0.5  # `is_locked` in another process holds the lock for a moment
_POLL_SECONDS = 0.02
_LOOK = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW  # no link is followed, no pipe waited for


class LockedError(ValueError):
    """Another process works in the directory."""


class FolderLostError(ValueError):
    """The directory was moved, removed, or taken over by another process."""


@contextmanager
def experiment_lock(directory: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of an existing directory while the block runs; LockedError if one is in it.

    With `wait`, wait for the other process instead.
    """
    path = Path(directory) / _NAME
    if not path.parent.is_dir():  # filelock would make it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))
    with suppress(FileNotFoundError):  # a holder may remove it at any moment
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError(f"Expected a plain file, or none. Received: {path}, which is a link, a pipe or a folder.")
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(path, timeout=-1 if wait else _SECONDS, poll_interval=_POLL_SECONDS))
        except Timeout:
            raise LockedError(
                f"{directory} is in use by {_holder(path)}. "
                "Expected one process per experiment. Wait for it, or stop it."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logging.getLogger(__name__).warning(
                "%s is on a file system without locks. Do not start a second process in it.", directory
            )
        if is_locked(directory):  # else the file, if any, is a marker of filelock's own, which it removes itself
            stack.callback(_remove_own, path, path.lstat())  # while it is locked; filelock notices that it has gone
            path.write_text(f"process {os.getpid()} on {platform.node()}")
        yield


def is_locked(directory: str | Path) -> bool:
    """Whether a process holds the lock of a directory, which need not exist. Nothing is written."""
    return _is_locked(Path(directory) / _NAME, _LOOK, fcntl.LOCK_SH)


def remove_left_lock(directory: Path) -> None:
    """Remove the lock's file that a killed process left, where nobody holds it."""
    if os.path.lexists(directory / _NAME) and not is_locked(directory):
        with suppress(OSError, ValueError), experiment_lock(directory):
            pass


@contextmanager
def same_folder(directory: str | Path) -> Iterator[Callable[[], None]]:
    """Yield a check that raises FolderLostError once the path, or its lock, is no longer that of now.

    Both stay open meanwhile, so no other directory or file gets their number.
    """
    with ExitStack() as stack:
        known: dict[Path, int] = {}
        for path in (Path(directory), Path(directory) / _NAME):
            if os.path.lexists(path):
                known[path] = os.open(path, _LOOK if path.name == _NAME else os.O_RDONLY)
                stack.callback(os.close, known[path])

        def check() -> None:
            for path, descriptor in known.items():
                try:
                    is_same = os.path.samestat(path.stat(), os.fstat(descriptor))
                except OSError:
                    is_same = False
                if not is_same:
                    raise FolderLostError(
                        f"{directory} was moved, removed or taken over by another process. "
                        "Nothing more was written there. Resume the run where it is now."
                    )

        yield check


@contextmanager
def kept_folders(paths: Iterable[Path]) -> Iterator[None]:
    """Ask others not to remove these directories while the block reads them, where the file system has locks."""
    with ExitStack() as stack:
        for path in paths:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                continue
            stack.callback(os.close, descriptor)
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def is_kept(path: Path) -> bool:
    """Whether a reader asked to keep a directory."""
    return _is_locked(path, os.O_RDONLY | os.O_DIRECTORY, fcntl.LOCK_EX)


def _is_locked(path: Path, flags: int, operation: int) -> bool:
    """Whether a path, which need not exist, is locked against an operation."""
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _remove_own(path: Path, own: os.stat_result) -> None:
    """Remove the lock's file, unless the directory was taken over meanwhile."""
    with suppress(FileNotFoundError, NotADirectoryError):  # or a file stands in its place
        if os.path.samestat(path.lstat(), own):
            path.unlink()


def _holder(path: Path) -> str:
    try:
        return path.read_text() or "another process"
    except (OSError, ValueError):
        return "another process"
