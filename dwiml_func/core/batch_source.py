"""Sources of batches: `batches(key, epoch, start_batch)`, and what the loop asks of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sized
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_structure

from dwiml_func._checks import pluralize
from dwiml_func.core.rng import Key

__all__ = ["Batches", "check_iterable", "checked_batches"]

Batches = Callable[[Key, int, int], Iterable[Any]]
"""`batches(key, epoch, start_batch)`: the batches of an epoch from `start_batch` on, a pure function of the three."""


def checked_batches(source: Batches, key: Key, epoch: int, start_batch: int) -> Iterable[Any]:
    """The remaining batches of an epoch; ValueError where the source plainly ignores where it should start."""
    batches = source(key, epoch, start_batch)
    check_iterable("train", batches)
    if start_batch == 0:
        return batches
    if (num_left := _length(batches)) is not None:
        num_all = _length(source(key, epoch, 0))
        if num_all is not None and start_batch > num_all:
            raise ValueError(
                f"Expected a state within the {pluralize(num_all, 'batch')} of epoch {epoch + 1}. Received: one after "
                f"{start_batch}. Give the source the batch size that the run was started with."
            )
        if num_all is not None and num_left != num_all - start_batch:
            raise ValueError(
                f"Expected the last {num_all - start_batch} of the {pluralize(num_all, 'batch')} of epoch {epoch + 1}, "
                f"since {start_batch} are done. Received: {pluralize(num_left, 'batch')}. The source must begin at "
                "`start_batch`."
            )
    if isinstance(batches, Generator):
        return _checked_start(batches, source(key, epoch, 0), epoch, start_batch)
    return batches


def check_iterable(name: str, batches: Any) -> Any:
    """What a source returned; TypeError unless it can be iterated over."""
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise TypeError(f"Expected a source {name} that returns batches. Received: {type(batches).__name__}")
    return batches


def _checked_start(batches: Generator[Any], again: Iterable[Any], epoch: int, start_batch: int) -> Iterable[Any]:
    """The batches of a generator, which has no length, compared with those from the epoch's start on."""
    if again is batches or not isinstance(again, Generator):
        return batches
    first = list(islice(batches, 1))
    start = next(again, None)
    if first and _is_same(first[0], start) and not _is_same(start, next(islice(again, start_batch - 1, None), None)):
        raise ValueError(
            f"Expected the batches of epoch {epoch + 1} from batch {start_batch + 1} on. Received: them from the "
            f"first on. The source must begin at `start_batch`."
        )
    return chain(first, batches)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two batches, trees of tensors, are equal."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=False)
    return tree_structure(one) == tree_structure(other) and all(
        isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b) for a, b in pairs
    )


def _length(batches: Iterable[Any]) -> int | None:
    """The number of batches; None where it is not known, as with an `IterableDataset`."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:
        return None
