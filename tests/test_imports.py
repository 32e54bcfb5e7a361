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


@cache
def fresh_modules(statement: str) -> dict[str, list[str]]:
    """What is in `sys.modules` after torch, and after a statement, in a new interpreter."""
    code = (
        "import json, sys, torch; before = sorted(sys.modules); "
        f"{statement}; print(json.dumps({{'torch': before, 'all': sorted(sys.modules)}}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize("statement", ["import dwiml_func", "from dwiml_func import *", "import dwiml_func.writers"])
def test_the_package_loads_nothing_heavy(statement):
    loaded = fresh_modules(statement)
    packages = {name.partition(".")[0] for name in set(loaded["all"]) - set(loaded["torch"])}
    assert "dwiml_func" in packages
    assert not packages & HEAVY
    with_torch = {name.partition(".")[0] for name in loaded["all"]}
    assert not with_torch & (HEAVY - {"tqdm"})  # torch itself takes tqdm where it is installed


def test_the_package_loads_the_core_only():
    loaded = fresh_modules("import dwiml_func")["all"]
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
