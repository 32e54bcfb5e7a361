"""Claims about provenance: a checkpoint names the source, the commit and the packages that computed it."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from preloaded import run_program

import dwiml_func
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
"""The package is imported anew, from the folder in which the program runs."""


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


def test_what_an_earlier_version_did_not_record_is_no_difference():
    now = environment()
    earlier = {name: value for name, value in now.items() if name not in ("source", "git", "packages")}
    assert environment_differences(earlier, now) == []
    assert environment_differences(now, {**now, "packages": {}}) != []
