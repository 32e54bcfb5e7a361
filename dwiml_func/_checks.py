"""What the options of a run have in common: how they are read, and errors that show what was given."""

from __future__ import annotations

import math

__all__ = ["STRICT", "check_number", "truncated_repr"]

STRICT = {"extra": "forbid", "strict": True}
"""How pydantic reads the dataclasses of a config from JSON: no unknown key, no conversion."""

_COUNT_END = 1 << 31  # counts stay below it: torch takes none beyond


def check_number(
    name: str, value: float, *, at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    """Refuse a number that is out of range or not finite.

    Args:
        name: the option.
        value: its value; an integer must also be below 2**31 where `below` is not given.
        at_least: least value allowed.
        above: a value that it must exceed.
        below: a value that it must not reach.

    Raises:
        ValueError: the number is out of range.

    Example:
        >>> check_number("max_epochs", 0, at_least=1)
        Traceback (most recent call last):
        ...
        ValueError: max_epochs: expected a finite number at least 1 and below 2147483648, received 0.
    """
    if isinstance(value, int) and below == math.inf:
        below = _COUNT_END
    if not (at_least <= value < below and value > above):  # false also for not-a-number
        bounds = [f"at least {at_least}"] if at_least > -math.inf else []
        bounds += [f"above {above}"] if above > -math.inf else []
        bounds += [f"below {below}"] if below < math.inf else []
        raise ValueError(f"{name}: expected a finite number {' and '.join(bounds)}, received {truncated_repr(value)}.")


def truncated_repr(value: object) -> str:
    """A value as an error message shows it.

    Args:
        value: anything.

    Returns:
        Its representation, cut to 60 characters.

    Example:
        >>> truncated_repr([1, "a"])
        "[1, 'a']"
    """
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out numbers of more than 4300 digits
        return "a number that is too long to show"
    return text if len(text) <= 60 else text[:57] + "..."
