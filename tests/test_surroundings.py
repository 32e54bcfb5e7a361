"""Claims about a hostile environment: closed and full output, long names, links, leftovers, bombs."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from experiment_cases import PHANTOM, contents, latest_digest
from preloaded import COMMAND, start_program

from dwiml_func.checkpoint.arrays import load_leaves, save_leaves
from dwiml_func.checkpoint.manifest import CorruptError
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.experiment.pretrained import read_tensors
from dwiml_func.files.atomic import atomic_write, remove_leftovers, temporary_beside

OPTIONS = ("--rnn-layer-sizes", 4, "--batch-size-training", 96, "--batch-size-validation", 48, "--max-epochs", 1)
CLOSED = "import os, sys; os.close({0}); sys.{1} = None\n"
FULL = "import os, sys; os.dup2(os.open('/dev/full', os.O_WRONLY), {0})\n"
PIPE = "import os, sys; ends = os.pipe(); os.dup2(ends[1], {0}); os.close(ends[1]); os.close(ends[0])\n"
STREAMS = {"stdout": (1, "stdout"), "stderr": (2, "stderr")}


def run(program: str, *arguments: object) -> tuple[int, str]:
    """Run a command after a program has spoilt its streams; returns its code, and what it still printed."""
    process = start_program(program + COMMAND, *arguments)
    code = process.wait(300)
    return code, process.out + process.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dwiml_func.cli.main import main

    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", str(folder), "run", str(PHANTOM), *map(str, OPTIONS)]) == 0
    return folder / "run"


@pytest.fixture
def experiment(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize(
    ("spoilt", "streams"),
    [(CLOSED, ("stdout",)), (PIPE, ("stdout",)), (CLOSED, ("stdout", "stderr")), (FULL, ("stdout", "stderr"))],
    ids=["closed", "pipe", "both closed", "both full"],
)
def test_output_that_cannot_be_written_ends_no_training(trained, tmp_path, spoilt, streams):
    program = "".join(spoilt.format(*STREAMS[name]) for name in streams)
    code, printed = run(program, "train", tmp_path, "run", PHANTOM, *OPTIONS)
    assert (code, "Traceback" in printed, "Exception" in printed) == (0, False, False)
    assert latest_digest(tmp_path / "run") == latest_digest(trained)
    assert (tmp_path / "run" / "plots" / "training.png").is_file()


@pytest.mark.parametrize(
    ("spoilt", "code", "told"),
    [(CLOSED, 0, ""), (PIPE, 141, ""), (FULL, 2, "[Errno 28] No space left on device")],
    ids=["closed", "pipe", "full"],
)
def test_a_command_whose_output_cannot_be_written_ends_without_a_traceback(trained, spoilt, code, told):
    found, printed = run(spoilt.format(*STREAMS["stdout"]), "runs", trained.parent)
    assert (found, printed.strip().removeprefix("dwiml-func runs: ")) == (code, told)


@pytest.mark.parametrize("spoilt", [CLOSED, FULL])
def test_an_error_that_cannot_be_told_is_still_an_exit_code(tmp_path, spoilt):
    assert run(spoilt.format(*STREAMS["stderr"]), "runs", tmp_path / "nothing") == (2, "")


def test_a_file_never_takes_the_number_of_a_closed_stream(tmp_path):
    """What is printed would be written into it."""
    program = "import os, sys; os.close(1); os.close(2); sys.stdout = sys.stderr = None\n"
    look = "import dwiml_func.cli.runs as runs\nruns.list_runs = lambda path: sys.exit(2 * (os.path.samestat("
    look += "os.fstat(1), os.stat(os.devnull)) and os.path.samestat(os.fstat(2), os.stat(os.devnull))))\n"
    assert run(program + look, "runs", tmp_path)[0] == 2


@pytest.mark.parametrize("name", ["x" * 255, "\u00e9" * 127], ids=["ascii", "two bytes"])
def test_names_are_as_long_as_the_file_system_takes(cli, tmp_path, trained, name):
    assert cli("train", tmp_path, name, PHANTOM, *OPTIONS).code == 0
    assert latest_digest(tmp_path / name) == latest_digest(trained)
    assert cli("evaluate", tmp_path / name, "--write").code == 0
    cli("train", tmp_path, "x" * 256, PHANTOM, *OPTIONS).check_refusal("File name too long")


def test_the_leftovers_of_a_long_name_are_those_of_that_name_alone(tmp_path):
    names = ["x" * 255, "x" * 254]
    for name in names:
        temporary = temporary_beside(tmp_path / name)
        temporary.with_name(f"{temporary.name.rpartition('.')[0]}.999999999-0123abcd").mkdir()  # of a killed process
    remove_leftovers(tmp_path, names[0])
    assert len(list(tmp_path.iterdir())) == 1
    atomic_write(tmp_path / names[0], "whole")
    remove_leftovers(tmp_path, names[1])
    assert [path.name for path in tmp_path.iterdir()] == [names[0]]


def test_what_a_killed_command_left_of_its_output_is_removed_by_the_next(cli, tmp_path, trained, monkeypatch):
    monkeypatch.setattr("dwiml_func.data.example.dataset.SUBJECTS", ("sub_1",))
    own = [tmp_path / f".dwiml-tmp-{name}.999999999-0123abcd" for name in ("d.hdf5", "figure.png")]
    others = [tmp_path / name for name in (".dwiml-tmp-e.hdf5.999999999-0123abcd", ".d.hdf5.mine", "notes.partial")]
    for path in (*own, *others):
        path.write_text("part")
    assert cli("plot", trained, "--out", tmp_path / "figure.png").code == 0
    assert cli("example-data", tmp_path / "d.hdf5").code == 0
    assert not any(path.exists() for path in own)
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("name", ["checkpoint", "logs", "best_model", "plots", "config.json", "logs/metrics.jsonl"])
def test_links_in_an_experiment_are_refused_for_writing(cli, experiment, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / Path(name).name
    (experiment / name).rename(target)
    (experiment / name).symlink_to(target)
    before = contents(tmp_path)
    for command in (("resume", tmp_path, "run", "--new-max-epochs", 2), ("evaluate", experiment, "--write")):
        cli(*command).check_refusal("Expected no links", str(experiment / name))
    assert contents(tmp_path) == before
    assert cli("digest", experiment).code == 0  # to read is free


def test_an_experiment_may_be_reached_by_a_link(cli, experiment, tmp_path):
    (tmp_path / "link").symlink_to(experiment)
    assert cli("resume", tmp_path, "link", "--new-max-epochs", 2).code == 0


def test_a_compressed_file_of_tensors_is_refused(cli, tmp_path):
    """A bomb: 64 MB of zeros in 64 kB."""
    torch.save({"weight": torch.zeros(1 << 24)}, tmp_path / "plain.pt")
    bomb = zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 17
    assert read_tensors(tmp_path / "plain.pt")["weight"].shape == (1 << 24,)
    with pytest.raises(ValueError, match=r"which is not compressed. Received: .*bomb.pt"):
        read_tensors(tmp_path / "bomb.pt")
    model = Path(shutil.copytree(PHANTOM.parent / "cos", tmp_path / "cos"))
    shutil.copy(tmp_path / "bomb.pt", model / "model_state.pkl")
    cli("import-dwi-ml", model, tmp_path / "model").check_refusal("which is not compressed", "model_state.pkl")


def test_tensors_that_are_larger_than_their_files_are_refused_before_they_take_memory(tmp_path):
    save_leaves(tmp_path / "a", {"weight": torch.zeros(1 << 20)}, {})
    for path in (tmp_path / "a" / "leaves").rglob("d/*"):
        path.write_bytes(b"")
    with pytest.raises(CorruptError, match=r"bytes for tensors of 4194304 bytes"):
        load_leaves(tmp_path / "a")


def declare_a_huge_volume(file: Any) -> None:
    group = file["subj0/input"]
    del group["data"]
    data = group.create_dataset("data", (1 << 14, 1 << 14, 1 << 10, 6), np.float32, chunks=(1, 1, 1, 6))
    data[0, 0, 0] = 1


def overlap_streamlines(file: Any) -> None:
    group = file["subj0/streamlines"]
    num_points, num = len(group["data"]), 100_000
    for name in ("offsets", "lengths"):
        del group[name]
    group["offsets"] = np.zeros(num, np.int64)
    group["lengths"] = np.full(num, num_points)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (declare_a_huge_volume, "chunks: the others were never written"),
        (overlap_streamlines, "overlapping streamlines"),
    ],
)
def test_data_that_are_larger_than_their_file_are_refused_before_they_take_memory(
    cli, tmp_path, spoil: Callable[[Any], None], told
):
    data = Path(shutil.copy(PHANTOM, tmp_path / "data.hdf5"))
    with h5py.File(data, "r+") as file:
        spoil(file)
    for lazy in (False, True):
        with pytest.raises(ValueError, match=told):
            open_dataset(data, lazy=lazy)
    done = cli("info", data)
    assert (done.code, told in done.out) == (1, True)


def test_secrets_that_a_server_echoes_are_masked(monkeypatch):
    pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_API_KEY", "my-secret-key")
    monkeypatch.setattr(sys, "argv", ["test"])
    from dwiml_func.writers._comet_process import _masked

    text = _masked("403: key my-secret-key is not valid; proxy http://me:pass@proxy.org:80/ refused")
    assert text == "403: key *** is not valid; proxy http://***@proxy.org:80/ refused"
    assert os.environ["COMET_API_KEY"] == "my-secret-key"
