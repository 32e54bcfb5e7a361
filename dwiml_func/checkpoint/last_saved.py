"""The history that this process has saved last in each folder, so that the next save need not read it again."""

from __future__ import annotations

from pathlib import Path

from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.core.report import EpochReport

__all__ = ["last_saved", "remember_saved"]

_saved: dict[Path, tuple[tuple[int, ...] | None, tuple[EpochReport, ...]]] = {}
"""By path of a checkpoint folder: the stamp of the checkpoint that was saved last there, and its history."""


def remember_saved(path: Path, history: tuple[EpochReport, ...]) -> None:
    """Remember the history of the checkpoint at `path`, which has just been written."""
    _saved[path.parent.absolute()] = _stamp(path), history


def last_saved(directory: str | Path) -> tuple[EpochReport, ...] | None:
    """The history of the newest checkpoint; None where another process, or nobody, has written it."""
    folder = (Path(directory) / "checkpoint").absolute()
    stamp, history = _saved.get(folder, (None, ()))
    newest = list_checkpoints(directory)[-1:]
    return history if stamp is not None and newest and _stamp(folder / newest[0]) == stamp else None


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What no other checkpoint has."""
    try:
        status = (path / "manifest.json").stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
