"""Claims about `dwiml_func.files.fingerprint`: the bytes of a file and of those linked to it are known again."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dwiml_func.files import fingerprint as module
from dwiml_func.files.archive import check_archive, is_bomb
from dwiml_func.files.fingerprint import FingerprintInBackground, content, fingerprint, linked_paths, same_file

TIME = 1_700_000_000_123_456_789


def write(path: Path, content: bytes, time: int = TIME) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(time, time))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A file, and one in another folder that belongs to it."""
    return write(tmp_path / "data" / "a", b"abc"), write(tmp_path / "others" / "b", b"defg")


def test_it_holds_hash_size_and_time_of_a_file_and_of_those_linked_to_it(files: tuple[Path, Path]) -> None:
    path, other = files
    own = {"sha256": hashlib.sha256(b"abc").hexdigest(), "size": 3, "mtime_ns": TIME}
    linked = {"sha256": hashlib.sha256(b"defg").hexdigest(), "size": 4, "mtime_ns": TIME}
    assert fingerprint(path) == own
    assert (found := fingerprint(path, [other])) == {**own, "linked": {"../others/b": linked}}
    assert linked_paths(found, path) == [other]
    assert content(found) == {
        **{name: value for name, value in own.items() if name != "mtime_ns"},
        "linked": {"../others/b": {"sha256": linked["sha256"], "size": 4}},
    }
    assert content({"size": 3, "mtime_ns": TIME}) == {"size": 3}


@pytest.mark.parametrize("which", [0, 1], ids=["itself", "linked"])
def test_a_file_is_the_same_where_its_bytes_are_whatever_its_time_says(files: tuple[Path, Path], which: int) -> None:
    path, recorded = files[0], fingerprint(files[0], [files[1]])
    old = files[which].read_bytes()
    assert same_file(recorded, path)
    write(files[which], old, TIME + 1)
    assert same_file(recorded, path)  # a copy
    write(files[which], old[::-1])
    assert same_file(recorded, path)  # a first look: size and time are those that were recorded
    assert not same_file(recorded, path, thorough=True)
    write(files[which], old[::-1], TIME + 1)
    assert not same_file(recorded, path)
    write(files[which], old + b"x")
    assert not same_file(recorded, path)
    if which:
        files[which].unlink()
        assert not same_file(recorded, path)


def test_without_a_hash_the_size_alone_counts(files: tuple[Path, Path]) -> None:
    assert same_file({"size": 3, "mtime_ns": 1}, files[0], thorough=True)
    assert not same_file({"size": 4}, files[0])
    assert not same_file({}, files[0])


def test_a_file_that_is_changed_while_it_is_read_has_none(files: tuple[Path, Path], monkeypatch: Any) -> None:
    real = hashlib.file_digest

    def digest(file: Any, name: str) -> Any:
        write(files[0], b"xyz", TIME + 1)
        return real(file, name)

    monkeypatch.setattr(module.hashlib, "file_digest", digest)
    with pytest.raises(ValueError, match="was changed while it was read"):
        fingerprint(files[0])


def test_in_the_background_it_is_compared_with_what_was_recorded_and_read(
    files: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    path, linked = files[0], files[1:]
    recorded = fingerprint(path, linked)
    start = FingerprintInBackground
    assert start(path, linked).result() == start(path, linked, recorded=recorded).result() == recorded
    assert start(path, recorded={"size": 3, "mtime_ns": 1}).result() == fingerprint(path)
    assert start(path, read={"size": 3, "mtime_ns": TIME}).result() == fingerprint(path)
    assert start(path, read={"size": 3, "mtime_ns": 1}).result() == {}
    assert start(path.parent / "gone").result() == {}
    assert [record.message for record in caplog.records] == [
        f"The fingerprint of the data cannot be recorded: {path} was changed after it was read. Expected a file that "
        "nobody writes to.",
        "The fingerprint of the data cannot be recorded: [Errno 2] No such file or directory: "
        f"'{path.parent / 'gone'}'",
    ]
    with pytest.raises(ValueError, match=r"cannot be compared with what was recorded: .*changed after"):
        start(path, linked, recorded=recorded, read={"mtime_ns": 1}).result()
    write(files[1], b"gfed")
    with pytest.raises(ValueError, match=r"whose bytes differ \(SHA-256 "):
        start(path, linked, recorded=recorded).result()
    with pytest.raises(ValueError, match="cannot be compared with what was recorded"):
        start(path.parent / "gone", recorded=recorded).result()


def test_who_does_not_wait_gets_what_is_known(files: tuple[Path, Path], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read, recorded = {"size": 3, "mtime_ns": 5}, {"sha256": "0", "size": 3}
    waiting = [FingerprintInBackground(pipe, read=read, recorded=each) for each in ({}, recorded)]
    assert [each.result(patience=0.0) for each in waiting] == [read, recorded]
    with pipe.open("wb"):  # both threads come to an end
        pass


@pytest.mark.parametrize("zeros", [0, 5_000, 10_000])
def test_an_archive_that_unpacks_to_more_than_it_holds_is_refused(tmp_path: Path, zeros: int) -> None:
    """However little more: of random bytes, deflating saves nothing, of half of them zeros a half."""
    for method, is_refused in ((zipfile.ZIP_STORED, False), (zipfile.ZIP_DEFLATED, zeros > 0)):
        with zipfile.ZipFile(tmp_path / "a.pt", "w", method) as archive:
            archive.writestr("zeros", os.urandom(10_000 - zeros) + bytes(zeros))
        if not is_refused:
            check_archive(tmp_path / "a.pt")
            continue
        with pytest.raises(ValueError, match=r"which is not compressed.* unpacks to 10000 bytes"):
            check_archive(tmp_path / "a.pt")
    check_archive(write(tmp_path / "plain", b"no archive"))


@pytest.mark.parametrize(("unpacked", "stored"), [(1 << 26, 0), (1 << 26, 1 << 19), (100 << 20, 1 << 20)])
def test_a_bomb_unpacks_to_more_than_64_mb_and_a_hundred_times_its_size(unpacked: int, stored: int) -> None:
    assert not is_bomb(unpacked, stored)
    assert is_bomb(unpacked + 1, stored)
