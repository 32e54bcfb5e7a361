"""Claims about faults: corruption is named and passed over; a full or closed disk costs no earlier checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_cases import latest_digest
from gated_run import check_same_end, gated, train_whole
from hypothesis import given, settings
from hypothesis import strategies as st
from preloaded import Fork, finished, start_program

from dwiml_func import TrainState, adam, init_state
from dwiml_func.checkpoint import checkpoint as checkpoint_io
from dwiml_func.checkpoint.background import AsyncCheckpointer
from dwiml_func.checkpoint.checkpoint import newest, restore, save
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.manifest import CorruptError
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.model_store import load_model


def run_at(epoch: int) -> TrainState:
    generator = torch.Generator().manual_seed(epoch)
    state = init_state(torch.nn.Linear(20, 10), adam(), seed=3)
    params = {name: torch.randn(p.shape, generator=generator) for name, p in state.params.items()}
    return state.replace(params=params, epoch=epoch, step=7 * epoch)


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("faults") / "run"
    for epoch in (1, 2):
        save(directory, run_at(epoch), config={"epochs": epoch})
    return directory


@pytest.fixture
def corrupt(two_epochs: Path, tmp_path: Path) -> Path:
    """A copy to corrupt: the directory of the newest checkpoint."""
    return Path(shutil.copytree(two_epochs, tmp_path / "run")) / "checkpoint" / "2"


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def check_named(error: CorruptError, checkpoint: Path) -> None:
    assert str(error).startswith(f"{checkpoint} ")
    assert "\n" not in str(error)


def check_passed_over(checkpoint: Path) -> None:
    """The checkpoint is refused by name, and the one before is restored as it was."""
    directory = checkpoint.parent.parent
    with pytest.raises(CorruptError) as raised:
        restore(directory, run_at(0))
    check_named(raised.value, checkpoint)
    found = newest(directory, like=run_at(0))
    assert found is not None
    assert (found.name, list(found.corrupt), found.config) == ("1", ["2"], {"epochs": 1})
    assert state_digest(found.state) == state_digest(run_at(1))
    with pytest.raises(CorruptError):
        latest_digest(directory)


def check_refused_or_harmless(checkpoint: Path) -> None:
    """The checkpoint is refused by name, or nothing that is needed was changed."""
    try:
        state = restore(checkpoint.parent.parent, run_at(0)).state
    except CorruptError as error:
        check_named(error, checkpoint)
    else:
        assert state_digest(state) == state_digest(run_at(2))


FAULTS: dict[str, Callable[[Path, bytes], object]] = {
    "empty": lambda file, content: file.write_bytes(b""),
    "cut short": lambda file, content: file.write_bytes(content[:-1]),
    "longer": lambda file, content: file.write_bytes(content + b"\0"),
    "gone": lambda file, content: file.unlink(),
    "a folder": lambda file, content: (file.unlink(), file.mkdir()),
}


def test_each_file_cut_short_or_gone_is_refused_or_harmless(corrupt, capfd):
    """Files of arrays that are cut short or empty are noticed too, see test_arrays.py."""
    assert len(files_of(corrupt)) > 5
    for file in files_of(corrupt):
        content, is_array = file.read_bytes(), "leaves" in file.parts
        for fault in list(FAULTS)[2 if is_array else 0 :]:
            FAULTS[fault](file, content)
            check_refused_or_harmless(corrupt)
            if file.is_dir():
                file.rmdir()
            file.write_bytes(content)
    assert state_digest(restore(corrupt.parent.parent, run_at(0)).state) == state_digest(run_at(2))
    assert capfd.readouterr().err == ""  # orbax's threads would print tracebacks


@settings(max_examples=20)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_refused_or_harmless(two_epochs, data, tmp_path_factory):
    newest = two_epochs / "checkpoint" / "2"
    file = data.draw(st.sampled_from(files_of(newest)), "file")
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1) | st.sampled_from([0, len(content) - 1]), "place")
    content[place] ^= 1 << data.draw(st.integers(0, 7), "bit")
    copy = Path(shutil.copytree(two_epochs, tmp_path_factory.mktemp("flip") / "run")) / "checkpoint" / "2"
    (copy / file.relative_to(newest)).write_bytes(content)
    check_refused_or_harmless(copy)


def test_a_missing_folder_of_leaves_and_an_empty_checkpoint_are_passed_over(corrupt):
    shutil.rmtree(corrupt / "leaves")
    check_passed_over(corrupt)
    shutil.rmtree(corrupt)
    corrupt.mkdir()
    check_passed_over(corrupt)


def test_when_all_are_corrupt_each_is_named(corrupt):
    for name in ("1", "2"):
        (corrupt.parent / name / "manifest.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"checkpoint/2 is corrupt.*checkpoint/1 is corrupt"):
        newest(corrupt.parent.parent, like=run_at(0))


def test_a_checkpoint_under_another_name_is_noticed(corrupt):
    """A copy under a later name would be what every resume continues from, whatever was trained since."""
    directory = corrupt.parent.parent
    shutil.copytree(corrupt, corrupt.with_name("9"))
    with pytest.raises(CorruptError, match="checkpoint/9 is corrupt: what it holds was saved as 2"):
        restore(directory, run_at(0))
    found = newest(directory, like=run_at(0))
    assert found is not None
    assert (found.name, list(found.corrupt)) == ("2", ["9"])
    assert newest(directory) is not None


def test_a_checkpoint_that_a_training_run_removes_while_it_is_read_is_not_corrupt(corrupt, monkeypatch):
    """As `fork` reads what another process trains: what was the newest goes, and a newer one is there by then."""
    directory, load = corrupt.parent.parent, checkpoint_io.load_leaves

    def load_meanwhile(path: Path, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        if path.name == "2":
            save(directory, run_at(3), config={"epochs": 3}, keep=1)
        return load(path, manifest)

    monkeypatch.setattr(checkpoint_io, "load_leaves", load_meanwhile)
    found = newest(directory, like=run_at(0))
    assert found is not None
    assert (found.name, list(found.corrupt), found.config) == ("3", [], {"epochs": 3})
    assert state_digest(found.state) == state_digest(run_at(3))


def test_files_swapped_between_two_checkpoints_are_noticed(corrupt):
    for file in files_of(corrupt):
        other = corrupt.parent / "1" / file.relative_to(corrupt)
        if file.name == "manifest.json" or not other.is_file() or other.read_bytes() == file.read_bytes():
            continue
        content = file.read_bytes()
        shutil.copy(other, file)
        check_refused_or_harmless(corrupt)
        file.write_bytes(content)
    shutil.copy(corrupt.parent / "1" / "manifest.json", corrupt / "manifest.json")
    with pytest.raises(CorruptError, match="checkpoint/2 is corrupt"):
        restore(corrupt.parent.parent, run_at(0))


def test_a_best_model_with_any_file_corrupt_does_not_load_or_is_as_it_was(experiments):
    model = experiments / "run" / "best_model"
    before, noticed = load_model(model).module.state_dict(), 0
    for file in files_of(model):
        content = file.read_bytes()
        for variant in (content[: len(content) // 2], None):
            if variant is None:
                file.unlink()
            else:
                file.write_bytes(variant)
            try:
                after = load_model(model).module.state_dict()
            except (CorruptError, FileNotFoundError) as error:
                noticed += str(model) in str(error)
            else:
                assert all(torch.equal(before[name], value) for name, value in after.items())
        file.write_bytes(content)
    assert noticed > 8


FULL = """
import resource, signal, sys, warnings
warnings.simplefilter("error")
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from test_checkpoint_faults import run_at
from dwiml_func.checkpoint import arrays as arrays
from dwiml_func.checkpoint.background import AsyncCheckpointer
if sys.argv[4] == "unreserved":
    arrays._reserve = lambda directory, num_bytes: None
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[3])
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
checkpointer = AsyncCheckpointer(sys.argv[1])
checkpointer.save(run_at(3))
try:
    checkpointer.save(run_at(4))
