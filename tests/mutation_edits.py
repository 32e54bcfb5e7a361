"""Small changes of behaviour of the package's modules, which `mutations.py` draws.

Wording, type hints, imports and logging are left as they are. A mutation that changes nothing is listed with its reason
in `tests/data/equivalent_mutations.txt` (file | changed line | reason) and is not drawn.
"""

from __future__ import annotations

import ast
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["PARTS", "TREE", "draw"]

TREE = Path(__file__).parents[1]
EQUIVALENT = TREE / "tests" / "data" / "equivalent_mutations.txt"
PARTS = {"parallel": ("distributed",), "figures": ("experiment/figures",)}
COMPARISONS = {"Lt": "<=", "LtE": "<", "Gt": ">=", "GtE": ">", "Eq": "!=", "NotEq": "==", "Is": "is not"}
COMPARISONS |= {"IsNot": "is", "In": "not in", "NotIn": "in"}
OPERATIONS = {"Add": "-", "Sub": "+", "Mult": "/", "Div": "*", "FloorDiv": "/", "Mod": "*", "Pow": "*", "MatMult": "*"}
TWINS = ("min max", "minimum maximum", "any all", "amin amax", "argmin argmax", "floor ceil", "ones zeros", "cos sin")
OTHERS = {a: b for pair in TWINS for a, b in (pair.split(), pair.split()[::-1])}
WORDING = {"warn", "warning", "print", "debug", "info", "cast", "TypeVar", "print_progress", "print_line"}
GUARDS = ("strict", "stacklevel", "reuse")  # of zip, of warnings, of memory: no result depends on them
UNORDERED = {"isinstance", "issubclass", "getattr", "hasattr", "min", "max", "minimum", "maximum", "equal", "isclose"}
TEXT = (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)  # wording, and what holds no behaviour

Edit = tuple[str, ast.AST, str]  # kind, what is replaced, by what


def edits(tree: ast.Module) -> Iterator[tuple[Edit, list[ast.AST]]]:
    """Every mutation of a module, and what encloses it."""

    def visit(node: ast.AST, around: list[ast.AST]) -> Iterator[tuple[Edit, list[ast.AST]]]:
        if isinstance(node, TEXT) or (isinstance(node, ast.keyword) and node.arg in GUARDS):
            return
        if isinstance(node, ast.FunctionDef) and ast.unparse(node.body[-1]) == "...":  # of a protocol
            return
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in WORDING:
            return
        yield from ((edit, around) for edit in edits_of(node))
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Assign) and "__all__" in ast.unparse(node.targets[0])):
            return
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list", "type_params", "bases", "slots"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from visit(child, [*around, node])

    return visit(tree, [])


