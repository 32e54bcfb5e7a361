"""Claims about files and directories that appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dwiml_func import atomic
from dwiml_func.atomic import atomic_directory, atomic_write, remove_leftovers


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def broken(*_: object, **__: object) -> None:
    raise OSError("No space left on device")


def fill(path: Path, text: str) -> None:
    with atomic_directory(path) as directory:
        (directory / "deep").mkdir()
        (directory / "deep" / "a.txt").write_text(text)


def test_a_directory_appears_with_its_content_and_nothing_beside_it(tmp_path):
    with atomic_directory(tmp_path / "run") as directory:
        (directory / "a.txt").write_text("a")
        assert not (tmp_path / "run").exists()
        assert directory.parent == tmp_path  # on the same disk: a rename, not a copy
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "a.txt").read_text() == "a"


def test_a_directory_replaces_an_older_one_whole(tmp_path):
    fill(tmp_path / "run", "old")
    (tmp_path / "run" / "only_in_the_old_one").touch()
    fill(tmp_path / "run", "new")
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["deep"]
    assert (tmp_path / "run" / "deep" / "a.txt").read_text() == "new"


def test_an_error_in_the_block_leaves_what_was_there(tmp_path):
    def interrupted() -> None:
        with atomic_directory(tmp_path / "run") as directory:
            (directory / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []
    fill(tmp_path / "run", "old")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["deep"]


def test_a_disk_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    fill(tmp_path / "run", "old")
    atomic_write(tmp_path / "a.txt", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="No space left"):
            fill(tmp_path / "run", "new")
        with pytest.raises(OSError, match="No space left"):
            atomic_write(tmp_path / "a.txt", "new")
        with pytest.raises(OSError, match="No space left"):
            atomic_write(tmp_path / "b.txt", "new")
    assert names(tmp_path) == ["a.txt", "run"]
    assert (tmp_path / "run" / "deep" / "a.txt").read_text() == "old"
    assert (tmp_path / "a.txt").read_text() == "old"


def test_the_old_directory_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    fill(tmp_path / "run", "old")
    rename, calls = Path.rename, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            broken()
        return rename(self, target)

    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="No space left"):
        fill(tmp_path / "run", "new")
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "deep" / "a.txt").read_text() == "old"


def test_a_directory_that_must_be_new_never_replaces_one(tmp_path):
    def too_late() -> None:
        with atomic_directory(tmp_path / "run", replace=False) as directory:
            (directory / "a.txt").write_text("mine")
            fill(tmp_path / "run", "another process was faster")

    with pytest.raises(OSError, match="not empty"):
        too_late()
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "deep" / "a.txt").read_text() == "another process was faster"


def test_every_file_and_folder_is_flushed_before_the_rename(tmp_path, monkeypatch):
    flushed: list[str] = []

    def watched(path: Path) -> None:
        flushed.append(f"{path.name} {(tmp_path / 'run').exists()}")

    monkeypatch.setattr(atomic, "_fsync", watched)
    fill(tmp_path / "run", "a")
    before = {entry.split()[0] for entry in flushed if entry.endswith("False")}
    assert {"a.txt", "deep"} <= before
    assert flushed[-1] == f"{tmp_path.name} True"  # the rename itself


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_appears_has_the_rights_that_the_umask_leaves(tmp_path, mask):
    old = os.umask(mask)
    try:
        fill(tmp_path / "run", "a")
        atomic_write(tmp_path / "a.txt", "a")
    finally:
        os.umask(old)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_file_holds_the_bytes_or_the_text_as_utf8(tmp_path):
    atomic_write(tmp_path / "a", b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    atomic_write(tmp_path / "a", "é\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\n"
    assert names(tmp_path) == ["a"]


def test_a_kill_leaves_only_what_remove_leftovers_removes(tmp_path):
    script = (
        "import importlib.util, os, sys; from pathlib import Path\n"
        f"spec = importlib.util.spec_from_file_location('atomic', {atomic.__file__!r})\n"
        "atomic = importlib.util.module_from_spec(spec); spec.loader.exec_module(atomic)\n"
        "with atomic.atomic_directory(Path(sys.argv[1]) / 'run') as directory:\n"
        "    (directory / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -9
    (leftover,) = names(tmp_path)
    assert leftover.startswith(".tmp-run-")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_remove_leftovers_touches_nothing_else(tmp_path):
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / ".tmp-deeper").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / ".tmp-link").symlink_to(keep)
    (tmp_path / ".tmp-file").touch()
    (tmp_path / ".tmp-folder").mkdir()
    (tmp_path / ".tmp-folder" / "a").touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "keep"]
    assert names(keep) == [".tmp-deeper"]
    remove_leftovers(tmp_path / "no such folder")
