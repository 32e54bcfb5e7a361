"""Schedules of learning rates and weight decays: functions from the number of epochs or steps done to a float."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from dwiml_func._checks import check_choice, check_takes, truncated_repr
from dwiml_func._transforms import is_transformed
from dwiml_func.optim._kernel import check_count
from dwiml_func.types import OnPlateau, PerStep, Plateau, Schedule

__all__ = [
    "as_rate",
    "check_rate",
    "check_schedule",
    "constant",
    "cosine",
    "one_cycle",
    "per_epoch",
    "per_step",
    "reduce_on_plateau",
    "value_at",
    "warm_up",
    "warmup_stable_decay",
]


def constant(value: float) -> Callable[[int], float]:
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


def per_epoch(values: Sequence[float]) -> Callable[[int], float]:
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


def per_step(schedule: float | Callable[[int], float], *, every: int = 1) -> PerStep:
    """Count optimizer steps instead of epochs.

    Args:
        schedule: maps the number of steps done to a learning rate; any schedule of this module, whose lengths then are
            numbers of steps.
        every: batches in one step: 4 counts the updates behind `accumulate(4)`, 1 its micro-batches.

    Returns:
        A schedule for `train_and_validate`.

    Example:
        >>> schedule = per_step(warm_up(cosine(0.1, length=1000), length=100))
        >>> round(schedule.rate(550), 6)
        0.042178
    """
    check_count("every", every)
    rate = _as_function("per_step", schedule)
    return PerStep(rate if every == 1 else lambda step: rate(step // every))


def cosine(initial: float, *, length: int, final: float = 0.0) -> Callable[[int], float]:
    """Half a cosine from `initial` to `final` (Loshchilov and Hutter, 2017, arXiv:1608.03983, without restarts).

    Args:
        initial: learning rate of the first epoch.
        length: epochs until `final`, which then stays. With `per_step`, steps.
        final: the last learning rate.

    Returns:
        A schedule.

    Raises:
        ValueError: `length` is below 1, or a rate is negative or not finite.

    Example:
        >>> round(cosine(1.0, length=10)(5), 6)
        0.5
    """
    _check_lengths(length=length, at_least=1)
    _check_rates(initial, final)
    return lambda count: _half_cosine(initial, final, min(count / length, 1.0))


def warm_up(schedule: float | Callable[[int], float], *, length: int) -> Callable[[int], float]:
    """Grow linearly to the wrapped schedule's values at the start.

    Args:
        schedule: what to follow, also a number; its count 0 is the first of the warm-up.
        length: epochs of warm-up; epoch i has (i + 1) / (length + 1) of the wrapped rate. With `per_step`, steps.

    Returns:
        A schedule.

    Raises:
        ValueError: `length` is negative.
        TypeError: `schedule` is by step already.

    Example:
        >>> [round(warm_up(constant(0.3), length=2)(epoch), 6) for epoch in range(4)]
        [0.1, 0.2, 0.3, 0.3]
    """
    _check_lengths(length=length)
    follow = _as_function("warm_up", schedule)
    return lambda count: follow(count) * min((count + 1) / (length + 1), 1.0)


def warmup_stable_decay(
    peak: float, *, warmup: int, stable: int, decay: int, final: float = 0.0
) -> Callable[[int], float]:
    """Linear warm-up, a plateau, and a linear decay (Hu et al., 2024, arXiv:2404.06395).

    Args:
        peak: learning rate of the plateau.
        warmup, stable, decay: lengths of the three parts, in epochs. With `per_step`, in steps.
        final: learning rate after the decay.

    Returns:
        A schedule.

    Raises:
        ValueError: a length is negative, or a rate negative or not finite.

    Example:
        >>> schedule = warmup_stable_decay(1.0, warmup=1, stable=2, decay=2)
        >>> [round(schedule(epoch), 6) for epoch in range(6)]
        [0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    _check_lengths(warmup=warmup, stable=stable, decay=decay)
    _check_rates(peak, final)

    def schedule(count: int) -> float:
        if count < warmup:
            return peak * (count + 1) / (warmup + 1)
        done = (count - warmup - stable) / decay if decay else float(count >= warmup + stable)
        return final if done >= 1 else peak + (final - peak) * max(done, 0.0)

    return schedule


def one_cycle(
    peak: float,
    *,
    length: int,
    warmup_share: float = 0.3,
    initial_divisor: float = 25.0,
    final_divisor: float = 1e4,
) -> Callable[[int], float]:
    """Up to `peak` and down again, each along half a cosine, as `torch.optim.lr_scheduler.OneCycleLR`.

    Args:
        peak: the highest learning rate.
        length: epochs in all, at least 2. With `per_step`, steps.
        warmup_share: share of the length that goes up, 0 < share < 1.
        initial_divisor: the first rate is `peak / initial_divisor`.
        final_divisor: the last rate is the first one divided by it.

    Returns:
        A schedule. It stays at its last rate.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> schedule = one_cycle(1.0, length=11)
        >>> round(schedule(0), 6), round(schedule(2), 6), round(schedule(10), 6)
        (0.04, 0.960261, 4e-06)
    """
    _check_lengths(length=length, at_least=2)
    _check_rates(peak)
    if not (0 < warmup_share < 1 and initial_divisor > 0 and final_divisor > 0):
        raise ValueError(
            f"Expected 0 < warmup_share < 1 and divisors above 0. Received: {warmup_share}, {initial_divisor} and "
            f"{final_divisor}"
        )
    first = peak / initial_divisor
    top, end = warmup_share * length - 1, length - 1

    def schedule(count: int) -> float:
        count = min(count, end)
        if count <= top and top > 0:  # at 0 it begins at the peak
            return _half_cosine(first, peak, count / top)
        return _half_cosine(peak, first / final_divisor, (count - top) / (end - top))

    return schedule


def _half_cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))


