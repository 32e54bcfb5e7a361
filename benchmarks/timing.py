"""Timing that a busy machine disturbs little."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["interleaved", "medians_of"]


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: int = 3
) -> dict[str, list[float]]:
    """Time variants in turns, in an order that rotates, so that other work on the machine slows them all alike.

    Args:
        variants: what to run, by name.
        rounds: how often each is timed.
        warm_up: rounds before that, which are not.

    Returns:
        The seconds of each run, by name. A variant that returns a float has timed itself.
    """
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-warm_up, rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            result = variants[name]()
            elapsed = time.perf_counter() - start
            if index >= 0:
                times[name].append(result if isinstance(result, float) else elapsed)
    return times


def medians_of(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each variant's seconds, by name."""
    return {name: statistics.median(seconds) for name, seconds in times.items()}
