"""Random numbers by address: a key names a place in the run, and the place determines the random numbers.

No generator advances from step to step. The key of a place is `fold_in(key, STREAM, epoch, batch, ...)`, so validating,
logging, prefetching or resuming cannot change the random numbers of training. The global generators of torch and numpy
are never an input.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch

__all__ = [
    "Key",
    "Stream",
    "default_generators",
    "fold_in",
    "key_hash",
    "numpy_rng",
    "torch_rng",
    "watched_generators",
    "without_seeds",
]

_GLOBAL_GENERATORS = threading.RLock()  # one thread at a time draws from them
os.register_at_fork(after_in_child=_GLOBAL_GENERATORS._at_fork_reinit)  # type: ignore[attr-defined]
_THREAD = threading.local()
_SEED_END = 1 << 64  # torch's generators take seeds below this


class Key(NamedTuple):
    """The address of a stream of random numbers: a seed and the path that was folded into it.

    Args:
        seed: the run's seed, 0 <= seed < 2**64.
        path: integers folded in so far, each 0 <= element < 2**32.

    Example:
        >>> fold_in(Key(1234), Stream.TRAIN_STEP, 7)
        Key(seed=1234, path=(2, 7))
    """

    seed: int
    path: tuple[int, ...] = ()


class Stream(IntEnum):
    """The named streams of a run. Numbers are never reused for another stream: old runs must replay.

    Example:
        >>> int(Stream.INIT)
        0
    """

    INIT = 0  # parameters of a new model
    TRAIN_PLAN = 1  # which streamlines are in which training batch
    TRAIN_STEP = 2  # the model in training (dropout)
    TRAIN_AUGMENT = 3  # noise, splits and reversals of training batches
    VALID_PLAN = 4  # which streamlines are in which validation batch
    VALID_STEP = 5  # the model in validation
    EXAMPLE_DATA = 6  # simulated signal of the example data
    TRACK = 7  # seeds and sampled directions of tracking


def fold_in(key: Key, *path: int) -> Key:
    """Append integers to a key's path.

    Args:
        key: the key to start from.
        *path: integers, each 0 <= element < 2**32.

    Returns:
        A new key. Keys of different paths give independent streams: the path is hashed, not added to the seed.

    Raises:
        ValueError: the seed or an element of the path is not an integer or out of range.

    Example:
        >>> fold_in(Key(7, (1,)), 2, 3)
        Key(seed=7, path=(1, 2, 3))
    """
    full_path = key.path + path
    _pack(key.seed, full_path)
    return Key(int(key.seed), tuple(map(int, full_path)))


def numpy_rng(key: Key) -> np.random.Generator:
    """Make numpy's generator for a key.

    Args:
        key: the stream's address.

    Returns:
        A new Philox generator. `numpy.random.SeedSequence` hashes seed and path, so that seed 7 epoch 1 differs from
        seed 8 epoch 0, unlike with additive seeds.

    Example:
        >>> bool(numpy_rng(Key(1)).random() == numpy_rng(Key(1)).random())
        True
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key.seed, spawn_key=key.path)))


@contextmanager
def torch_rng(key: Key) -> Iterator[None]:
    """Seed torch's generators inside a `with` block and restore their states at its end, also after an error.

    Some of torch's random operations (dropout, parameter initialisation) take no generator; this makes their random
    numbers a function of the key and leaves the global state as it was. It seeds the CUDA generators too once CUDA is
    in use. Torch's CPU generator takes 32 bits of a seed, so of 100,000 keys about one pair shares its random numbers.

    Args:
        key: the stream's address.

    Example:
        >>> with torch_rng(Key(1)):
        ...     first = torch.rand(3)
        >>> with torch_rng(Key(1)):
        ...     second = torch.rand(3)
        >>> torch.equal(first, second)
        True
    """
    if getattr(_THREAD, "has_no_seeds", False):
        yield
        return
    seed = key_hash(key)
    generators = default_generators()
    with _GLOBAL_GENERATORS:
        states = [generator.get_state() for generator in generators]
        try:
            for generator in generators:
                generator.manual_seed(seed)
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


@contextmanager
def without_seeds() -> Iterator[None]:
    """In this thread, `torch_rng` does nothing: for work beside other threads, under `watched_generators`."""
    _THREAD.has_no_seeds = True
    try:
        yield
    finally:
        _THREAD.has_no_seeds = False


@contextmanager
def watched_generators() -> Iterator[Callable[[], bool]]:
    """Let no other thread seed torch's generators; yields whether one has been drawn from. Restores their states.

    Within `without_seeds` another thread watches them, and this one would wait for it for ever.
    """
    if getattr(_THREAD, "has_no_seeds", False):
        yield lambda: False
        return
    generators = default_generators()
    with _GLOBAL_GENERATORS:
        states = [generator.get_state() for generator in generators]
        pairs = list(zip(generators, states, strict=True))
        try:
            yield lambda: any(not torch.equal(generator.get_state(), state) for generator, state in pairs)
        finally:
            for generator, state in pairs:
                generator.set_state(state)


def key_hash(key: Key) -> int:
    """64 bits that depend on every bit of a key."""
    # SeedSequence would do, but takes 60 microseconds inside a training step where this takes two.
    return int.from_bytes(hashlib.blake2b(_pack(key.seed, key.path), digest_size=8).digest(), "little")


def _pack(seed: int, path: tuple[int, ...]) -> bytes:
    """A key as bytes: 64 bits of the seed and, like SeedSequence, 32 of each element. ValueError out of that range."""
    try:
        return struct.pack(f"<Q{len(path)}I", seed, *path)
    except (struct.error, TypeError, OverflowError):
        pass
    if not (hasattr(seed, "__index__") and 0 <= int(seed) < _SEED_END):
        raise ValueError(f"Expected a seed that is an integer between 0 and 2**64 - 1. Received: {seed!r}")
    raise ValueError(f"Expected path elements that are integers between 0 and 2**32 - 1. Received: {path}")


def default_generators() -> list[torch.Generator]:
    """The generators that torch uses by default: the CPU's and, once CUDA is in use, those of its devices."""
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators.extend(torch.cuda.default_generators)
    return generators
