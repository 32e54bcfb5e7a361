"""Checks of numbers from options, and texts: errors on one line, values cut short, counts, tables."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "GREATEST",
    "LEAST",
    "STRICT",
    "aligned",
    "at_most_three",
    "check_choice",
    "check_number",
    "check_takes",
    "error_text",
    "listed",
    "one_line",
    "pluralize",
    "problem_text",
    "truncated_repr",
]

STRICT = {"extra": "forbid", "strict": True}
"""How pydantic reads the dataclasses of a config from JSON: no unknown key, no conversion."""

LEAST = 2.0**-126
"""The least positive number that float32 holds in full precision."""

GREATEST = (2 - 2.0**-23) * 2.0**127
"""The greatest number that float32 holds."""

_COUNT_END = 1 << 31  # torch accepts no larger counts


def check_number(
    name: str, value: float | None, *, at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    """Raise a ValueError if an option is out of range or not finite, an integer of 2**31 or more, or no float32.

    None, an option that is not given, passes.
    """
    if value is None:
        return
    if isinstance(value, int) and below == math.inf:
        below = _COUNT_END
    if not (at_least <= value < below and value > above):  # false also for not-a-number
        bounds = [f"at least {at_least}"] if at_least > -math.inf else []
        bounds += [f"above {above}"] if above > -math.inf else []
        bounds += [f"below {below}"] if below < math.inf else []
        raise ValueError(f"{name}: expected a finite number {' and '.join(bounds)}, received {truncated_repr(value)}.")
    if value != 0 and not LEAST <= abs(value) <= GREATEST:
        raise ValueError(f"{name}: expected a number that float32 can hold. Received: {truncated_repr(value)}.")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise a ValueError if an option is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, received {truncated_repr(value)}.")


def truncated_repr(value: object) -> str:
    """The repr of a value on one line, cut to 60 characters."""
    try:
        text = " ".join(map(str.strip, repr(value).splitlines()))
    except ValueError:  # Python refuses to write out numbers of more than 4300 digits
        return "a number that is too long to show"
    return text if len(text) <= 60 else text[:57] + "..."


def check_takes(name: str, form: str, function: Any, *args: Any, **options: Any) -> None:
    """Raise a TypeError unless a function can be called with such arguments; `form` is what it should look like."""
    with contextlib.suppress(ValueError):  # of what is built in, nothing is known
        try:
            inspect.signature(function).bind(*args, **options)
        except TypeError as error:
            received = f"{truncated_repr(function)} ({error})" if callable(function) else type(function).__name__
            raise TypeError(f"Expected {name}: a function {form}. Received: {received}.") from None


def listed(names: Iterable[str]) -> str:
    """At most three names, sorted, and the number of the others."""
    return at_most_three(sorted(names), ", ") or "none"


def at_most_three(texts: Sequence[str], separator: str = "; ") -> str:
    """The first three texts, and the number of the others."""
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return separator.join(texts[:3]) + more


def pluralize(number: int, noun: str) -> str:
    """`1 epoch`, `2 epochs`, `2 batches`."""
    return f"{number} {noun}{('es' if noun.endswith('tch') else 's') * (number != 1)}"


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,), indent: str = "") -> list[str]:
    """The rows of a table as lines: columns side by side, those of `left` to the left and others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        indent
        + "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def one_line(text: object, *, max_length: int | None = None) -> str:
    """A text, or that of an error, on one line, without control characters, cut to `max_length`."""
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(str(text).split()))
    return line if max_length is None or len(line) <= max_length else line[: max_length - 3] + "..."


def error_text(error: Exception) -> str:
    """An error on one line, without a full stop; of pydantic's, the first three problems and what was received."""
    if not hasattr(error, "errors"):
        return one_line(error).rstrip(".")
    problems = error.errors()  # type: ignore[attr-defined]
    return at_most_three([problem_text(problem) for problem in problems])


def problem_text(problem: Mapping[str, Any]) -> str:
    """One of pydantic's problems on one line: where, what was expected, what was received."""
    location = ".".join(map(str, problem["loc"]))
    if problem["type"] == "value_error" and "error" in problem.get("ctx", {}):
        text = one_line(problem["ctx"]["error"]).rstrip(".")
        return text if not location or location.rpartition(".")[2] in text else f"{location}: {text}"
    text = f"{problem['msg'][0].lower()}{problem['msg'][1:]}, received {truncated_repr(problem['input'])}"
    return one_line(f"{location}: {text}" if location else text)
