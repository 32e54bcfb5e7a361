"""Claims about the installation: the package is found beside its own clone, and a wheel holds all of it."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import dwiml_func

ROOT = Path(__file__).parents[1]


def run(*command: object, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the last commit, in a folder that is called `dwiml_func`."""
    above = tmp_path_factory.mktemp("above")
    run("git", "clone", "--quiet", "--depth=1", f"file://{ROOT}", "dwiml_func", folder=above)
    return above / "dwiml_func"


def test_above_its_clone_the_package_is_found_after_an_editable_install(clone: Path, tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=False)
    python = tmp_path / "bin" / "python"
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    installed = {sysconfig.get_path("purelib"), *site.getsitepackages()}  # torch and pip, without their .pth files
    (packages / "installed.pth").write_text("\n".join(installed))
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run(python, "-m", "pip", "install", *options, "--editable", clone, folder=tmp_path)

    above = clone.parent
    code = "import dwiml_func; from dwiml_func import adam; print(dwiml_func.__file__)"
    assert run(python, "-c", code, folder=above) == f"{clone / 'dwiml_func' / '__init__.py'}\n"
    version = f"{dwiml_func.__version__}\n"
    torchrun = (python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")  # starts `python -u -m`
    assert run(*torchrun, "-m", "dwiml_func", "--version", folder=above) == version
    assert run(tmp_path / "bin" / "dwiml-func", "--version", folder=above) == version


def test_wheel_and_sdist_hold_every_module_the_types_and_the_license(clone: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "hatchling", "build", "-d", tmp_path, folder=clone)
    files = {path.relative_to(clone).as_posix() for path in (clone / "dwiml_func").rglob("*") if path.is_file()}
    files = {name for name in files if not name.endswith(".pyc")}
    assert "dwiml_func/py.typed" in files
    (wheel,) = tmp_path.glob("*.whl")
    info = f"dwiml_func-{dwiml_func.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path)
    assert {name for name in names if not name.startswith(info)} == files
    metadata = PathDistribution(tmp_path / info)
    assert (metadata.version, metadata.metadata["License-Expression"]) == (dwiml_func.__version__, "MIT")
    assert f"{info}/licenses/LICENSE" in names
    scripts = {script.name: script.value for script in metadata.entry_points if script.group == "console_scripts"}
    assert scripts == {
        "dwiml-func": "dwiml_func.cli.main:main",
        "resume_training_from_checkpoint": "dwiml_func.cli.main:resume_training_from_checkpoint",
    }
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    assert files | {"LICENSE", "README.md", "pyproject.toml"} <= members
