"""Commands make the folders above what they write; when they fail, they leave none of them behind."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

import pytest

from dwiml_func.cli._output import (
    drop_unwritable_output,
    enduring_output,
    folders_above,
    new_folder,
    open_standard_streams,
)
from dwiml_func.cli.main import main

DATA = Path(__file__).parent / "data"


def test_the_model_commands_make_missing_folders(cli, tmp_path: Path) -> None:
    model, exported = tmp_path / "models" / "imported", tmp_path / "exported" / "today" / "best_model"
    assert cli("import-dwi-ml", DATA / "cos", model).code == 0
    outcome = cli("export-dwi-ml", model, exported)
    assert (outcome.code, outcome.out) == (0, f"{exported}\n")
    assert sorted(path.name for path in exported.iterdir()) == ["model_state.pkl", "model_type.txt", "parameters.json"]


def test_plot_makes_missing_folders(cli, experiments: Path, tmp_path: Path) -> None:
    out = tmp_path / "plots" / "today" / "runs.svg"
    assert cli("plot", experiments / "run", "--out", out).code == 0
    assert out.stat().st_size > 0


def test_a_command_that_fails_leaves_no_folder(cli, tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep"
    cli("import-dwi-ml", DATA / "no", out / "model").check_refusal("is not a folder")
    cli("export-dwi-ml", DATA / "no", out / "model").check_refusal("is not a folder")
    assert list(tmp_path.iterdir()) == []


def test_existing_and_non_empty_folders_are_kept_when_the_block_fails(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()

    def fail() -> None:
        with folders_above(tmp_path / "old" / "kept" / "gone" / "a.txt"):
            (tmp_path / "old" / "kept" / "b.txt").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in (tmp_path / "old").rglob("*")] == ["kept", "b.txt"]


def test_an_obstacle_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(ValueError, match=f"{name}' exists"), new_folder(str(tmp_path / name)):
            pass
        with pytest.raises(ValueError, match=f"{name}' is not a folder"), new_folder(str(tmp_path / name / "a" / "b")):
            pass


def test_what_a_full_disk_did_not_take_is_dropped_and_comes_out_nowhere_later(tmp_path: Path, monkeypatch) -> None:
    kept = os.dup(1)
    try:
        with Path("/dev/full").open("w") as full:
            os.dup2(full.fileno(), 1)
        stream = os.fdopen(1, "w", closefd=False)
        monkeypatch.setattr(sys, "stdout", stream)
        print("lost")
        error = drop_unwritable_output()
        assert error is not None
        assert error.errno == errno.ENOSPC
        with (tmp_path / "later.txt").open("w") as later:
            os.dup2(later.fileno(), 1)
        stream.close()
        assert (tmp_path / "later.txt").read_text() == ""
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def test_output_that_cannot_be_written_is_dropped_with_one_warning(tmp_path: Path, monkeypatch) -> None:
    kept = os.dup(1), os.dup(2)
    try:
        with Path("/dev/full").open("w") as full, (tmp_path / "err").open("w") as errors:
            os.dup2(full.fileno(), 1)
            os.dup2(errors.fileno(), 2)
        for number, name in ((1, "stdout"), (2, "stderr")):
            monkeypatch.setattr(sys, name, os.fdopen(number, "w", closefd=False))
        with enduring_output():
            print("lost")
            print("lost", file=sys.stderr)
            print("lost")
        reason = "dwiml-func: warning: standard output cannot be written to (No space left on device)"
        assert (tmp_path / "err").read_text().splitlines() == [f"{reason}. Training continues.", "lost"]
        with Path("/dev/full").open("w") as full:
            os.dup2(full.fileno(), 2)
        with (tmp_path / "out").open("w") as out, enduring_output():
            os.dup2(out.fileno(), 1)
            print("lost", file=sys.stderr)
            print("kept")
            assert (tmp_path / "out").read_text() == "kept\n"  # at once
        assert (tmp_path / "out").read_text() == "kept\n"
        for stream in (sys.stdout, sys.stderr):
            stream.close()
    finally:
        for number, other in zip((1, 2), kept, strict=True):
            os.dup2(other, number)
            os.close(other)


def test_a_stream_that_is_not_the_standard_one_is_left_as_it_is(tmp_path: Path, monkeypatch) -> None:
    with (tmp_path / "out").open("w") as out:
        for stream in (out, io.StringIO()):
            monkeypatch.setattr(sys, "stdout", stream)
            with enduring_output():
                assert sys.stdout is stream
            assert sys.stdout is stream


def test_a_standard_stream_that_is_closed_gets_the_null_device(monkeypatch) -> None:
    kept = os.dup(0)
    try:
        os.close(0)
        monkeypatch.setattr(sys, "stdin", None)
        open_standard_streams()
        assert os.fstat(0).st_rdev == os.stat(os.devnull).st_rdev
        assert os.get_inheritable(0)
        assert sys.stdin.read() == ""
        sys.stdin.close()
        monkeypatch.setattr(sys, "stderr", None)
        open_standard_streams()
        print("nothing", file=sys.stderr)
        sys.stderr.close()
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def test_a_name_that_the_terminal_lacks_is_printed_with_a_backslash(monkeypatch) -> None:
    binary = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(binary, encoding="ascii"))
    assert main(["--version"]) == 0
    print("é")
    sys.stdout.flush()
    assert binary.getvalue().endswith(b"\n\\xe9\n")


@pytest.mark.parametrize("name", ["model", "./a/../b/model"])
def test_relative_paths_start_in_the_current_folder(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with new_folder(name) as folder:
        folder.mkdir()
    assert Path(name).is_dir()


def test_what_a_kill_left_of_a_file_goes_when_it_is_written_again(tmp_path: Path) -> None:
    left = [tmp_path / f".dwiml-tmp-{name}.999999999-0123abcd" for name in ("a.json", "b.json")]  # no process has this
    for path in left:
        path.mkdir()
    with folders_above(tmp_path / "a.json"):
        assert [path.exists() for path in left] == [False, True]
