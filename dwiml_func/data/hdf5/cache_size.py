"""The size of a cache of volumes, in words."""

from __future__ import annotations

import math
import re

from dwiml_func._checks import truncated_repr

__all__ = ["parse_bytes"]

_LEAST = 1_000_000  # bytes, in text
_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}


def parse_bytes(size: str | int) -> int:
    """Read a number of bytes, or text, 0 or at least 1MB: "2GB" (10**9 bytes each) or "512 MiB" (2**20 bytes each)."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([A-Z]*)", str(size).strip().upper())
    number = float(found[1]) if found else math.inf
    if found is None or found[2] not in _UNITS or number == math.inf:
        raise ValueError(f"cache_size: expected bytes, such as 2GB, 500MB or 512MiB. Received: {truncated_repr(size)}")
    if isinstance(size, str) and 0 < number * _UNITS[found[2]] < _LEAST:
        raise ValueError(
            f"cache_size: expected at least 1MB, received {size!r}. It counts bytes, as in 2GB; dwi_ml's option of "
            f"this name counts volumes."
        )
    return int(number * _UNITS[found[2]])
