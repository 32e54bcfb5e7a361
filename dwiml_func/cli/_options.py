"""The options of a command, read off the dataclass that describes them: for its help, and to find the nearest name."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

__all__ = ["Option", "list_options"]

_PLACEHOLDERS = {int: "N", float: "X", str: "TEXT", bool: "True|False"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What a reader must know about an option.

    Args:
        name: the dataclass's field.
        part: the field of the outer dataclass that it belongs to; "" for an option of the outer one.
        flags: how it is written, e.g. ("--overwrite", "-f"); empty for an argument that has its place.
        value: what stands for its value, e.g. "N"; empty for a switch.
        choices: the values that it may have, if they can be counted.
        text: what it does.
        default: its default as text; None when the text says enough or it must be given.

    Example:
        >>> Option.__slots__[:3]
        ('name', 'part', 'flags')
    """

    name: str
    part: str
    flags: tuple[str, ...]
    value: str
    choices: tuple[str, ...]
    text: str
    default: str | None


def list_options(description: type, part: str = "") -> list[Option]:
    """The options of a command.

    A field's text is the string below it. A last sentence "None: ..." tells what happens when the option is not given,
    and becomes its default.

    Args:
        description: a dataclass; fields that are dataclasses are parts, whose fields are options too.
        part: the field that `description` is the type of, if it is a part.

    Returns:
        The options, in the order of the fields.

    Example:
        >>> from dwiml_func.experiment.config import CheckpointConfig
        >>> option = list_options(CheckpointConfig)[0]
        >>> option.flags, option.value, option.default
        (('--checkpoint-every',), 'TEXT', '1epoch')
    """
    return list(_options(description, part))


def _options(description: type, part: str) -> Iterator[Option]:
    hints = get_type_hints(description, include_extras=True)
    texts = _texts(description)
    for field in dataclasses.fields(description):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _options(hint, field.name)
            continue
        kind, metadata = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
        is_positional = tyro.conf.Positional in metadata
        is_switch = kind is bool and tyro.conf.FlagConversionOff not in metadata
        aliases = [alias for entry in metadata for alias in getattr(entry, "aliases", None) or ()]
        named = [entry.metavar for entry in metadata if getattr(entry, "metavar", None)]
        written = next((entry.name for entry in metadata if getattr(entry, "name", None)), field.name)
        text, _, without = texts.get(field.name, "").partition(" None: ")
        yield Option(
            name=field.name,
            part=part,
            flags=() if is_positional else (f"--{written.replace('_', '-')}", *aliases),
            value="" if is_switch else named[0] if named else _placeholder(kind),
            choices=_choices(kind),
            text=text,
            default=without.rstrip(".") or (None if is_switch else _default(field)),
        )


def _texts(description: type) -> dict[str, str]:
    """The strings below the fields of a dataclass and of those that it is made of."""
    texts: dict[str, str] = {}
    for base in reversed(description.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except OSError:  # a class that was defined at a prompt has no source
            continue
        assert isinstance(node, ast.ClassDef)
        for field, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(field.target, ast.Name):
                texts[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return texts


def _placeholder(kind: Any) -> str:
    options = _members(kind)
    if choices := _choices(kind):
        numbers = [_PLACEHOLDERS[option] for option in options if option in _PLACEHOLDERS]
        return "|".join((*numbers, *choices))
    (option,) = options
    if get_origin(option) is tuple:
        one = _placeholder(get_args(option)[0])
        return f"{one} [{one} ...]"
    return _PLACEHOLDERS[option]


def _choices(kind: Any) -> tuple[str, ...]:
    return tuple(str(value) for option in _members(kind) if get_origin(option) is Literal for value in get_args(option))


def _members(kind: Any) -> list[Any]:
    """The types of a union, without that of None; of any other type, itself."""
    members: Sequence[Any] = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [member for member in members if member is not NoneType]


def _default(field: dataclasses.Field[Any]) -> str | None:
    value = field.default
    if value is dataclasses.MISSING or value is None:
        return None
    return " ".join(str(part) for part in value) if isinstance(value, tuple) else str(value)
