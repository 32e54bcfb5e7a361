"""Paths that lead nowhere, in words."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["missing_text"]


def missing_text(path: Path) -> str:
    """Why a path is not there: "does not exist: PATH", or the link of it, or of a folder above it, that is broken."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            return f"does not exist: {path}. {place} is a broken link, to {os.readlink(place)}"
        if place.exists():
            break
    return f"does not exist: {path}"