def _as_function(name: str, schedule: float | Schedule) -> Callable[[int], float]:
    """A schedule as a function of a count; a number is the same everywhere."""
    if isinstance(schedule, PerStep | OnPlateau):
        kind = "per_step" if isinstance(schedule, PerStep) else "reduce_on_plateau"
        raise TypeError(
            f"Expected {name} of a number or a function of a count. Received: a schedule of {kind}, which belongs "
            f"outside, as in reduce_on_plateau(per_step(warm_up(cosine(0.1, length=1000), length=100)))."
        )
    return schedule if callable(schedule) else constant(check_rate(schedule))


def _check_lengths(*, at_least: int = 0, **lengths: int) -> None:
    for name, length in lengths.items():
        check_count(name, length, at_least=at_least)


def _check_rates(*rates: float) -> None:
    for rate in rates:
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"Expected learning rates that are finite and at least 0. Received: {rate:g}")


def value_at(schedule: float | Schedule, *, epoch: int, step: int, plateau: Plateau) -> float:
    """The value of a schedule, or a plain number, for a step of a run; the counts are numbers done before it."""
    if isinstance(schedule, OnPlateau):
        value = value_at(schedule.schedule, epoch=epoch, step=step, plateau=plateau)
        return check_rate(schedule.reduce(value, plateau.num_reductions))
    if isinstance(schedule, PerStep):
        return check_rate(schedule.rate(step))
    return check_rate(schedule(epoch) if callable(schedule) else schedule)


def check_schedule(name: str, schedule: Any) -> None:
    """Raise a TypeError for a schedule that is a function of something else than one count."""
    own = schedule.schedule if isinstance(schedule, OnPlateau) else schedule
    function = own.rate if isinstance(own, PerStep) else own
    if callable(function):
        form = "(count) of the epochs or steps done, such as cosine(0.1, length=100)"
        check_takes(name, form, function, 0)


def check_rate(lr: Any) -> float:
    """Return a learning rate as a float, also of numpy or a () tensor; ValueError if it is negative or not finite."""
    try:
        number = lr.detach().item() if isinstance(lr, Tensor) else lr
        rate = math.nan if isinstance(number, str | bool | np.bool_) else float(number)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # no number at all, or one that is too large
        rate = math.nan
    if not (math.isfinite(rate) and rate >= 0):
        received = truncated_repr(lr)
        raise ValueError(
            f"Expected a learning rate or a weight decay that is finite and at least 0. Received: {received}"
            + (". For the rates of epochs, use per_epoch([...])." if isinstance(lr, Sequence) else "")
        )
    return rate