except OSError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)  # standard output is a file too
    print(error)
"""
"""Saves twice in the background where no file may be longer than a limit; prints the error of the first."""


def save_on_full_disk(directory: Path, limit: int, kind: str) -> Fork:
    return finished(start_program(FULL, directory, Path(__file__).parent, limit, kind))


def check_untouched(directory: Path) -> None:
    assert list_checkpoints(directory) == ["1", "2"]
    assert sorted(entry.name for entry in (directory / "checkpoint").iterdir()) == ["1", "2"]
    assert state_digest(restore(directory, run_at(0)).state) == state_digest(run_at(2))


@pytest.mark.parametrize("limit", [1, 1000, 5000, 100_000])
def test_a_disk_that_fills_up_costs_nothing_that_was_there(two_epochs, tmp_path, limit):
    directory = Path(shutil.copytree(two_epochs, tmp_path / "run"))
    done = save_on_full_disk(directory, limit, "reserved")
    assert (done.returncode, done.err) == (0, "")
    assert done.out == f"[Errno 27] File too large: '{directory}/checkpoint/3'\n"
    check_untouched(directory)


@pytest.mark.parametrize("limit", [1, 100, 500, 1000])
def test_a_disk_that_fills_up_in_the_middle_costs_nothing_either(two_epochs, tmp_path, limit):
    directory = Path(shutil.copytree(two_epochs, tmp_path / "run"))
    done = save_on_full_disk(directory, limit, "unreserved")
    assert (done.returncode, done.err) == (0, "")  # orbax's own threads would tell of it at length
    (line,) = done.out.splitlines()
    assert line.startswith("[Errno 27] ")
    assert f"{directory}/checkpoint/3" in line or f"{directory}/checkpoint/.dwiml-tmp-3." in line
    check_untouched(directory)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("disks cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_small_disk_runs_full_and_goes_on_when_there_is_room(small_disk):
    save(small_disk / "run", run_at(1))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 20_000))
    with AsyncCheckpointer(small_disk / "run") as checkpointer:
        checkpointer.save(run_at(2))
        with pytest.raises(OSError, match=r"No space left on device: '.*/run/checkpoint/2'"):
            checkpointer.wait()
        assert [entry.name for entry in (small_disk / "run" / "checkpoint").iterdir()] == ["1"]
        assert state_digest(restore(small_disk / "run", run_at(0)).state) == state_digest(run_at(1))
        filler.unlink()
        checkpointer.save(run_at(3))
    assert state_digest(restore(small_disk / "run", run_at(0)).state) == state_digest(run_at(3))


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "checkpoint").touch()
    with pytest.raises(FileExistsError, match="checkpoint"):
        save(tmp_path, run_at(1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


READ_ONLY = """
import contextlib, io, sys
from dwiml_func.cli.main import main
for line in sys.stdin.read().splitlines():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(line.split())
    print(code, err.getvalue().strip().replace("\\n", " | "))
