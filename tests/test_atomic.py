"""Claims about files and directories that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dwiml_func.files import atomic
from dwiml_func.files.atomic import atomic_directory, atomic_file, atomic_write, remove_leftovers


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


@pytest.mark.parametrize("broken_call", ["scandir", "unlink"])
def test_a_folder_that_cannot_be_read_is_an_error_and_what_cannot_be_removed_waits(tmp_path, monkeypatch, broken_call):
    """Read it is to be flushed, removed once another one stands in its place."""
    fill(tmp_path / "run", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, broken_call, broken)
        if broken_call == "scandir":
            with pytest.raises(OSError, match="No space left"):
                fill(tmp_path / "run", "new")
        else:
            fill(tmp_path / "run", "new")
    assert (tmp_path / "run" / "deep" / "a.txt").read_text() == ("old" if broken_call == "scandir" else "new")
    assert len(names(tmp_path)) == 2
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["run"]


def test_a_directory_that_must_be_new_never_replaces_one(tmp_path):
    def too_late() -> None:
        with atomic_directory(tmp_path / "run", replace=False) as directory:
            (directory / "a.txt").write_text("mine")
            fill(tmp_path / "run", "another process was faster")

    with pytest.raises(OSError, match="not empty"):
        too_late()
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "deep" / "a.txt").read_text() == "another process was faster"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The system calls that matter to the disk, in order, with names below `tmp_path`; temporaries are called `*`."""
    seen: list[str] = []

    def name(path: Any) -> str:
        relative = os.path.relpath(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path, tmp_path)
        return re.sub(r"\.dwiml-(tmp|old)-[^/]*", "*", relative)

    def watch(module: Any, function: str) -> None:
        original = getattr(module, function)

        def call(*arguments: Any, **options: Any) -> Any:
            paths = arguments[:2] if function in ("rename", "replace", "_exchange") else arguments[:1]
            seen.append(" ".join([function.strip("_"), *map(name, paths)]))
            return original(*arguments, **options)

        monkeypatch.setattr(module, function, call)

    for function in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        watch(os, function)
    watch(atomic, "_exchange")
    return seen


def test_a_file_is_flushed_before_its_rename_and_the_rename_after_it(tmp_path, calls):
    atomic_write(tmp_path / "a.txt", "a")
    assert calls == ["fsync *", "replace * a.txt", "fsync ."]
    calls.clear()
    with atomic_file(tmp_path / "a.txt") as file:
        file.write(b"a")
    assert calls == ["fsync *", "replace * a.txt", "fsync ."]
    calls.clear()
    atomic_write(tmp_path / "a.txt", "a", flush=False)
    assert calls == ["replace * a.txt"]


def test_every_file_and_folder_is_flushed_before_the_rename_and_the_rename_after_it(tmp_path, calls):
    fill(tmp_path / "run", "a")
    flushes = ["fsync *", "fsync */deep/a.txt", "fsync */deep"]
    assert calls == ["mkdir *", "mkdir */deep", *flushes, "rename * run", "fsync .", "unlink *"]


@pytest.mark.parametrize("number", [0, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP])
def test_what_stood_there_is_removed_after_the_flush_of_the_swap(tmp_path, monkeypatch, calls, number):
    """A number of an error: the system or the file system cannot swap two names in one step."""
    fill(tmp_path / "run", "old")
    calls.clear()
    if number:
        monkeypatch.setattr(atomic, "_renameat2", lambda: lambda first, second: number)
    fill(tmp_path / "run", "new")
    swap = ["rename run *", "rename * run", "rename * *"] if number else []
    first = calls.index("exchange * run")
    assert calls[first : first + len(swap) + 2] == ["exchange * run", *swap, "fsync ."]
    assert all(call.startswith(("unlink", "rmdir")) for call in calls[first + len(swap) + 2 :])
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "deep" / "a.txt").read_text() == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="swaps two names in one step on Linux alone")
def test_a_swap_that_fails_is_an_error_with_the_systems_number(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError, match="gone") as raised:
        atomic._exchange(tmp_path / "a", tmp_path / "gone")
    assert raised.value.errno == errno.ENOENT


def test_new_folders_are_flushed_in_those_that_hold_them(tmp_path, calls):
    atomic.make_directory(tmp_path / "a" / "b")
    assert calls[-2:] == ["fsync a", "fsync ."]
    assert {*calls[:-2]} == {"mkdir a", "mkdir a/b"}
    calls.clear()
    atomic.make_directory(tmp_path / "a" / "b")
    assert not any(call.startswith("fsync") for call in calls)


