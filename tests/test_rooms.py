"""The rule of the house: each room imports only rooms below it, and a few rooms do not see each other at all."""

import ast
from pathlib import Path

import dwiml_func

ROOT = Path(dwiml_func.__file__).parent
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
    *("writers", "data", "models", "tracking", "experiment", "dwi_ml", "cli"),
)
BLIND = {"data": {"writers"}, "models": {"checkpoint", "writers"}, "tracking": {"checkpoint", "writers"}}


def rooms_imported(path: Path) -> set[str]:
    """The rooms that a module imports from, also inside functions."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("dwiml_func.")}


def test_each_room_imports_only_rooms_below_it() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):  # the front doors
            allowed = {room, *ROOMS[: ROOMS.index(room)]} - BLIND.get(room, set())
            wrong += [f"{path.relative_to(ROOT)} imports {other}" for other in rooms_imported(path) - allowed]
    assert wrong == []
