"""Paths and names that lead nowhere, in words."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

__all__ = ["missing_text", "other_spelling"]


def missing_text(path: Path) -> str:
    """Why a path is not there: "does not exist: PATH", or the link of it, or of a folder above it, that is broken.

    Where there is a folder in place of a file, or the other way round, it says that.
    """
    if path.exists():
        return f"is a {'folder' if path.is_dir() else 'file'}: {path}"
    for folder in (path, *path.parents):
        if folder.is_symlink() and not folder.exists():
            return f"does not exist: {path}. {folder} is a broken link, to {os.readlink(folder)}"
        if folder.exists():
            break
    return f"does not exist: {path}"


def other_spelling(missing: Iterable[str], present: Iterable[str]) -> str:
    """A sentence about names that are there, but in other code points, which look alike; empty if there are none."""
    there = {unicodedata.normalize("NFC", name) for name in present}
    spelt = [repr(name) for name in missing if unicodedata.normalize("NFC", name) in there]
    return f". Spelt with other Unicode code points (NFC, NFD): {', '.join(spelt)}" if spelt else ""
