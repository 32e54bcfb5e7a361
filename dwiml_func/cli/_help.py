"""The help of a command: plain text as wide as the terminal, with its options grouped by subject."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from dwiml_func.cli._messages import MESSAGE_OPTIONS
from dwiml_func.cli._options import Option, list_options

__all__ = ["format_block", "format_help"]

_COLUMN = 28  # where the text of an option begins
_NARROWEST, _WIDEST = 60, 100  # of lines, in characters
_SPACE = "\N{NO-BREAK SPACE}"
_MANY = 40  # choices that together are longer go into the text


def format_help(
    description: type, program: str, *, subjects: Mapping[str, Sequence[str]] | None = None, inherits: str | None = None
) -> str:
    """What `--help` prints.

    Args:
        description: the command's dataclass. Its docstring is the purpose, with an example as its last paragraph.
        program: the program's name.
        subjects: titles of groups, in their order, each with names of options or of parts; an option's own name counts
            before its part's. All that is in none comes first.
        inherits: whose values the options of parts have by default; None: those of their fields.

    Returns:
        Lines of text.

    Example:
        >>> from dwiml_func.cli.digest import DigestOptions
        >>> print(format_help(DigestOptions, "dwiml-func digest").splitlines()[0])
        usage: dwiml-func digest [OPTIONS] EXPERIMENT_DIR
    """
    width = _width()
    subjects = {} if subjects is None else subjects
    titles = {name: title for title, names in subjects.items() for name in names}
    groups: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Arguments", "Options", *subjects)}
    for option in list_options(description):
        title = titles.get(option.name) or titles.get(option.part) or ("Options" if option.flags else "Arguments")
        default = inherits if inherits and option.part else option.default
        groups[title].append((_head(option), _text(option, default)))
    groups["Common options"] = [*MESSAGE_OPTIONS, ("--help, -h", "Print this and exit.")]

    purpose, _, example = inspect.cleandoc(description.__doc__ or "").rpartition("\n\nExample: ")
    usage = [f"usage: {program} [OPTIONS]", *(head for head, _ in groups["Arguments"])]
    blocks = [
        " ".join(usage),
        *(textwrap.fill(" ".join(paragraph.split()), width) for paragraph in purpose.split("\n\n")),
        f"Example:\n  {example}",
        *(format_block(title, rows) for title, rows in groups.items() if rows),
    ]
    return "\n\n".join(blocks)


def format_block(title: str, rows: Iterable[tuple[str, str]], *, column: int = _COLUMN) -> str:
    """A block of a help: names, and beside them texts.

    Args:
        title: its heading.
        rows: names and texts.
        column: where the texts begin.

    Returns:
        Lines of text.

    Example:
        >>> print(format_block("Exit codes", [("0", "All went well.")], column=6))
        Exit codes:
          0   All went well.
    """
    lines = [f"{title}:"]
    for head, text in rows:
        head = f"  {head}"
        wrapped = textwrap.wrap(text, _width() - column, break_on_hyphens=False)
        if len(head) <= column - 2:
            lines.append(f"{head:<{column}}{wrapped.pop(0)}")
        else:
            lines.append(head)
        lines += [" " * column + line for line in wrapped]
    return "\n".join(lines).replace(_SPACE, " ")


def _width() -> int:
    return min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)


def _head(option: Option) -> str:
    return " ".join([", ".join(option.flags), _value(option)]).strip()


def _value(option: Option) -> str:
    return "NAME" if _has_many_choices(option) else option.value


def _text(option: Option, default: str | None) -> str:
    parts = [option.text]
    if _has_many_choices(option):
        parts.append(f"One of: {', '.join(option.choices)}.")
    if default is not None:
        default = f"(default: {default})"
        parts.append(default.replace(" ", _SPACE) if len(default) <= _COLUMN else default)
    return " ".join(parts)


def _has_many_choices(option: Option) -> bool:
    return len("|".join(option.choices)) > _MANY
