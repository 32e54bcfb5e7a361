"""Batches of any torch `DataLoader`, as a source that resumes exactly."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dwiml_func.core.rng import Key, Stream, fold_in, numpy_rng, torch_rng

__all__ = ["from_loader"]

_END = object()


def from_loader(
    make_loader: Callable[[], DataLoader[Any]], *, stream: int = Stream.TRAIN_PLAN
) -> Callable[[Key, int, int], _Batches]:
    """Make a source of batches from a torch `DataLoader`, for `train_and_validate`.

    Batch i of epoch e is a function of the run's key, e and i alone, with any number of workers: the order (shuffling
    samplers included) is drawn from the key and the epoch, which samplers and datasets with a method `set_epoch` are
    told. What the dataset draws for a batch from torch's, numpy's or Python's global generators is drawn from the key,
    the epoch and the batch. So a run resumes in mid-epoch without loading the batches before. A loader of an
    `IterableDataset` has no positions: there, a resume loads the batches before and drops them.

    Args:
        make_loader: makes a fresh loader, e.g. `lambda: DataLoader(dataset, batch_size=32, shuffle=True)`. It is called
            at each epoch, with the same random numbers for all epochs and sources of a run, so that a `random_split`
            in it gives the same parts. The dataset must not keep random generators of its own.
        stream: which random numbers the source uses; `Stream.VALID_PLAN` for validation.

    Returns:
        A function `(key, epoch, start_batch) -> batches`. The batches have a length where the loader has one.

    Raises:
        TypeError: `make_loader` is no function.

    Example:
        >>> source = from_loader(lambda: DataLoader(range(6), batch_size=2, shuffle=True))
        >>> epoch = list(source(Key(0), 0, 0))
        >>> [batch.tolist() for batch in source(Key(0), 0, 1)] == [batch.tolist() for batch in epoch[1:]]
        True
    """

    if not callable(make_loader):
        raise TypeError(
            f"Expected a function that makes a DataLoader. Received: {type(make_loader).__name__}. "
            f"Give from_loader(lambda: loader)."
        )

    def source(key: Key, epoch: int, start_batch: int) -> _Batches:
        with _seeded(fold_in(key, Stream.TRAIN_PLAN)):
            loader = make_loader()
        if not hasattr(loader, "batch_sampler"):
            raise TypeError(f"Expected a function that makes a DataLoader. It made: {type(loader).__name__}.")
        for part in (loader.sampler, loader.batch_sampler, loader.dataset):  # as DistributedSampler has it
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
        return _Batches(loader, fold_in(key, stream, epoch), start_batch)

    return source


class _Batches:
    """The batches of one epoch from a position on."""

    def __init__(self, loader: DataLoader[Any], key: Key, start: int) -> None:
        self._loader, self._key, self._start = loader, key, start

    def __len__(self) -> int:
        return max(len(self._loader) - self._start, 0)

    def __iter__(self) -> Iterator[Any]:
        loader = self._loader
        with _seeded(self._key):
            for generator in (loader.generator, getattr(loader.sampler, "generator", None)):
                if generator is not None:
                    generator.manual_seed(int(numpy_rng(self._key).integers(2**63)))
            if isinstance(loader.dataset, IterableDataset):
                return islice(_seeded_each(iter(loader), self._key), self._start, None)
            batches = loader.batch_sampler
            order = list(loader.sampler if batches is None else batches)
        numbered = list(enumerate(order))[self._start :]
        options = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "prefetch_factor")
        context = loader.multiprocessing_context
        return iter(
            DataLoader(
                _Keyed(loader.dataset, self._key, batches is not None),
                batch_size=None,
                sampler=numbered,  # type: ignore[arg-type]  # any iterable of indices will do
                generator=torch.Generator(),  # seeds workers, whose generators are then seeded for each batch
                multiprocessing_context=context,
                **{name: getattr(loader, name) for name in options},
            )
        )


def _seeded_each(batches: Iterator[Any], key: Key) -> Iterator[Any]:
    """Batches in order, each made with the random numbers of its position."""
    for number in count():
        with _seeded(fold_in(key, number)):
            batch = next(batches, _END)
        if batch is _END:
            return
        yield batch


class _Keyed(Dataset[Any]):
    """A dataset whose random numbers for a batch are those of the batch's number."""

    def __init__(self, dataset: Dataset[Any], key: Key, is_batched: bool) -> None:
        self._dataset, self._key, self._is_batched = dataset, key, is_batched

    def __getitem__(self, position: tuple[int, Any]) -> Any:
        number, index = position
        with _seeded(fold_in(self._key, number)):
            if not self._is_batched:
                return self._dataset[index]
            if get_items := getattr(self._dataset, "__getitems__", None):
                return get_items(index)
            return [self._dataset[i] for i in index]


@contextmanager
def _seeded(key: Key) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python inside, and put the caller's back."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    seed = int(numpy_rng(key).integers(2**32))
    try:
        with torch_rng(key):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