def edits_of(node: ast.AST) -> Iterator[Edit]:
    """The mutations of one node."""
    match node:
        case ast.Compare(left=left, ops=[operation], comparators=[right]):
            yield "comparison", node, f"{show(left)} {COMPARISONS[type(operation).__name__]} {show(right)}"
        case ast.BoolOp(op=op, values=values):
            yield "and/or", node, (" or " if isinstance(op, ast.And) else " and ").join(map(show, values))
            yield "condition dropped", node, show(values[0])
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand) if not isinstance(operand, ast.Constant):
            yield "sign", node, show(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op).__name__ in OPERATIONS and not is_text(node):
            yield "arithmetic", node, f"{show(left)} {OPERATIONS[type(op).__name__]} {show(right)}"
            if not isinstance(op, ast.Add | ast.Mult):
                yield "swapped", node, show(ast.BinOp(right, op, left))
        case ast.AugAssign(target=target, op=op, value=value) if type(op).__name__ in OPERATIONS:
            yield "arithmetic", node, f"{show(target)} {OPERATIONS[type(op).__name__]}= {show(value)}"
            yield "statement", node, "pass"
        case ast.Constant(value=bool() as value):
            yield "constant", node, str(not value)
        case ast.Constant(value=int() as value):
            yield "off by one", node, str(value + 1)
        case ast.Constant(value=float() as value):
            yield "constant", node, repr(value * 2 if value else 1.0)
        case ast.Expr(value=value) if not isinstance(value, ast.Constant | ast.Yield | ast.YieldFrom):
            yield "statement", node, "pass"
        case ast.Raise() | ast.Break() | ast.Continue() | ast.Delete():
            yield "statement", node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement", node, "pass"
        case ast.Return(value=ast.Tuple(elts=[first, second, *rest])):
            yield "returned", node, "return " + ", ".join(map(show, [second, first, *rest]))
        case ast.Return(value=value) if value is not None and not isinstance(value, ast.Constant):
            yield "returned", node, "return None"
        case ast.Attribute(value=value, attr=name) if name in OTHERS:
            yield "twin", node, f"{show(value)}.{OTHERS[name]}"
        case ast.Name(id=name) if name in OTHERS:
            yield "twin", node, OTHERS[name]
        case ast.Call(func=function, args=arguments, keywords=keywords):
            for keyword in (each for each in keywords if each.arg not in GUARDS):
                kept = [each for each in keywords if each is not keyword]
                yield "argument dropped", node, ast.unparse(ast.Call(function, arguments, kept))
            # Of these, other orders give the same, or are noticed by every test.
            several = len(arguments) > 1 and not any(isinstance(each, ast.Starred) for each in arguments[:2])
            several = several and show(arguments[0]) != show(arguments[1])
            if several and ast.unparse(function).rpartition(".")[2] not in UNORDERED:
                swapped = [arguments[1], arguments[0], *arguments[2:]]
                yield "swapped", node, ast.unparse(ast.Call(function, swapped, keywords))
            if isinstance(function, ast.Attribute) and not arguments:
                yield "call dropped", node, show(function.value)
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "negated", node.test, f"not ({ast.unparse(node.test)})"


def show(node: ast.AST) -> str:
    """Source of an expression, in brackets where others could bind closer."""
    text = ast.unparse(node)
    return text if isinstance(node, ast.Name | ast.Constant | ast.Attribute | ast.Call | ast.Subscript) else f"({text})"


def is_text(node: ast.AST) -> bool:
    return any(isinstance(each, ast.JoinedStr) or isinstance(getattr(each, "value", 0), str) for each in ast.walk(node))


def replaced(source: str, node: Any, text: str) -> str:
    """A module's source with one node replaced."""
    lines = source.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    return (source.encode()[:start] + text.encode() + source.encode()[end:]).decode()


def draw(room: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` mutations of a room: first a kind, then one of that kind, so that no frequent kind crowds out others."""
    listed = (line.rpartition(" | ")[0].partition(" | ") for line in EQUIVALENT.read_text().splitlines())
    known = {(name, changed) for name, _, changed in listed}
    by_kind = defaultdict(list)
    for part in PARTS.get(room, (room,)):
        package = TREE / "dwiml_func"
        for path in sorted(
            file for each in package.glob(part) for file in ([each] if each.is_file() else each.rglob("*.py"))
        ):
            source, name = path.read_text(), str(path.relative_to(TREE))
            for (kind, node, text), around in edits(ast.parse(source)):
                first, last = node.lineno, node.end_lineno  # type: ignore[attr-defined]
                before, after = source.splitlines(), replaced(source, node, text)
                shown = "\n".join(after.splitlines()[first - 1 : last + len(after.splitlines()) - len(before)]).strip()
                functions = [each for each in around if isinstance(each, ast.FunctionDef)]
                scope = (functions[0].lineno, functions[0].end_lineno) if functions else (1, len(before))
                if (name, shown.splitlines()[0].strip()) not in known:
                    was = "\n".join(before[first - 1 : last]).strip()
                    change = {"kind": kind, "file": name, "lines": (first, last), "scope": scope}
                    by_kind[kind].append({**change, "before": was, "after": shown, "source": after})
    generator, drawn = random.Random(seed), []
    while len(drawn) < count and by_kind:
        kind = generator.choice(sorted(by_kind))
        drawn.append(by_kind[kind].pop(generator.randrange(len(by_kind[kind]))))
        if not by_kind[kind]:
            del by_kind[kind]
    return drawn