"""
"""Runs a command for each line; prints its exit code and what it wrote to standard error."""


def without_roots_powers() -> list[str]:
    """A prefix for commands that makes root as bound by the permissions of files as anybody."""
    prefix = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        try:
            done = subprocess.run([*prefix, "touch", f"{folder}/file"], check=False, capture_output=True)
        except FileNotFoundError:
            pytest.skip("root cannot lay down its powers here")
        if done.returncode == 0:
            pytest.skip("permissions of files do not bind here")
    return prefix


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    folders = [folder, *(entry for entry in folder.rglob("*") if entry.is_dir())]
    for entry in folders:
        entry.chmod(0o555)
    try:
        yield
    finally:
        for entry in folders:
            entry.chmod(0o755)


def test_in_a_folder_that_cannot_be_written_to_what_writes_is_refused_in_one_line_and_what_reads_works(experiments):
    run, data = experiments / "run", read_config(experiments / "run").hdf5_file
    writing = [f"train {experiments} new {data}", f"resume {experiments} run --new-patience 9"]
    reading = [f"digest {run}", f"verify {run}", f"diff {run} {run}", f"evaluate {run} {data}"]
    before = {path: path.read_bytes() for path in experiments.rglob("*") if path.is_file()}
    with read_only(experiments):
        done = subprocess.run(
            [*without_roots_powers(), sys.executable, "-c", READ_ONLY],
            input="\n".join([*writing, *reading]),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == f"2 dwiml-func train: [Errno 13] Permission denied: '{experiments}/.lock'"
    assert lines[1] == f"2 dwiml-func resume: [Errno 13] Permission denied: '{run}/.lock'"
    assert lines[2:] == ["0 "] * len(reading)
    assert {path: path.read_bytes() for path in experiments.rglob("*") if path.is_file()} == before


def test_when_the_folder_of_checkpoints_is_closed_the_run_stops_with_an_error_and_resumes_bitwise(
    cli, tmp_path, tmp_path_factory
):
    checkpoint = tmp_path / "run" / "checkpoint"
    options = ("--checkpoint-every", "1batches")
    with gated(tmp_path, "step", 6, *options, prefix=without_roots_powers()) as process:
        process.wait_until(lambda: list_checkpoints(tmp_path / "run")[-1] == "1-1")
        with read_only(checkpoint):  # not within a save, where tensorstore's threads have their own words
            code, _, err = process.end(through_gate=True)
    assert code == 2
    assert f"[Errno 13] Permission denied: '{checkpoint}/" in err  # and of a second save that failed too
    assert "Traceback" not in err
    assert list_checkpoints(tmp_path / "run")[-1] == "1-1"
    assert cli("resume", tmp_path, "run", "--checkpoint-every", "1epoch").code == 0
    check_same_end(tmp_path / "run", train_whole(tmp_path_factory.mktemp("whole")))


@pytest.mark.soak
def test_a_run_on_a_full_disk_stops_with_an_error_and_resumes_to_the_same_digest(experiments):
    """The run of the fixture had stopped early, so that it can be resumed."""

    def resume(directory: Path, limit: int | None) -> Fork:
        code = "import resource, signal, sys; from dwiml_func.cli.main import main\n"
        if limit is not None:
            code += (
                "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); _, most = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
            )
            code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, most))\n"
        code += "sys.exit(main(sys.argv[1:]))"
        options = ("--new-patience", "9", "--new-max-epochs", "5")
        return finished(start_program(code, "resume", directory, "run", *options))

    whole = Path(shutil.copytree(experiments, experiments.parent / "whole"))
    assert resume(whole, None).returncode == 0
    for limit in (3000, 12_000):
        newest = list_checkpoints(experiments / "run")[-1]
        stopped = resume(experiments, limit)
        assert stopped.returncode != 0
        assert "File too large" in stopped.err.splitlines()[-1]
        assert list_checkpoints(experiments / "run")[-1] == newest
        left = [path for path in experiments.rglob(".*") if path.name.startswith((".tmp", ".old"))]
        assert left == []
    assert resume(experiments, None).returncode == 0
    assert latest_digest(experiments / "run") == latest_digest(whole / "run")