def test_what_is_removed_is_renamed_first(tmp_path, calls):
    fill(tmp_path / "run", "a")
    calls.clear()
    atomic.atomic_remove(tmp_path / "run")
    assert calls[0] == "rename run *"
    assert names(tmp_path) == []


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
    assert leftover.startswith(".dwiml-tmp-run.")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_remove_leftovers_takes_what_an_ended_process_left_and_nothing_else(tmp_path):
    ended, running = ended_process(), os.getppid()
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / f".dwiml-tmp-deeper.{ended}-0123abcd").touch()
    others = [
        ".tmp-a",
        ".old-keep",
        ".old-b",
        ".dwiml-tmp-a",
        f".dwiml-tmp-a.{ended}",
        f".dwiml-tmp-a-{ended}-0123abcd",
    ]
    others += [f"{kind}a.{running}-0123abcd" for kind in (".dwiml-tmp-", ".dwiml-old-")]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / f".dwiml-tmp-link.{ended}-0123abcd").symlink_to(keep)
    (tmp_path / f".dwiml-tmp-file.{ended}-0123abcd").touch()
    (tmp_path / f".dwiml-tmp-a.b-c.{ended}-0123abcd").mkdir()
    (tmp_path / f".dwiml-tmp-a.b-c.{ended}-0123abcd" / "a").touch()
    (tmp_path / f".dwiml-tmp-own.{os.getpid()}-0123abcd").touch()  # of an earlier process of this number
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*others, "keep"])
    assert names(keep) == [f".dwiml-tmp-deeper.{ended}-0123abcd"]
    remove_leftovers(tmp_path / "no such folder")


@pytest.mark.parametrize(("error", "left"), [(PermissionError, 1), (ProcessLookupError, 0), (OverflowError, 0)])
def test_of_a_process_of_another_user_leftovers_stay_and_of_a_number_that_is_none_they_go(
    tmp_path, monkeypatch, error, left
):
    def kill(process: int, number: int) -> None:
        assert (process, number) == (12345, 0)
        raise error

    monkeypatch.setattr(os, "kill", kill)
    (tmp_path / ".dwiml-tmp-a.12345-0123abcd").touch()
    remove_leftovers(tmp_path)
    assert len(names(tmp_path)) == left


KILLED = """
import importlib.util, os, pathlib, shutil, sys
spec = importlib.util.spec_from_file_location("atomic", sys.argv[1])
atomic = importlib.util.module_from_spec(spec); spec.loader.exec_module(atomic)
place, kill_at = pathlib.Path(sys.argv[2]), int(sys.argv[3])
if sys.argv[4] == "without exchange":
    atomic._exchange = lambda first, second: False
seen = 0
def deadly(module, name):
    original = getattr(module, name)
    def call(*arguments, **options):
        global seen
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), 9)
        return original(*arguments, **options)
    setattr(module, name, call)
for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
    deadly(os, name)
if sys.argv[4] != "without exchange":
    deadly(atomic, "_exchange")
with atomic.atomic_directory(place / "run") as directory:
    (directory / "deep").mkdir()
    (directory / "deep" / "a.txt").write_text("new")
    (directory / "b.txt").write_text("new")
atomic.atomic_write(place / "c.txt", "new")
atomic.atomic_remove(place / "gone")
print(seen)
"""
"""Dies before the system call of a number; the calls are those that a reader could notice."""


