"""JSON that people write: read up to a size, and refused where a key is there twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dwiml_func._checks import truncated_repr

__all__ = ["null_if_not_finite", "parse_json", "read_config_file"]

_MAX_BYTES = 1 << 20


def read_config_file(path: Path, *, source: str) -> bytes:
    """Read a file that should be a config.

    Args:
        path: a file.
        source: what to call it in an error.

    Returns:
        Its bytes, 1 MiB at most.

    Raises:
        ValueError: it is larger than any config.

    Example:
        >>> read_config_file(Path("experiments/first_run/config.json"), source="config.json")  # doctest: +SKIP
    """
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{source}: this file is larger than any config.")
    return content


def parse_json(text: str | bytes, *, source: str) -> Any:
    """Parse JSON text. Python's own reader takes the last of two values under one key, and says nothing.

    Args:
        text: JSON text; bytes are UTF-8.
        source: what to call it in an error.

    Returns:
        JSON data.

    Raises:
        ValueError: it is no JSON, or names a key twice.

    Example:
        >>> parse_json('{"rng": 1, "rng": 2}', source="config.json")
        Traceback (most recent call last):
        ...
        ValueError: config.json: 'rng' is there twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_check_twice)
    except _TwiceError as error:
        raise ValueError(f"{source}: {error} is there twice.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: this is no JSON: {error}.") from None


def null_if_not_finite(data: Any) -> Any:
    """The same JSON data with None for NaN and infinity, which JSON does not have."""
    if isinstance(data, dict):
        return {name: null_if_not_finite(value) for name, value in data.items()}
    if isinstance(data, list):
        return [null_if_not_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


class _TwiceError(Exception):
    pass


def _check_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError(truncated_repr(next(key for key in found if sum(key == other for other, _ in pairs) > 1)))
    return found
