"""A file that HDF5 can always close, whatever the disk does."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dwiml_func.data.hdf5.write import WatchedFile


class Disk:
    """A file on a disk that takes so many bytes."""

    def __init__(self, file: Any, num_bytes: int) -> None:
        self.file, self.num_bytes = file, num_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: memoryview) -> int:
        if self.num_bytes <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(len(data), self.num_bytes, 1000)  # a write may take a part only
        self.num_bytes -= taken
        return self.file.write(data[:taken])


def make(path: Path, num_bytes: int) -> WatchedFile:
    file = WatchedFile(path, has_large_attributes=False)
    file._sink._file = Disk(file._sink._file, num_bytes)  # type: ignore[assignment]
    return file


def fill(file: Any) -> None:
    for number in range(20):
        file.create_group(f"group{number}").create_dataset("data", data=np.full(500, number, np.float64))


def test_what_is_written_in_parts_is_whole(tmp_path):
    file = make(tmp_path / "a.hdf5", 10**9)
    fill(file)
    file.flush()
    file.close_and_sync()
    with h5py.File(tmp_path / "a.hdf5") as written:
        assert [written[f"group{number}/data"][499] for number in range(20)] == list(range(20))  # type: ignore[index]


@pytest.mark.parametrize("num_bytes", [0, 3000, 50_000])
def test_a_full_disk_is_told_by_flush_and_again_at_the_end(tmp_path, num_bytes):
    file = make(tmp_path / "a.hdf5", num_bytes)
    fill(file)
    with pytest.raises(OSError, match="No space left"):
        file.flush()
    with pytest.raises(OSError, match="No space left"):
        file.close_and_sync()
    assert not file


def test_nothing_is_written_after_a_write_that_failed(tmp_path):
    file = make(tmp_path / "a.hdf5", 3000)
    fill(file)
    with pytest.raises(OSError, match="No space left"):
        file.flush()
    before = (tmp_path / "a.hdf5").read_bytes()
    file._sink._file.num_bytes = 10**9  # type: ignore[attr-defined]  # another program has made room
    file.create_group("later").create_dataset("data", data=np.zeros(500))
    with pytest.raises(OSError, match="No space left"):
        file.close_and_sync()
    assert (tmp_path / "a.hdf5").read_bytes() == before


def test_closing_says_nothing(tmp_path):
    file = make(tmp_path / "a.hdf5", 0)
    fill(file)
    file.close()
    assert not file


def test_a_file_that_is_there_is_not_replaced(tmp_path):
    (tmp_path / "a.hdf5").write_text("old")
    with pytest.raises(FileExistsError):
        WatchedFile(tmp_path / "a.hdf5", has_large_attributes=False)
    assert (tmp_path / "a.hdf5").read_text() == "old"
