"""Patterns of parameters' names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fnmatch import translate

__all__ = ["check_patterns", "first_matches"]

_MATCHES: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[int | None, ...]] = {}  # matching takes longer than adam


def first_matches(patterns: tuple[str, ...], names: tuple[str, ...]) -> tuple[int | None, ...]:
    """The index of the first pattern that matches each name, None for none.

    A pattern is alternatives joined by `|`, each with the wildcards `*`, `?` and `[...]` of fnmatch; case counts.
    """
    key = (patterns, names)
    if key not in _MATCHES:
        compiled = [_compiled(pattern) for pattern in patterns]
        _MATCHES[key] = tuple(
            next((i for i, pattern in enumerate(compiled) if pattern.match(name)), None) for name in names
        )
    return _MATCHES[key]


def check_patterns(patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise ValueError for a pattern that matches none of the names."""
    names = list(names)
    for pattern in patterns:
        if not any(map(_compiled(pattern).match, names)):
            similar = dict.fromkeys(
                name
                for part in pattern.split("|")
                for name in difflib.get_close_matches(part.replace("*", ""), names, cutoff=0.3)
            )
            listed = list(similar)[:3] or names[:3]
            more = f" and {len(names) - len(listed)} more" if len(names) > len(listed) else ""
            raise ValueError(
                f"Expected a pattern that matches a parameter's name. Received: {pattern!r}. "
                f"The parameters are {', '.join(listed)}{more}."
            )


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile("|".join(translate(part) for part in pattern.split("|")))
