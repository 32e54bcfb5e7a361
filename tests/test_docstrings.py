"""Claims about the documentation: every public name has a docstring, and every example in one runs as written."""

import ast
import doctest
import importlib
import pkgutil
from itertools import pairwise
from pathlib import Path

import pytest

import dwiml_func

ROOT = Path(dwiml_func.__path__[0])
SUBMODULES = (info.name for info in pkgutil.walk_packages(dwiml_func.__path__, prefix="dwiml_func."))
MODULES = ["dwiml_func", *sorted(name for name in SUBMODULES if not name.endswith("__main__"))]


def source(name: str) -> str:
    path = ROOT.joinpath(*name.split(".")[1:])
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def documented_names(tree: ast.Module) -> set[str]:
    """Names that have a docstring where they are defined: functions, classes, and values followed by a string."""
    names = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node)
    }
    for node, following in pairwise(tree.body):
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        values = node.body if isinstance(node, ast.If) else [node]
        for value in values if is_text else ():
            targets = value.targets if isinstance(value, ast.Assign) else [getattr(value, "target", None)]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


def test_the_modules_of_the_core_are_found():
    assert {f"dwiml_func.core.{name}" for name in ("state", "step", "loop", "rng")} <= set(MODULES)


def test_every_public_name_is_documented():
    for name in MODULES:
        check_documented(name, ast.parse(source(name)))


def check_documented(name: str, tree: ast.Module) -> None:
    assert ast.get_docstring(tree), f"{name} has no docstring"
    module = importlib.import_module(name)
    public = getattr(module, "__all__", None)
    if public is None:
        assert hasattr(module, "__path__"), f"{name} has no __all__"
        return
    assert len(set(public)) == len(public), name
    missing = [public_name for public_name in public if not hasattr(module, public_name)]
    assert not missing, f"{name}.__all__ names what is not there: {missing}"
    imported = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }  # documented where they are defined, as are those that a package loads at their first use
    lazy = set(getattr(module, "_MODULES", ()))
    undocumented = sorted(set(public) - imported - lazy - documented_names(tree))
    assert not undocumented, f"{name} has public names without a docstring: {undocumented}"


COMPILES = pytest.param("dwiml_func.compiled.step", marks=pytest.mark.compiles)


EXAMPLES = [name for name in MODULES if ">>> " in source(name)]


def test_modules_with_examples_are_found():
    assert {"dwiml_func.core.step", "dwiml_func.optim.schedules"} <= set(EXAMPLES)


@pytest.mark.parametrize("name", [COMPILES if name == COMPILES.values[0] else name for name in EXAMPLES])
def test_every_example_runs(name):
    module = importlib.import_module(name)
    output: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    results = [runner.run(test, out=output.append) for test in doctest.DocTestFinder().find(module, name)]
    assert sum(result.failed for result in results) == 0, "".join(output)
