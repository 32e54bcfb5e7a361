"""A file for HDF5 to write that never fails under it, and tells afterwards.

HDF5 cannot close a file whose disk is full: what it could not write stays in its cache, and it tries again until the
interpreter crashes at exit. So errors are kept here, and raised where Python can act on them.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import h5py

__all__ = ["WatchedFile"]


class _Sink(io.RawIOBase):
    """An unbuffered file that keeps the first error of a write, and takes all further writes as done."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb+", buffering=0)
        self.error: OSError | None = None

    def write(self, data) -> int:
        view, done = memoryview(data).cast("B"), 0
        try:
            while done < len(view) and self.error is None:
                done += self._file.write(view[done:])
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size) if self.error is None else size or 0
        except OSError as error:
            self.error = error
            return size or 0

    def readinto(self, buffer) -> int:
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        super().close()


class WatchedFile(h5py.File):
    """A new HDF5 file. `flush`, and `close_and_sync`, raise what went wrong in any write before.

    Args:
        path: where; nothing may be there.

    Raises:
        OSError: a file is there, or cannot be made.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = WatchedFile(Path(folder) / "a.hdf5")
        ...     file["numbers"] = [1, 2, 3]
        ...     file.flush()
        ...     file.close_and_sync()
        ...     h5py.is_hdf5(Path(folder) / "a.hdf5")
        True
    """

    def __init__(self, path: Path) -> None:
        self._sink = _Sink(path)
        super().__init__(self._sink, "w")

    def flush(self) -> None:
        """Hand everything to the operating system.

        Raises:
            OSError: this write or one before failed.
        """
        super().flush()
        if self._sink.error is not None:
            raise self._sink.error

    def close(self) -> None:
        """Close the file, without a word about what went wrong."""
        super().close()
        self._sink.close()

    def close_and_sync(self) -> None:
        """Close the file once its bytes are on the disk.

        Raises:
            OSError: this write or one before failed.
        """
        super().close()
        try:
            if self._sink.error is not None:
                raise self._sink.error
            self._sink.sync()
        finally:
            self._sink.close()
