"""Checks of options, and values and names as error messages show them."""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["STRICT", "check_number", "listed", "truncated_repr"]

STRICT = {"extra": "forbid", "strict": True}
"""How pydantic reads the dataclasses of a config from JSON: no unknown key, no conversion."""

_COUNT_END = 1 << 31  # torch accepts no larger counts


def check_number(
    name: str, value: float, *, at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    """Raise a ValueError if an option is out of range or not finite, or an integer of 2**31 or more."""
    if isinstance(value, int) and below == math.inf:
        below = _COUNT_END
    if not (at_least <= value < below and value > above):  # false also for not-a-number
        bounds = [f"at least {at_least}"] if at_least > -math.inf else []
        bounds += [f"above {above}"] if above > -math.inf else []
        bounds += [f"below {below}"] if below < math.inf else []
        raise ValueError(f"{name}: expected a finite number {' and '.join(bounds)}, received {truncated_repr(value)}.")


def truncated_repr(value: object) -> str:
    """The repr of a value, cut to 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out numbers of more than 4300 digits
        return "a number that is too long to show"
    return text if len(text) <= 60 else text[:57] + "..."


def listed(names: Iterable[str]) -> str:
    """At most three names, sorted, and the number of the others."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3]) or 'none'}{more}"
