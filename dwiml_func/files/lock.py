"""One process at a time in an experiment's directory: a kernel lock on a file `.lock`, which ends with its process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["LockedError", "experiment_lock", "is_locked"]

_NAME = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}  # what file systems without flock answer
_SECONDS = 0.5  # `is_locked` in another process holds the lock for a moment
_POLL_SECONDS = 0.02


class LockedError(ValueError):
    """Another process works in the directory."""


@contextmanager
def experiment_lock(directory: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of an existing directory while the block runs; LockedError if one is in it.

    With `wait`, wait for the other process instead.
    """
    path = Path(directory) / _NAME
    if not path.parent.is_dir():  # filelock would make it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))
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
            path.write_text(f"process {os.getpid()} on {platform.node()}")
            stack.callback(path.unlink, missing_ok=True)  # while it is locked; filelock notices that it has gone
        yield


def is_locked(directory: str | Path) -> bool:
    """Whether a process holds the lock of a directory, which need not exist. Nothing is written."""
    try:
        descriptor = os.open(Path(directory) / _NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _holder(path: Path) -> str:
    try:
        return path.read_text() or "another process"
    except (OSError, ValueError):
        return "another process"