@pytest.mark.parametrize("kind", ["with exchange", "without exchange"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_and_what_remove_leftovers_restores(tmp_path, kind):
    def run(place: Path, kill_at: int) -> subprocess.CompletedProcess[str]:
        place.mkdir()
        fill(place / "run", "old")
        (place / "run" / "b.txt").write_text("old")
        atomic_write(place / "c.txt", "old")
        fill(place / "gone", "old")
        command = [sys.executable, "-c", KILLED, atomic.__file__, str(place), str(kill_at), kind]
        return subprocess.run(command, check=False, text=True, capture_output=True)

    whole = run(tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    assert names(tmp_path / "whole") == ["c.txt", "run"]
    seen = []
    for kill_at in range(1, int(whole.stdout) + 1):
        place = tmp_path / str(kill_at)
        assert run(place, kill_at).returncode == -9
        if kind == "with exchange":
            assert (place / "run").is_dir()  # for a reader who comes before anyone has tidied up
        remove_leftovers(place)
        assert set(names(place)) <= {"c.txt", "run", "gone"}
        texts = {(place / "run" / "deep" / "a.txt").read_text(), (place / "run" / "b.txt").read_text()}
        assert texts in ({"old"}, {"new"})
        if (place / "gone").exists():
            assert names(place / "gone" / "deep") == ["a.txt"]
        seen.append((texts.pop(), (place / "c.txt").read_text(), (place / "gone").exists()))
    assert len(seen) > 15
    assert set(seen) == {("old", "old", True), ("new", "old", True), ("new", "new", True), ("new", "new", False)}


@pytest.mark.skipif(sys.platform != "linux", reason="swaps two names in one step on Linux alone")
def test_a_reader_finds_a_whole_directory_at_any_moment(tmp_path):
    fill(tmp_path / "run", "0")
    script = (
        "import pathlib, sys\n"
        "place = pathlib.Path(sys.argv[1]); reads = 0; print('ready', flush=True)\n"
        "while not (place / 'stop').exists() or not reads:\n"
        "    int((place / 'run' / 'deep' / 'a.txt').read_text()); reads += 1\n"
        "print(reads)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        for number in range(300):
            fill(tmp_path / "run", str(number))
        (tmp_path / "stop").touch()
        assert int(reader.stdout.readline()) > 0
    assert reader.returncode == 0


def test_what_is_replaced_may_be_a_link_or_a_file(tmp_path):
    fill(tmp_path / "elsewhere", "kept")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").touch()
    for name in ("link", "dangling", "file"):
        fill(tmp_path / name, "new")
        assert (tmp_path / name / "deep" / "a.txt").read_text() == "new"
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "elsewhere" / "deep" / "a.txt").read_text() == "kept"
    assert names(tmp_path) == ["dangling", "elsewhere", "file", "link"]


def test_a_full_disk_is_told_with_the_place_and_leaves_nothing(tmp_path):
    script = (
        "import os, resource, signal, sys; from pathlib import Path\n"
        "from dwiml_func.files.atomic import atomic_directory, atomic_write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "place = Path(sys.argv[1])\n"
        "def directory():\n"
        "    with atomic_directory(place / 'run') as folder:\n"
        "        (folder / 'a').write_bytes(bytes(2000))\n"
        "for write in (lambda: atomic_write(place / 'a.npy', bytes(2000)), directory):\n"
        "    try:\n"
        "        write()\n"
        "    except OSError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, text=True, capture_output=True)
    first, second = done.stdout.splitlines()
    assert first == f"[Errno 27] File too large: '{tmp_path}/a.npy'"
    assert second == f"[Errno 27] File too large: '{tmp_path}/run'"
    assert names(tmp_path) == []


def test_a_place_that_cannot_hold_anything_is_told_by_name(tmp_path):
    (tmp_path / "file").touch()
    for write in (lambda path: atomic_write(path, "a"), lambda path: fill(path, "a")):
        with pytest.raises(NotADirectoryError, match="file/"):
            write(tmp_path / "file" / "run")
        with pytest.raises(FileNotFoundError, match="nothing/"):
            write(tmp_path / "nothing" / "run")
    assert names(tmp_path) == ["file"]
    with pytest.raises(IsADirectoryError, match=r"^Expected a file name\. Received a folder: "):
        atomic_write(tmp_path, "a")


@pytest.mark.parametrize("name", ["x" * 255, "\u00e9" * 127])
def test_names_are_as_long_as_file_systems_take(tmp_path, name):
    atomic_write(tmp_path / name, "whole")
    stem = atomic.temporary_beside(tmp_path / name).name.removeprefix(".dwiml-tmp-").rpartition(".")[0]
    (tmp_path / name).rename(tmp_path / f".dwiml-old-{stem}.{ended_process()}-0123abcd")
    remove_leftovers(tmp_path, name)
    assert names(tmp_path) == [name]


def test_leftovers_of_one_name_are_told_from_those_of_others(tmp_path):
    ended = ended_process()
    others = [f".dwiml-tmp-{name}.{ended}-0123abcd" for name in ("b", "ab", "a-b", f"a.{ended}-0123abcd")]
    for name in (*others, f".dwiml-tmp-a.{ended}-0123abcd", f".dwiml-old-a.{ended}-0123abcd"):
        (tmp_path / name).mkdir()
    (tmp_path / f".dwiml-old-b.{ended}-0123abcd").mkdir()
    remove_leftovers(tmp_path, "a")
    assert names(tmp_path) == sorted([*others, f".dwiml-old-b.{ended}-0123abcd", "a"])
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a", "b"]


def test_other_threads_make_files_with_the_usual_rights_meanwhile(tmp_path, monkeypatch):
    def changed(mask: int) -> int:
        raise AssertionError(f"the process's umask was set to {mask}")

    monkeypatch.setattr(os, "umask", changed)
    fill(tmp_path / "run", "a")
    atomic_write(tmp_path / "a.txt", "a")


def test_what_can_be_made_again_appears_whole_but_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("the disk was waited for")

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    atomic_write(tmp_path / "a", "new", flush=False)
    assert (tmp_path / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]
    with pytest.raises(OSError, match="waited for"):
        atomic_write(tmp_path / "a", "newer")
