"""Claims about imports: the package costs little more than torch, and one module knows each changing package."""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import dwiml_func

ROOT = Path(dwiml_func.__file__).parent
HEAVY = {"jax", "orbax", "comet_ml", "dipy", "h5py", "nibabel", "matplotlib", "scipy", "tqdm", "tyro"}
OUTER = ("data", "models", "writers", "cli", "experiment")


@cache
def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


STATEMENTS = ("import dwiml_func", "from dwiml_func import *", "import dwiml_func.writers", "import dwiml_func.data")


@cache
def fresh_modules() -> dict[str, list[str]]:
    """What is in `sys.modules` after torch, and after each of these statements, one after the other."""
    code = "import json, sys\nloaded = {}\n"
    for statement in ("import torch", *STATEMENTS):
        code += f"{statement}\nloaded[{statement!r}] = sorted(sys.modules)\n"
    code += "print(json.dumps(loaded))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize("statement", STATEMENTS)
def test_the_package_loads_nothing_heavy(statement):
    loaded = fresh_modules()
    packages = {name.partition(".")[0] for name in set(loaded[statement]) - set(loaded["import torch"])}
    assert "dwiml_func" in packages
    assert not packages & HEAVY
    with_torch = {name.partition(".")[0] for name in loaded[statement]}
    assert not with_torch & (HEAVY - {"tqdm"})  # torch itself takes tqdm where it is installed


def test_the_package_loads_the_core_only():
    loaded = fresh_modules()["import dwiml_func"]
    outer = [name for name in loaded if name.startswith(tuple(f"dwiml_func.{package}" for package in OUTER))]
    assert not outer


@pytest.mark.parametrize("package", ["orbax", "comet_ml", "jax"])
def test_one_module_at_most_knows_a_changing_package(package):
    importers = [
        path.relative_to(ROOT).as_posix()
        for path in sorted(ROOT.rglob("*.py"))
        if any(name.partition(".")[0] == package for name in imported_modules(path))
    ]
    assert len(importers) <= 1, f"{package} is imported by {importers}"
