"""Names and places of checkpoints: `checkpoint/<epoch>[-<batch>]/` in an experiment."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from dwiml_func.core.early_stopping import Best
from dwiml_func.core.state import TrainState

__all__ = [
    "CHECKPOINTS",
    "best_name",
    "checkpoint_folder",
    "checkpoint_name",
    "checkpoint_path",
    "is_checkpoint_name",
    "list_checkpoints",
    "names_after",
    "position_name",
    "position_of",
]


CHECKPOINTS = "checkpoint"
"""The folder of an experiment that holds its checkpoints."""


def checkpoint_folder(directory: str | Path) -> Path:
    """The folder of an experiment's checkpoints; it need not exist."""
    return Path(directory) / CHECKPOINTS


def list_checkpoints(directory: str | Path) -> list[str]:
    """Names of the checkpoints of an experiment, oldest first.

    Args:
        directory: the experiment; it need not exist.

    Returns:
        Names such as "3" (after three epochs) or "3-50" (and fifty batches of the fourth).

    Example:
        >>> list_checkpoints("/no/such/run")
        []
    """
    folder = checkpoint_folder(directory)
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    return sorted(filter(is_checkpoint_name, names), key=position_of)


def checkpoint_name(state: TrainState) -> str:
    """The name of a state's checkpoint."""
    return position_name(state.epoch, state.batch)


def best_name(best: Best) -> str | None:
    """The name of the best state's checkpoint; None while there is none."""
    if best.epoch is None:
        return None
    return position_name(best.epoch - 1, best.batch) if best.batch else str(best.epoch)


def position_name(epoch: int, batch: int) -> str:
    """The name of the checkpoint at which so many epochs and, within an epoch, batches are done."""
    return f"{epoch}-{batch}" if batch else str(epoch)


def is_checkpoint_name(name: str) -> bool:
    """Whether `position_name` gives such names."""
    return re.fullmatch(r"(0|[1-9][0-9]*)(-[1-9][0-9]*)?", name) is not None


def position_of(name: str) -> tuple[int, int]:
    """How many epochs and, within an epoch, batches are done at the checkpoint of such a name."""
    epoch, _, batch = name.partition("-")
    return int(epoch), int(batch or 0)


def names_after(names: Iterable[str], state: TrainState) -> list[str]:
    """Of checkpoints' names, those of later positions than that of a state."""
    done = (state.epoch, state.batch)
    return [name for name in names if is_checkpoint_name(name) and position_of(name) > done]


def checkpoint_path(directory: str | Path, name: str | None) -> Path:
    """The directory of an existing checkpoint; None takes the latest. Raises FileNotFoundError where there is none."""
    names = list_checkpoints(directory)
    folder = checkpoint_folder(directory)
    if not names:
        raise FileNotFoundError(f"No checkpoint in {folder}. Has an epoch been finished there?")
    name = names[-1] if name is None else name
    if name not in names:
        raise FileNotFoundError(f"No checkpoint {name!r} in {folder}. There are: {', '.join(names)}.")
    return folder / name
