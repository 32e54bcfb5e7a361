"""Learning rates per epoch: functions from the number of epochs done to a float."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dwiml_func.types import Schedule

__all__ = ["Schedule", "constant", "cosine", "per_epoch", "warm_up"]


def constant(value: float) -> Schedule:
    """The same learning rate in every epoch.

    Args:
        value: the learning rate, > 0.

    Returns:
        A schedule.

    Example:
        >>> constant(0.01)(5)
        0.01
    """
    return per_epoch([value])


def per_epoch(values: Sequence[float]) -> Schedule:
    """One learning rate for each epoch; the last one repeats.

    Args:
        values: at least one learning rate, each > 0.

    Returns:
        A schedule.

    Raises:
        ValueError: no value, or one that is not a positive finite number.

    Example:
        >>> schedule = per_epoch([0.1, 0.01])
        >>> [schedule(epoch) for epoch in range(3)]
        [0.1, 0.01, 0.01]
    """
    rates = tuple(float(value) for value in values)
    if not rates:
        raise ValueError("Expected at least one learning rate. Received none.")
    for rate in rates:
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"Expected learning rates that are positive and finite. Received: {rate:g}")
    return lambda epoch: rates[min(epoch, len(rates) - 1)]


def cosine(initial: float, *, num_epochs: int, final: float = 0.0) -> Schedule:
    """Half a cosine from `initial` to `final` (Loshchilov and Hutter, 2017, arXiv:1608.03983, without restarts).

    Args:
        initial: learning rate of the first epoch.
        num_epochs: epochs until `final`, which then stays.
        final: the last learning rate.

    Returns:
        A schedule.

    Raises:
        ValueError: `num_epochs` is below 1, or a rate is negative or not finite.

    Example:
        >>> round(cosine(1.0, num_epochs=10)(5), 6)
        0.5
    """
    if num_epochs < 1:
        raise ValueError(f"Expected num_epochs of at least 1. Received: {num_epochs}")
    for rate in (initial, final):
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"Expected learning rates that are finite and at least 0. Received: {rate:g}")

    def schedule(epoch: int) -> float:
        done = min(epoch / num_epochs, 1.0)
        return final + (initial - final) * 0.5 * (1.0 + math.cos(math.pi * done))

    return schedule


def warm_up(schedule: Schedule, *, num_epochs: int) -> Schedule:
    """Grow linearly to a schedule's values over the first epochs.

    Args:
        schedule: the schedule to wrap; its epoch 0 is the first epoch of the warm-up.
        num_epochs: epochs of warm-up; epoch i has (i + 1) / (num_epochs + 1) of the wrapped rate.

    Returns:
        A schedule.

    Raises:
        ValueError: `num_epochs` is negative.

    Example:
        >>> [round(warm_up(constant(0.3), num_epochs=2)(epoch), 6) for epoch in range(4)]
        [0.1, 0.2, 0.3, 0.3]
    """
    if num_epochs < 0:
        raise ValueError(f"Expected num_epochs of at least 0. Received: {num_epochs}")
    return lambda epoch: schedule(epoch) * min((epoch + 1) / (num_epochs + 1), 1.0)
