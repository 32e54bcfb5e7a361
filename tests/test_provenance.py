"""Claims about provenance: a checkpoint names the source, the commit and the packages that computed it."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preloaded import run_program

import dwiml_func
from dwiml_func.checkpoint import provenance
from dwiml_func.checkpoint.provenance import environment, environment_differences

PACKAGE = Path(__file__).parent.parent / "dwiml_func"
PROGRAM = """
import json, sys
for name in [name for name in sys.modules if name.partition(".")[0] == "dwiml_func"]:
    del sys.modules[name]
sys.path.insert(0, "")
from dwiml_func.checkpoint.provenance import environment
print(json.dumps(environment()))
"""
"""The package is imported again, from the folder in which the program runs."""


def in_folder(folder: Path) -> dict[str, object]:
    return json.loads(run_program(PROGRAM, folder=folder))


def git(folder: Path, *command: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", *identity, *command], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_packages_that_compute_are_named_by_what_they_installed():
    (record,) = Path(torch.__file__).parents[1].glob("torch-*.dist-info/RECORD")
    packages = environment()["packages"]
    assert packages["torch"] == hashlib.sha256(record.read_text().encode()).hexdigest()
    assert packages["numpy"] != packages["torch"]


def test_all_that_bits_depend_on_is_recorded():
    recorded = environment(["cuda:0", "cpu", "cpu"])
    assert {name: value for name, value in recorded.items() if name not in ("source", "packages", "git", "cpu")} == {
        "dwiml_func": dwiml_func.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "orbax-checkpoint": version("orbax-checkpoint"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "devices": ["cpu", "cuda:0"],
    }
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):  # by their places, so that a module that was moved counts
        line = f"{path.relative_to(PACKAGE).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
        digest.update(line.encode())
    assert recorded["source"] == digest.hexdigest()
    if Path("/proc/cpuinfo").is_file() and "model name" in Path("/proc/cpuinfo").read_text():
        assert f": {recorded['cpu']}\n" in Path("/proc/cpuinfo").read_text()


def test_every_difference_is_told_with_both_values_and_only_what_came_later_is_left_out():
    recorded, now = {"torch": "2.12.0", "cpu": "a", "gone": 1}, {"torch": "2.13.0", "cpu": "a", "new": 2, "git": "c"}
    assert environment_differences(recorded, now) == [
        "gone: 1, now None",
        "new: None, now 2",
        "torch: '2.12.0', now '2.13.0'",
    ]


def test_a_checkout_is_named_by_its_commit_and_a_change_shows_in_commit_and_source(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "dwiml_func", ignore=shutil.ignore_patterns("__pycache__"))
    without_git = in_folder(tmp_path)
    assert "git" not in without_git
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "dwiml_func", ":!dwiml_func/py.typed", ":!*/__pycache__/*")
    git(tmp_path, "commit", "-qm", "a")
    (tmp_path / "notes.txt").write_text("not of the package")
    (tmp_path / ".gitignore").write_text("__pycache__\ndwiml_func/py.typed\n")
    committed = in_folder(tmp_path)
    assert committed == without_git | {"git": git(tmp_path, "rev-parse", "HEAD")}
    with (tmp_path / "dwiml_func" / "types.py").open("a") as file:
        file.write("# changed\n")
    changed = in_folder(tmp_path)
    assert changed["git"] == f"{committed['git']} changed"
    assert changed["source"] != committed["source"] == environment()["source"]
    assert [text.split(":")[0] for text in environment_differences(committed, changed)] == ["git", "source"]


@pytest.mark.parametrize(
    ("status", "told"), [("", "c0ffee"), (" M dwiml_func/types.py\n", "c0ffee changed"), (OSError(), None)]
)
def test_git_is_asked_in_the_folder_of_the_package_and_given_ten_seconds(status, told, tmp_path, monkeypatch):
    asked = []

    def answer(command: list[str], **options: Any) -> Any:
        asked.append(command)
        assert options == {"capture_output": True, "text": True, "check": True, "timeout": 10}
        if isinstance(status, Exception):
            raise status
        return subprocess.CompletedProcess(command, 0, "c0ffee\n" if "rev-parse" in command else status)

    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path / "dwiml_func")
    monkeypatch.setattr(provenance.subprocess, "run", answer)
    ask = provenance._git_commit.__wrapped__
    assert (ask(), asked) == (None, [])  # no checkout
    (tmp_path / ".git").touch()  # a worktree has a file
    assert ask() == told
    at = ["git", "-C", str(tmp_path)]
    commands = [[*at, "rev-parse", "HEAD"], [*at, "status", "--porcelain", "--", "dwiml_func"]]
    assert asked == commands[: 1 if told is None else 2]


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(1, "git"), subprocess.TimeoutExpired("git", 10)])
def test_a_git_that_fails_is_no_error(error, tmp_path, monkeypatch):
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path / "dwiml_func")
    monkeypatch.setattr(provenance.subprocess, "run", fail)
    assert provenance._git_commit.__wrapped__() is None


def test_a_processor_and_a_package_that_are_not_known_are_no_errors(monkeypatch):
    assert provenance._record_digest.__wrapped__("no-such-package-of-dwiml") is None
    known = {"model name\t: A & B  \n": "A & B", "x\nmodel name : C\nmodel name : D\n": "C", "vendor: E\n": "F"}
    monkeypatch.setattr(platform, "processor", lambda: "F")
    for text, name in known.items():
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        assert provenance._cpu_model.__wrapped__() == name

    def no_file(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", no_file)
    assert provenance._cpu_model.__wrapped__() == "F"


def test_what_an_earlier_version_did_not_record_is_no_difference():
    now = environment()
    earlier = {name: value for name, value in now.items() if name not in ("source", "git", "packages")}
    assert environment_differences(earlier, now) == []
    assert environment_differences(now, {**now, "packages": {}}) != []
