"""Which checkpoints stay when a newer one has been saved, and while another process reads them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dwiml_func.checkpoint.index import best_name, checkpoint_folder, checkpoint_name, list_checkpoints
from dwiml_func.core.state import TrainState
from dwiml_func.files.atomic import atomic_remove
from dwiml_func.files.lock import is_kept, kept_folders

__all__ = ["check_keep", "kept_checkpoints", "names_to_keep", "remove_old"]

_EVERY = "every:"


def check_keep(keep: int | str) -> None:
    """Raise ValueError unless it is "all", or `names_to_keep` takes it."""
    if keep == "all":
        return
    number = keep.removeprefix(_EVERY) if isinstance(keep, str) else ""
    is_every = isinstance(keep, str) and keep.startswith(_EVERY) and number.isascii() and number.isdecimal()
    if isinstance(keep, bool) or not (is_every or isinstance(keep, int)) or int(number or keep) < 1:
        raise ValueError(
            f"keep: expected a number of at least 1, all, or every:K for a K of at least 1. Received: {keep}"
        )


def names_to_keep(
    names: Sequence[str], state: TrainState, keep: int | str, keep_always: Collection[str] = ()
) -> set[str]:
    """Of the names of checkpoints, oldest first, those that stay once `state` has been saved.

    They are: its own; the latest `keep` at an epoch's end, or with "every:K" the latest two and those of every Kth
    epoch; the best epoch's; the latest two within the current epoch; and `keep_always`.
    """
    ends = [name for name in names if "-" not in name]
    if isinstance(keep, str):
        interval, keep = int(keep.removeprefix(_EVERY)), 2
        keep_always = (*keep_always, *(name for name in ends if int(name) % interval == 0))
    within = [name for name in names if name.startswith(f"{state.epoch}-")]
    best = best_name(state.best)
    return {checkpoint_name(state), *ends[-max(keep, 1) :], *([best] if best else []), *within[-2:], *keep_always}


def remove_old(
    directory: str | Path, state: TrainState, keep: int | str | None, keep_always: Collection[str] = ()
) -> None:
    """Remove the checkpoints that need not stay once `state` has been saved; None and "all" keep all."""
    if keep is None or keep == "all":
        return
    names = list_checkpoints(directory)
    kept = names_to_keep(names, state, keep, keep_always)
    for path in [checkpoint_folder(directory) / name for name in names if name not in kept]:
        if not is_kept(path):  # a later save removes it
            atomic_remove(path)


@contextmanager
def kept_checkpoints(directory: str | Path) -> Iterator[list[str]]:
    """Yield the names of the checkpoints, which a run in another process does not remove while the block runs."""
    while True:
        names = list_checkpoints(directory)
        with kept_folders(checkpoint_folder(directory) / name for name in names):
            if set(names) <= set(list_checkpoints(directory)):
                yield names
                return
