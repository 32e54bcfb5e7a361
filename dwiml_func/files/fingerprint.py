"""Which data a run was trained on: SHA-256 and size of its file."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["FingerprintInBackground", "fingerprint", "same_file"]


def fingerprint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Fingerprint a file. This reads all of it.

    Args:
        path: the file.

    Returns:
        JSON data: `sha256`, `size` in bytes, and `mtime_ns`, when it was last changed, in nanoseconds since 1970.

    Raises:
        OSError: it cannot be read.
        ValueError: it was changed meanwhile.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "a"
        ...     _ = file.write_bytes(b"abc")
        ...     found = fingerprint(file)
        >>> found["sha256"][:8], found["size"]
        ('ba7816bf', 3)
    """
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    if _size_and_time(before) != _size_and_time(after):
        raise ValueError(f"{path} was changed while it was read. Expected a file that nobody writes to.")
    return {"sha256": digest, **_size_and_time(after)}


def same_file(recorded: Mapping[str, Any], path: str | os.PathLike[str], *, thorough: bool = False) -> bool:
    """Whether a file has the bytes that were recorded.

    Args:
        recorded: what `fingerprint` gave; without `sha256` nothing equals it.
        path: the file.
        thorough: read the file even where size and time of the last change are as recorded.

    Returns:
        True when it has.

    Raises:
        OSError: it cannot be read.
        ValueError: it was changed meanwhile.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "a"
        ...     _ = file.write_bytes(b"abc")
        ...     recorded = fingerprint(file)
        ...     _ = file.write_bytes(b"abd")
        ...     same_file(recorded, file, thorough=True)
        False
    """
    now = _size_and_time(os.stat(path))
    if "sha256" not in recorded or recorded.get("size", now["size"]) != now["size"]:
        return False
    if not thorough and recorded.get("mtime_ns") == now["mtime_ns"]:
        return True
    return fingerprint(path)["sha256"] == recorded["sha256"]


class FingerprintInBackground:
    """Fingerprints a file in a thread of its own.

    Args:
        path: the file.
        recorded: an earlier fingerprint; where the file has its size and time of the last change, it is not read again.

    Example:
        >>> FingerprintInBackground("data.hdf5").result()["sha256"]  # doctest: +SKIP
        '0f3a...'
    """

    def __init__(self, path: str | os.PathLike[str], recorded: Mapping[str, Any] | None = None) -> None:
        self._path = Path(path)
        self._recorded = dict(recorded or {})
        self._result: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._work, name="fingerprint", daemon=True)
        self._thread.start()

    def result(self) -> dict[str, Any]:
        """Wait for the fingerprint.

        Returns:
            What `fingerprint` gives, or nothing where that failed: it must not stop a training. A warning says why.
        """
        self._thread.join()
        return dict(self._result)

    def _work(self) -> None:
        try:
            known = _size_and_time(os.stat(self._path)).items() <= self._recorded.items()
            self._result = self._recorded if known and "sha256" in self._recorded else fingerprint(self._path)
        except (OSError, ValueError) as error:
            logging.getLogger(__name__).warning("The fingerprint of the data cannot be recorded: %s", error)


def _size_and_time(status: os.stat_result) -> dict[str, int]:
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
