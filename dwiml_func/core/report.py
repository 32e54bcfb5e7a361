"""The report of an epoch: what it measured, and whether it is the best one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dwiml_func.core.early_stopping import Best

__all__ = ["EpochReport", "Validation", "check_monitor"]


class Validation(NamedTuple):
    """A validation within an epoch.

    Args:
        batch: number of batches done in the epoch.
        means: means over the validation batches.
        learning_rate: of the step before it.

    Example:
        >>> Validation(500, {"loss": 0.25}, 0.001).batch
        500
    """

    batch: int
    means: Mapping[str, float]
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochReport:
    """The metrics, the durations and the best epoch after one epoch, or after a validation within it.

    Args:
        epoch: the epoch's number, which is the number of epochs done, this one included; 1 is the first.
        learning_rate: of this epoch; of its last step, where it changes from step to step.
        train: means over the training batches, e.g. `loss` (weighted by points), `grad_norm` (by batches).
        valid: means over the validation batches; empty without validation.
        num_batches: training batches in the epoch.
        num_points: number of points averaged in the training loss.
        best: the best epoch so far, this one included.
        is_best: whether this epoch is the best one.
        stop: why the run ends after this epoch: "max_epochs" or "patience"; None when it continues.
        train_minutes: duration of the training part, in minutes, since the start or the last resume.
        valid_minutes: duration of the validation part, in minutes.
        digest: SHA-256 of the state after the epoch, in a history that was restored from a checkpoint; None before, and
            where no checkpoint was made at the epoch's end.
        learning_rate_min, learning_rate_max: the lowest and highest of the epoch's steps; None where all are the same.
        timed_points: number of points trained in `train_minutes`, where the epoch was resumed; None means all.
        batch: 0 in the report of a whole epoch. After a validation within the epoch, the number of its batches done:
            `train` has the means over them, and the report of the whole epoch follows.
        monitor: name of the metric that decides the best epoch.
        validations: those within the epoch, where there are any.

    Example:
        >>> report = EpochReport(
        ...     epoch=1, learning_rate=0.1, train={"loss": 0.5}, valid={}, num_batches=3, num_points=30,
        ...     best=Best(0.5, 1), is_best=True, stop=None, train_minutes=0.1, valid_minutes=0.0)
        >>> report.monitored
        0.5
    """

    epoch: int
    learning_rate: float
    train: dict[str, float]
    valid: dict[str, float]
    num_batches: int
    num_points: float
    best: Best
    is_best: bool
    stop: Literal["max_epochs", "patience"] | None
    train_minutes: float
    valid_minutes: float
    digest: str | None = None
    timed_points: float | None = None
    learning_rate_min: float | None = None
    learning_rate_max: float | None = None
    batch: int = 0
    monitor: str = "loss"
    validations: tuple[Validation, ...] = ()

    @property
    def points_per_second(self) -> float:
        """Speed of the training part, since the start or the last resume; NaN where no time was measured."""
        points = self.num_points if self.timed_points is None else self.timed_points
        return points / (60 * self.train_minutes) if self.train_minutes > 0 else math.nan

    @property
    def monitored(self) -> float:
        """The metric that decides the best epoch: of the validation, or of the training without validation."""
        return (self.valid or self.train)[self.monitor]

    @property
    def best_means(self) -> Mapping[str, float]:
        """The means of the validation in which this epoch has its best value; empty where that is in another epoch."""
        if self.best.epoch != self.epoch:
            return {}
        within = {validation.batch: validation.means for validation in self.validations}
        return within.get(self.best.batch, self.valid or self.train)


def check_monitor(monitor: str, names: Collection[str]) -> None:
    """Raise ValueError where there is no metric of the name to monitor."""
    if not isinstance(monitor, str) or monitor not in names:
        raise ValueError(f"Expected a metric to monitor among {', '.join(sorted(names))}. Received: {monitor!r}")
