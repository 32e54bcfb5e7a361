"""Strict JSON: files of limited size, no key twice, and null for numbers that JSON does not have."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwiml_func._checks import truncated_repr
from dwiml_func.files.atomic import atomic_write

__all__ = ["null_if_not_finite", "parse_json", "read_checked", "read_config_file", "to_json_data", "write_checked"]

_MAX_BYTES = 1 << 20


def read_config_file(path: Path, *, source: str) -> bytes:
    """Read a config file, called `source` in errors; ValueError if it is larger than 1 MiB."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{source}: Expected a file. Received: a folder, a pipe or a device.")
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{source}: this file is larger than any config.")
    return content.removeprefix(codecs.BOM_UTF8)  # Windows editors write it


def parse_json(text: str | bytes, *, source: str) -> Any:
    """Parse JSON, called `source` in errors; ValueError also for a duplicate key, which Python's own reader accepts."""
    try:
        return json.loads(text, object_pairs_hook=_check_twice)
    except _TwiceError as error:
        raise ValueError(f"{source}: duplicate key {error}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}.") from None


def write_checked(path: Path, content: dict[str, Any]) -> None:
    """Write JSON data, complete or not at all, with their SHA-256: nobody else checks the numbers."""
    content = null_if_not_finite(content)
    atomic_write(path, json.dumps({**content, "checksum": _checksum(content)}, indent=2) + "\n")


def read_checked(path: Path) -> dict[str, Any] | None:
    """Read what `write_checked` wrote, or what has no checksum yet; None without a file, ValueError if corrupt."""
    try:
        text = read_config_file(path, source=str(path))
    except FileNotFoundError:
        return None
    content = parse_json(text, source=f"{path} is corrupt: it")
    if not isinstance(content, dict):
        raise ValueError(f"{path} is corrupt. Expected a JSON object. Received: {truncated_repr(content)}.")
    checksum = content.pop("checksum", None)
    if checksum not in (None, _checksum(content)):
        raise ValueError(f"{path} is corrupt: it does not hold what was written.")
    return content


def to_json_data(data: Any, name: str = "data") -> Any:
    """Plain JSON data: arrays and tensors, also of one number, as lists and numbers, tuples as lists, paths as text.

    TypeError, which names the place, for what JSON does not have.
    """
    if data is None or type(data) in (bool, int, float, str):
        return data
    if isinstance(data, Mapping):
        return {_key(key, name): to_json_data(value, f"{name}.{key}") for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [to_json_data(value, f"{name}.{index}") for index, value in enumerate(data)]
    if hasattr(data, "tolist"):
        return to_json_data(data.tolist(), name)
    if isinstance(data, os.PathLike):
        return os.fspath(data)
    for kind in (int, float, str):
        if isinstance(data, kind):
            return kind(data)
    raise TypeError(
        f"{name}: expected numbers, texts, lists and dicts. Received: {type(data).__name__} {truncated_repr(data)}"
    )


def null_if_not_finite(data: Any) -> Any:
    """The same JSON data with None for NaN and infinity, which JSON does not have."""
    if isinstance(data, dict):
        return {name: null_if_not_finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [null_if_not_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _key(key: Any, name: str) -> Any:
    key = to_json_data(key, f"a key of {name}")
    if isinstance(key, list | dict):
        raise TypeError(f"{name}: expected texts as keys. Received: {truncated_repr(key)}")
    return key


class _TwiceError(Exception):
    pass


def _check_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError(truncated_repr(next(key for key in found if sum(key == other for other, _ in pairs) > 1)))
    return found
