"""Claims about the lock: one process in a directory at a time, told at once, and free when its holder is gone."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from preloaded import start_program

from dwiml_func.cli import _training
from dwiml_func.files import lock
from dwiml_func.files.lock import (
    FolderLostError,
    LockedError,
    experiment_lock,
    is_kept,
    is_locked,
    kept_folders,
    remove_left_lock,
    same_folder,
)

HOLD = """
import signal, sys
from dwiml_func.files.lock import experiment_lock
with experiment_lock(sys.argv[1]):
    print("held", flush=True)
    signal.pause()
"""


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_a_second_process_is_refused_at_once_and_a_killed_holder_leaves_no_lock(cli, experiments):
    directory = experiments / "run"
    holder = start_program(HOLD, directory)
    try:
        while holder.out != "held\n":
            assert holder.poll() is None, holder.err
        assert is_locked(directory)
        before = contents(experiments)
        cli("resume", experiments, "run", "--new-patience", "9").check_refusal(
            f"{directory} is in use by process {holder.pid} on {platform.node()}", "Wait for it, or stop it"
        )
        assert contents(experiments) == before
        assert cli("digest", directory).code == 0  # to read is free
    finally:
        holder.kill()
        holder.wait(60)
    assert (directory / ".lock").exists()  # it had no time to clear up
    assert not is_locked(directory)
    assert cli("resume", experiments, "run", "--new-patience", "9", "--new-max-epochs", "4").code == 0
    assert not (directory / ".lock").exists()


def test_within_the_block_another_is_refused_and_after_it_not_even_after_an_error(tmp_path):
    def fail_within() -> None:
        with experiment_lock(tmp_path):
            with pytest.raises(LockedError, match=f"process {os.getpid()} on "), experiment_lock(tmp_path):
                pass
            assert is_locked(tmp_path)  # the refused one has not cleared it away
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fail_within()
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("told", [b"", b"\xff"])
def test_a_holder_that_has_not_told_its_name_is_another_process(tmp_path, told):
    def enter_twice() -> None:
        with experiment_lock(tmp_path):
            (tmp_path / ".lock").write_bytes(told)
            with experiment_lock(tmp_path):
                pass

    with pytest.raises(LockedError, match=r"is in use by another process\. "):
        enter_twice()


def test_those_that_wait_come_in_one_by_one(tmp_path):
    """Each holder removes the lock's file, so that the waiting ones meet files that are no longer the lock."""
    inside, most, rounds = 0, 0, []

    def work(number: int) -> None:
        nonlocal inside, most
        for _ in range(20):
            with experiment_lock(tmp_path, wait=True):
                inside += 1
                most = max(most, inside)
                rounds.append(number)
                inside -= 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    with experiment_lock(tmp_path):
        for thread in threads:
            thread.start()
        assert rounds == []
    for thread in threads:
        thread.join()
    assert (most, len(rounds)) == (1, 120)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_removed_while_it_is_locked(tmp_path, monkeypatch):
    """Removed later, it could be the file of the next holder."""
    seen, unlink = [], Path.unlink

    def look(path: Path, missing_ok: bool = False) -> None:
        seen.append(is_locked(tmp_path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", look)
    with experiment_lock(tmp_path):
        pass
    assert seen == [True]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_removed_between_opening_and_locking_is_no_lock(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, 0

    def overtaken(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / ".lock").unlink()  # the last holder leaves
            (tmp_path / ".lock").touch()  # and the next one comes
        flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", overtaken)
    with experiment_lock(tmp_path):
        assert is_locked(tmp_path)


def test_a_look_at_the_lock_keeps_nobody_out(tmp_path, monkeypatch):
    """`dwiml-func runs` looks at the lock of a crashed run at the moment when it is resumed."""
    (tmp_path / ".lock").write_text("process 1 on anvil")
    looking = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert not is_locked(tmp_path)  # nor do two that look keep each other out
    flock, refused = fcntl.flock, []

    def look_away_when_refused(descriptor: int, operation: int) -> None:
        try:
            flock(descriptor, operation)
        except BlockingIOError as error:
            if not refused:
                os.close(looking)
            refused.append(error)
            raise

    monkeypatch.setattr("fcntl.flock", look_away_when_refused)
    with experiment_lock(tmp_path):
        assert is_locked(tmp_path)


def test_a_look_leaves_nothing_behind_and_needs_no_right_to_write(tmp_path):
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with experiment_lock(tmp_path):
        (tmp_path / ".lock").chmod(0o444)
        tmp_path.chmod(0o555)
        assert is_locked(tmp_path)
        tmp_path.chmod(0o755)


def test_loading_processes_do_not_keep_the_lock_of_a_killed_run(tmp_path):
    with experiment_lock(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with child:
        assert not is_locked(tmp_path)  # though the child, were it to have inherited it, is alive
        child.kill()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_file_system_without_locks_is_warned_of_and_does_not_stop_the_run(tmp_path, monkeypatch, caplog, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with experiment_lock(tmp_path):
        assert not is_locked(tmp_path)
    (record,) = caplog.records
    assert f"{tmp_path} is on a file system without locks" in record.getMessage()


def test_without_flock_a_marker_keeps_a_second_process_out(tmp_path, monkeypatch):
    """What Lustre answers unless it is mounted with locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def enter_twice() -> None:
        with experiment_lock(tmp_path):
            assert "process" not in (tmp_path / ".lock").read_text()  # by its record filelock knows dead owners
            with experiment_lock(tmp_path):
                pass

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="falling back to SoftFileLock"), pytest.raises(LockedError, match="in use by"):
        enter_twice()
    assert list(tmp_path.iterdir()) == []


def test_another_error_of_the_lock_is_an_error_and_leaves_no_open_file(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(OSError, match="Input/output error"), experiment_lock(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), experiment_lock(tmp_path / "nothing"):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/nothing"), os.mkfifo, Path.mkdir])
def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path, make):
    make(tmp_path / ".lock")
    with pytest.raises(ValueError, match="Expected a plain file"), experiment_lock(tmp_path):
        pass
    assert not is_locked(tmp_path)
    assert os.path.lexists(tmp_path / ".lock")


def test_a_link_to_the_lock_of_another_folder_is_not_followed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".lock").symlink_to("../a/.lock")
    with experiment_lock(tmp_path / "a"):
        assert not is_locked(tmp_path / "b")


@pytest.mark.parametrize(("wait", "expected"), [(True, -1), (False, 0.5)])
def test_who_waits_does_so_without_an_end_and_others_for_the_moment_of_a_look(tmp_path, monkeypatch, wait, expected):
    timeouts = []

    def lock(path: Path, *, timeout: float, **options: Any) -> Any:
        timeouts.append(timeout)
        return FileLock(path, timeout=timeout, **options)

    monkeypatch.setattr("dwiml_func.files.lock.FileLock", lock)
    with experiment_lock(tmp_path, wait=wait):
        pass
    assert timeouts == [expected]


def test_the_lock_of_another_process_in_the_same_place_stays(tmp_path):
    with experiment_lock(tmp_path):
        (tmp_path / ".lock").rename(tmp_path / "moved")
        (tmp_path / ".lock").write_text("process 1 on anvil")
    assert (tmp_path / ".lock").read_text() == "process 1 on anvil"


def test_a_file_in_the_place_of_the_folder_is_no_error_of_the_lock(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with experiment_lock(folder):
        shutil.rmtree(folder)
        folder.write_text("not ours")
    assert folder.read_text() == "not ours"


def move(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def replace_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".lock").touch()


def take_over(folder: Path) -> None:
    (folder / ".lock").unlink()
    (folder / ".lock").touch()


@pytest.mark.parametrize("lose", [move, shutil.rmtree, replace_folder, take_over])
def test_a_folder_that_is_no_longer_the_same_is_noticed(tmp_path, lose):
    folder = tmp_path / "run"
    folder.mkdir()
    with experiment_lock(folder), same_folder(folder) as check:
        check()
        lose(folder)
        with pytest.raises(FolderLostError, match="moved, removed or taken over"):
            check()


def test_a_link_to_where_a_folder_was_moved_leads_to_the_same_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with experiment_lock(folder), same_folder(folder) as check:
        move(folder)
        folder.symlink_to(tmp_path / "moved")
        check()


def test_a_lock_that_was_left_is_removed_and_where_there_is_none_none_is_made(tmp_path, monkeypatch):
    (tmp_path / ".lock").touch()
    remove_left_lock(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(lock, "experiment_lock", lambda directory: pytest.fail("it was locked"))
    remove_left_lock(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_held_is_not_taken_for_one_that_was_left(tmp_path):
    with experiment_lock(tmp_path):
        remove_left_lock(tmp_path)
        assert is_locked(tmp_path)
    (tmp_path / ".lock").mkdir()  # and what is no lock is somebody's
    remove_left_lock(tmp_path)
    assert (tmp_path / ".lock").is_dir()


def test_folders_are_kept_for_readers_and_only_while_they_read(tmp_path):
    num_open = len(os.listdir("/proc/self/fd"))
    (tmp_path / "file").touch()
    with kept_folders([tmp_path, tmp_path / "nothing", tmp_path / "file"]), ExitStack() as another:
        another.enter_context(kept_folders([tmp_path]))
        assert is_kept(tmp_path)
        staying = another.pop_all()
    assert is_kept(tmp_path)  # for the other, who came later and is still there
    staying.close()
    assert not is_kept(tmp_path)
    assert not is_kept(tmp_path / "nothing")
    with same_folder(tmp_path):
        pass
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_commands_that_train_lock_what_they_write_and_wait_for_the_folder_of_all(cli, tmp_path, monkeypatch):
    from dwiml_func.cli import _several, _training, evaluate
    from dwiml_func.cli import train as train_command

    locked: list[tuple[str, bool]] = []

    def spy(directory: str | Path, *, wait: bool = False) -> Any:
        locked.append((str(Path(directory).relative_to(tmp_path)), wait))
        return experiment_lock(directory, wait=wait)

    for module in (_several, _training, evaluate, train_command):
        monkeypatch.setattr(module, "experiment_lock", spy)
    data = Path(__file__).parent / "data" / "phantom.hdf5"
    shutil.copy(data, tmp_path / "example_data.hdf5")
    tiny = ("--rnn-layer-sizes", 2, "--batch-size-training", 90, "--max-epochs", 1, "-q", "--skip-figures")

    def locks(*arguments: object) -> list[tuple[str, bool]]:
        locked.clear()
        outcome = cli(*arguments)
        assert outcome.code in (0, 142), outcome.err
        return list(locked)

    train = ("train", tmp_path, "run", data, *tiny)
    assert locks(*train) == [(".", True), ("run", False)]
    assert locks(*train) == locks("resume", tmp_path, "run", "--new-max-epochs", 2) == [("run", False)]
    assert locks("fork", tmp_path / "run", "new", "--max-epochs", 3) == [(".", True), ("new", False)]
    assert locks("evaluate", tmp_path / "run", "--write") == [("run", False)]
    plain = ("--monitor", "loss", "--skip-window-lag", "--stop-after", "0s")
    assert locks("train", tmp_path, "example", *tiny, *plain)[0] == (".", True)
    locked_members = [("two", False), ("two/0", False), ("two/1", False)]
    two = ("train", tmp_path, "two", data, *tiny, "--num-models", 2)
    assert locks(*two, "--stop-after", "0s") == [(".", True), *locked_members]
    assert locks(*two) == locked_members
    swept = locks("train", tmp_path, "all", data, *tiny, "--sweep", "dg-dropout=0.1", "--stop-after", "0s")
    assert swept == [(".", True), ("all", True), ("all/dg-dropout=0.1", False)]


@pytest.mark.parametrize("rank", [0, 1])
def test_of_joined_processes_the_first_holds_the_locks(rank: int, tmp_path: Path, monkeypatch) -> None:
    """It alone looks whether the experiment is there, removes what a kill left, and makes the experiment."""
    done: list[Any] = []

    @contextmanager
    def lock(directory: Path, *, wait: bool = False) -> Iterator[None]:
        done.append((directory.name, wait))
        yield
        done.append(directory.name)

    group: Any = SimpleNamespace(rank=rank, gather=lambda values: [bool(values)])
    monkeypatch.setattr(_training, "experiment_lock", lock)
    monkeypatch.setattr(_training, "remove_left_lock", lambda directory: done.append(f"left in {directory.name}"))
    monkeypatch.setattr(_training, "rank_zero_first", lambda *_: "resumed")
    run = tmp_path / "all" / "run"
    with _training.created(run, group, lambda: done.append("created")):
        done.append("trained")
    made = [("all", True), "created", "all", ("run", False), "trained", "run"]
    assert done == (made if rank == 0 else ["trained"])

    done.clear()
    with _training.resumed_run(run, group) as resumed:
        done.append(resumed)
    assert done == (["left in all", ("run", False), "resumed", "run"] if rank == 0 else ["resumed"])

    run.mkdir(parents=True)
    new: Any = lambda *_: SimpleNamespace(as_new=lambda: SimpleNamespace(config=None))  # noqa: E731
    monkeypatch.setattr(_training, "prepare", new)
    monkeypatch.setattr(_training, "create_experiment", lambda *_: None)
    with _training.new_run(run.parent, "run", new, group) as (*_, last):
        assert last == ("d" if rank == 0 else ())  # the last of "resumed": the first process has found it
