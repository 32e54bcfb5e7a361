"""Claims about provenance: a checkpoint names the source, the commit and the packages that computed it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import torch

from dwiml_func.checkpoint.provenance import environment, environment_differences

PACKAGE = Path(__file__).parent.parent / "dwiml_func"
PROGRAM = "import json; from dwiml_func.checkpoint.provenance import environment; print(json.dumps(environment()))"


def in_folder(folder: Path) -> dict[str, object]:
    import json

    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def git(folder: Path, *command: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", *identity, *command], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_packages_that_compute_are_named_by_what_they_installed():
    record = Path(str(distribution("torch").locate_file(f"torch-{torch.__version__}.dist-info/RECORD")))
    packages = environment()["packages"]
    assert packages["torch"] == hashlib.sha256(record.read_text().encode()).hexdigest()
    assert packages["numpy"] != packages["torch"]


def test_a_checkout_is_named_by_its_commit_and_a_change_shows_in_commit_and_source(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
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
