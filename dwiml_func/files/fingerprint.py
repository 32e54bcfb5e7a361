"""Which data a run was trained on: SHA-256 and size of its file, and of the files from which that one takes values."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FingerprintInBackground", "content", "fingerprint", "linked_paths", "same_file", "size_and_time"]


def fingerprint(path: str | os.PathLike[str], linked: Iterable[str | os.PathLike[str]] = ()) -> dict[str, Any]:
    """Fingerprint a file. This reads all of it.

    Args:
        path: the file.
        linked: other files that belong to it, as external links of HDF5 do.

    Returns:
        JSON data: `sha256`, `size` in bytes, and `mtime_ns`, when it was last changed, in nanoseconds since 1970; with
        `linked` files, the same of each by its path from the folder of the first.

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
    if size_and_time(before) != size_and_time(after):
        raise ValueError(f"{path} was changed while it was read. Expected a file that nobody writes to.")
    found: dict[str, Any] = {"sha256": digest, **size_and_time(after)}
    if others := {os.path.relpath(other, Path(path).parent): fingerprint(other) for other in linked}:
        found["linked"] = others
    return found


def same_file(recorded: Mapping[str, Any], path: str | os.PathLike[str], *, thorough: bool = False) -> bool:
    """Whether a file has the bytes that were recorded, and the files linked to it theirs.

    Args:
        recorded: what `fingerprint` gave. Without `sha256`, which a run has that ended before its file was read, only
            the size counts.
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
    now = size_and_time(os.stat(path))
    if recorded.get("size", now["size"]) != now["size"]:
        return False
    if "sha256" not in recorded:
        return "size" in recorded
    if (thorough or recorded.get("mtime_ns") != now["mtime_ns"]) and fingerprint(path)["sha256"] != recorded["sha256"]:
        return False
    pairs = zip((recorded.get("linked") or {}).values(), linked_paths(recorded, path), strict=True)
    return all(os.path.isfile(other) and same_file(known, other, thorough=thorough) for known, other in pairs)


def linked_paths(recorded: Mapping[str, Any], path: str | os.PathLike[str]) -> list[Path]:
    """Where the linked files of a recorded fingerprint are when the file itself is at `path`."""
    return [Path(os.path.normpath(Path(path).parent / name)) for name in recorded.get("linked") or {}]


def content(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint without the times of the last change, which copies do not share."""
    own = {name: recorded[name] for name in ("sha256", "size") if name in recorded}
    linked = {name: content(other) for name, other in (recorded.get("linked") or {}).items()}
    return own | ({"linked": linked} if linked else {})


class FingerprintInBackground:
    """Fingerprints a file in a thread of its own.

    Args:
        path: the file.
        linked: other files that belong to it.
        recorded: an earlier fingerprint, which this one must equal.
        read: the file's `size_and_time` when its values were read.

    Example:
        >>> FingerprintInBackground("data.hdf5").result()["sha256"]  # doctest: +SKIP
        '0f3a...'
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        linked: Iterable[str | os.PathLike[str]] = (),
        *,
        recorded: Mapping[str, Any] | None = None,
        read: Mapping[str, int] | None = None,
    ) -> None:
        self._path, self._linked = Path(path), tuple(linked)
        self._recorded, self._read = dict(recorded or {}), dict(read or {})
        self._result: dict[str, Any] = {}
        self._error: OSError | ValueError | None = None
        self._thread = threading.Thread(target=self._work, name="fingerprint", daemon=True)
        self._thread.start()

    def result(self, *, patience: float | None = None) -> dict[str, Any]:
        """Wait for the fingerprint.

        Args:
            patience: seconds to wait at most; None waits until the file is read.

        Returns:
            What `fingerprint` gives; after `patience` what was recorded before, or only size and time of the last
            change. Nothing where it failed and nothing was recorded before. A warning says why.

        Raises:
            ValueError: the file does not have the bytes that were recorded, or it cannot be known whether it has.
        """
        self._thread.join(patience)
        if self._thread.is_alive():
            return dict(self._recorded or self._read)
        if self._error is not None:
            raise ValueError(f"The data of this run cannot be compared with what was recorded: {self._error}")
        known = content(self._recorded)
        if known and known != {name: value for name, value in content(self._result).items() if name in known}:
            raise ValueError(
                f"Expected the dataset that this run was trained on. Received: {self._path}, whose bytes differ "
                f"(SHA-256 {self._result.get('sha256')}, recorded {known.get('sha256')}). Nothing more was saved. "
                "Put the file back and resume, or train on other data with dwiml-func fork."
            )
        return dict(self._result)

    def _work(self) -> None:
        try:
            self._result = fingerprint(self._path, self._linked)
            if not self._read.items() <= self._result.items():
                raise ValueError(f"{self._path} was changed after it was read. Expected a file that nobody writes to.")
        except (OSError, ValueError) as error:
            self._result = {}
            if self._recorded:
                self._error = error
            else:
                log = logging.getLogger(__name__)
                log.warning("The fingerprint of the data cannot be recorded: %s", error)


def size_and_time(status: os.stat_result) -> dict[str, int]:
    """The part of a fingerprint that is known without reading the file."""
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
