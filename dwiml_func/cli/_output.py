"""Where a command writes: the folders above its output are made with it, and go again when the command fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from dwiml_func.files.atomic import make_directory

__all__ = ["folders_above", "new_folder"]


@contextlib.contextmanager
def folders_above(path: str | Path) -> Iterator[Path]:
    """Make the folders above a file or a folder that the block writes.

    Args:
        path: what the block writes, as the user gave it.

    Yields:
        The path. When the block fails, the folders that were made for it are removed again, unless something is in
        them by then.

    Raises:
        ValueError: the path ends in no name, or what stands above it is no folder.
        OSError: a folder cannot be made.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with folders_above(f"{place}/plots/today/runs.png") as path:
        ...         _ = path.write_bytes(b"")
        ...     path.exists()
        True
    """
    if not Path(path).name:
        raise ValueError(f"Expected the name of what shall be written. Received: {str(path)!r}")
    path = Path(path)
    missing = [folder for folder in path.parents if not os.path.lexists(folder)]
    standing = next(folder for folder in path.parents if folder not in missing)
    if not standing.is_dir():
        raise ValueError(f"{str(standing)!r} is not a folder. Choose another place for {path.name!r}.")
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
    """A folder that the block makes, and those above it as in `folders_above`.

    Args:
        path: as the user gave it.

    Yields:
        The path, at which nothing stands yet.

    Raises:
        ValueError: something stands there, or what stands above it is no folder.
        OSError: a folder above it cannot be made.

    Example:
        >>> with new_folder("/") as folder:
        ...     pass
        Traceback (most recent call last):
        ...
        ValueError: '/' exists. Choose the name of a new folder.
    """
    if os.path.lexists(path):
        raise ValueError(f"{path!r} exists. Choose the name of a new folder.")
    with folders_above(path) as folder:
        yield folder
