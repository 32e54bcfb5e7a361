"""The rules of the house: a room imports only rooms below it, a few do not see each other at all, modules are short."""

import ast
import re
import sys
import traceback
from pathlib import Path
from types import FrameType

import dwiml_func
from dwiml_func.core.step import train_step

ROOT = Path(dwiml_func.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ROOMS = (  # from the ground up
    *(
        "types",
        "_checks",
        "_transforms",
        "_trees",
        "files",
        "optim",
        "core",
        "compiled",
        "distributed",
        "ensemble",
        "checkpoint",
    ),
    *("writers", "data", "models", "tracking", "experiment", "dwi_ml", "benchmark", "cli"),
)
BLIND = {"data": {"writers"}, "models": {"checkpoint", "writers"}, "tracking": {"checkpoint", "writers"}}


def rooms_imported(path: Path) -> set[str]:
    """The rooms that a module imports from, also inside functions."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    root = {
        a.name for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "dwiml_func" for a in node.names
    }
    return {name.split(".")[1] for name in names if name.startswith("dwiml_func.")} | root - {"__version__"}


def test_each_room_imports_only_rooms_below_it() -> None:
    wrong = []
    for path in FILES:
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):  # the front doors
            allowed = {room, *ROOMS[: ROOMS.index(room)]} - BLIND.get(room, set())
            wrong += [f"{path.relative_to(ROOT)} imports {other}" for other in rooms_imported(path) - allowed]
    assert wrong == []


def lines_of_code(text: str) -> int:
    """The lines that are neither blank, nor a comment, nor of a docstring."""
    strings = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    apart = {line for node in strings for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    numbered = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(bool(line) and not line.startswith("#") and number not in apart for number, line in numbered)


def test_no_module_has_more_than_200_lines_of_code() -> None:
    assert lines_of_code('"""A.\n\nB.\n"""\n\n# c\nx = """d\ne"""\n') == 2
    assert {path.relative_to(ROOT): n for path in FILES if (n := lines_of_code(path.read_text())) > 200} == {}


def public_names(path: Path) -> set[str] | None:
    """What `__all__` of a module lists; None for a package without one."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return {str(name.value) for name in ast.walk(node.value) if isinstance(name, ast.Constant)}
    return None


def test_modules_import_only_public_names_of_others_and_no_private_modules_of_other_rooms() -> None:
    modules = {".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    public, wrong = {name: public_names(path) for name, path in modules.items()}, []
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.module not in modules or node.module == "dwiml_func":
                continue
            source = node.module
            room, _, module = source.removeprefix("dwiml_func.").partition(".")
            if module.startswith("_") and not name.startswith(f"dwiml_func.{room}."):
                wrong.append(f"{name} imports {source}")
            names = {alias.name for alias in node.names if f"{source}.{alias.name}" not in modules}
            wrong += [f"{name} imports {source}.{each}" for each in names - (public[source] or names)]
    assert wrong == []


def test_the_way_from_the_command_to_the_step_is_the_one_in_the_guide(cli, tmp_path) -> None:
    """At most 8 calls over 7 files; the loop's generator stands for `train_and_validate`, which makes it."""
    way: list[tuple[str, str]] = []

    def at_call(frame: FrameType, _event: str, _: object) -> None:
        if frame.f_code is train_step.__code__:
            sys.setprofile(None)
            frames = [each for each, _ in traceback.walk_stack(frame)]
            for code in (each.f_code for each in reversed(frames)):
                if ROOT in (file := Path(code.co_filename)).parents:
                    name = code.co_name.replace("_epochs", "train_and_validate")
                    way.append((str(file.relative_to(ROOT.parent)), name))

    data, options = Path(__file__).parent / "data" / "phantom.hdf5", ("--rnn-layer-sizes", "4", "--max-epochs", "1")
    sys.setprofile(at_call)
    try:
        assert cli("train", tmp_path, "run", data, *options, "--batch-size-training", "40").code == 0
    finally:
        sys.setprofile(None)
    guide = (ROOT.parent / "docs" / "own_model.md").read_text()
    named = re.findall(r"^\d\. `(dwiml_func/\S+\.py)`: ((?:`\w+`(?:, )?)+)", guide, re.MULTILINE)
    assert way == [(file, name) for file, names in named for name in re.findall(r"\w+", names)]
    assert len(way) - 1 <= 8
    assert len({file for file, _ in way}) <= 7
