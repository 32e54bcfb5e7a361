"""The folders above a command's output: made with it, and removed again when the command fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from dwiml_func.files.atomic import make_directory

__all__ = ["folders_above", "new_folder"]


@contextlib.contextmanager
def folders_above(path: str | Path) -> Iterator[Path]:
    """Make the missing folders above a file or folder that the block writes; remove them again when the block fails."""
    if not Path(path).name:
        raise ValueError(f"Expected the name of a file or folder to write. Received: {str(path)!r}.")
    path = Path(path)
    missing = [folder for folder in path.parents if not os.path.lexists(folder)]
    nearest = next(folder for folder in path.parents if folder not in missing)
    if not nearest.is_dir():
        raise ValueError(f"{str(nearest)!r} is not a folder. Choose another folder for {path.name!r}.")
    try:
        make_directory(path.parent)
        yield path
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[Path]:
    """The same as `folders_above`, for a folder that the block makes and that must not exist yet."""
    if os.path.lexists(path):
        raise ValueError(f"{path!r} exists. Choose the name of a new folder.")
    with folders_above(path) as folder:
        yield folder
