"""One process at a time in an experiment's directory.

The lock is the kernel's (`flock`) on a file `.lock`, so it dies with the process that holds it, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["LockedError", "experiment_lock", "is_locked"]

_NAME = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}  # what file systems without flock answer


class LockedError(ValueError):
    """Another process works in the directory.

    Example:
        >>> raise LockedError("experiments/a is being trained")
        Traceback (most recent call last):
        ...
        dwiml_func.files.lock.LockedError: experiments/a is being trained
    """


@contextmanager
def experiment_lock(directory: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a directory while the block runs.

    Args:
        directory: an experiment, or the folder of all experiments; it exists and can be written to.
        wait: wait for the other process instead of raising an error.

    Raises:
        LockedError: another process has the lock; the message names it.
        OSError: the directory is missing, or cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory, experiment_lock(directory):
        ...     is_locked(directory)
        True
    """
    path = Path(directory) / _NAME
    descriptor = _acquire(path, wait)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still locked: `_acquire` looks again whether the file is there
        os.close(descriptor)


def is_locked(directory: str | Path) -> bool:
    """Whether a process works in a directory.

    Args:
        directory: an experiment.

    Returns:
        True while a process holds its lock.

    Example:
        >>> is_locked("/no/such/experiment")
        False
    """
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


def _acquire(path: Path, wait: bool) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited by the workers of a loader
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_still_there(descriptor, path):
                return descriptor
        except BlockingIOError:
            if _is_only_looked_at(descriptor):
                os.close(descriptor)
                continue
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise LockedError(
                f"{path.parent} is in use by {holder}. Expected one process per experiment: wait for it or stop it."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            logging.getLogger(__name__).warning(
                "%s is on a file system without locks: nothing keeps a second process out of it.", path.parent
            )
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_only_looked_at(descriptor: int) -> bool:
    """Whether what kept us from the lock was `is_locked`, which shares it for a moment."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still_there(descriptor: int, path: Path) -> bool:
    """False when the last holder has removed the file between our opening and our locking it."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
