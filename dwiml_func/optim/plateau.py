"""A schedule that is reduced when validations stop improving: a pure function of what the training state remembers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from dwiml_func._checks import check_choice
from dwiml_func.optim.schedules import constant
from dwiml_func.types import OnPlateau, PerStep, Plateau

__all__ = ["reduce_on_plateau"]

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