def as_rate(lr: Any) -> float | Tensor:
    """A learning rate or a weight decay for one step, checked where its value can be read without waiting."""
    if not isinstance(lr, Tensor):
        return check_rate(lr)
    if lr.device.type == "cpu" and not (lr.requires_grad or is_transformed()):
        for rate in lr.reshape(-1).tolist():
            check_rate(rate)
    return lr


_LEAST_CHANGE = 1e-8  # of torch.optim: a smaller reduction is left out


def reduce_on_plateau(
    schedule: float | Callable[[int], float] | PerStep,
    *,
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    cooldown: int = 0,
    min_rate: float = 0.0,
) -> OnPlateau:
    """Multiply a schedule by `factor` whenever the monitored metric stops improving.

    The rates are those of `torch.optim.lr_scheduler.ReduceLROnPlateau`. What they depend on is in `TrainState.plateau`,
    so a run that is resumed has the same rates. `train_and_validate` gives the metric, `monitor`, and its `mode`.

    Args:
        schedule: a learning rate, or a schedule by epoch or by step.
        factor: what a reduction multiplies by, 0 < factor < 1.
        patience: validations in a row without improvement that are accepted; the next one reduces. Without
            validation, epochs.
        threshold: least improvement that counts.
        threshold_mode: "rel": a share of the best value; "abs": in the metric's unit.
        cooldown: validations after a reduction that do not count as bad.
        min_rate: no reduction goes below it.

    Returns:
        A schedule.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> schedule, plateau = reduce_on_plateau(0.1, factor=0.5, patience=1), Plateau()
        >>> for loss in (1.0, 2.0, 3.0):
        ...     plateau = schedule.update(plateau, loss, mode="min")
        ...     print(plateau.num_bad, schedule.reduce(schedule.schedule(0), plateau.num_reductions))
        0 0.1
        1 0.1
        0 0.05
    """
    if not 0 < factor < 1:
        raise ValueError(f"Expected a factor between 0 and 1. Received: {factor:g}")
    for name, count in {"patience": patience, "cooldown": cooldown}.items():
        if count < 0:
            raise ValueError(f"Expected {name} of at least 0. Received: {count}")
    for name, number in {"threshold": threshold, "min_rate": min_rate}.items():
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"Expected {name} that is finite and at least 0. Received: {number:g}")
    check_choice("threshold_mode", threshold_mode, ("rel", "abs"))

    def reduce(rate: float, num_reductions: int) -> float:
        for _ in range(num_reductions):
            reduced = max(rate * factor, min_rate)
            if rate - reduced <= _LEAST_CHANGE:
                break
            rate = reduced
        return rate

    def update(plateau: Plateau, value: float, *, mode: str = "min") -> Plateau:
        best, num_bad, cools = plateau.best, plateau.num_bad + 1, plateau.cooldown
        if _is_better(value, best, mode, threshold, threshold_mode):
            best, num_bad = value, 0
        if cools > 0:
            cools, num_bad = cools - 1, 0
        if num_bad > patience:
            return Plateau(plateau.num_reductions + 1, best, 0, cooldown)
        return Plateau(plateau.num_reductions, best, num_bad, cools)

    if isinstance(schedule, OnPlateau):
        raise ValueError(
            "Expected a rate, or a schedule by epoch or by step. Received: one that follows a plateau already"
        )
    if not (callable(schedule) or isinstance(schedule, PerStep)):
        schedule = constant(float(schedule))
    return OnPlateau(schedule, reduce, update)


def _is_better(value: float, best: float | None, mode: str, threshold: float, threshold_mode: str) -> bool:
    if best is None:
        best = math.inf if mode == "min" else -math.inf
    if threshold_mode == "abs":
        return value < best - threshold if mode == "min" else value > best + threshold
    return value < best * (1 - threshold) if mode == "min" else value > best * (1 + threshold)
