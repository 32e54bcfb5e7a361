"""Names and places of snapshots: `checkpoint/<epoch>[-<batch>]/` in an experiment."""

from __future__ import annotations

import re
from pathlib import Path

from dwiml_func.core.state import TrainState

__all__ = ["list_snapshots"]


def list_snapshots(directory: str | Path) -> list[str]:
    """Names of the snapshots of an experiment, oldest first.

    Args:
        directory: the experiment; it need not exist.

    Returns:
        Names such as "3" (after three epochs) or "3-50" (and fifty batches of the fourth).

    Example:
        >>> list_snapshots("/no/such/run")
        []
    """
    folder = Path(directory) / "checkpoint"
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    positions = {name: position for name in names if (position := _position(name)) is not None}
    return sorted(positions, key=positions.__getitem__)


def snapshot_name(state: TrainState) -> str:
    """The name of a state's snapshot: epochs done and, within an epoch, batches done."""
    return name_at(state.epoch, state.batch)


def name_at(epoch: int, batch: int) -> str:
    """The name of a snapshot of so many epochs and batches done."""
    return f"{epoch}-{batch}" if batch else str(epoch)


def snapshot_path(directory: str | Path, name: str | None) -> Path:
    """The directory of a snapshot that is there; None takes the latest. FileNotFoundError where there is none."""
    names = list_snapshots(directory)
    folder = Path(directory) / "checkpoint"
    if not names:
        raise FileNotFoundError(f"No snapshot in {folder}. Has an epoch been finished there?")
    name = names[-1] if name is None else name
    if name not in names:
        raise FileNotFoundError(f"No snapshot {name!r} in {folder}. There are: {', '.join(names)}.")
    return folder / name


def _position(name: str) -> tuple[int, int] | None:
    """Epoch and batch of a snapshot's name; None for a name that `snapshot_name` does not give."""
    match = re.fullmatch(r"(0|[1-9][0-9]*)(?:-([1-9][0-9]*))?", name)
    return (int(match[1]), int(match[2] or 0)) if match else None
