"""How lines are followed: the options of tracking, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dwiml_func._checks import check_choice, check_number

__all__ = ["Algorithm", "TrackingSpec"]

Algorithm = Literal["det", "prob"]
"""How the next direction is chosen: the model's best one, or a sample from its distribution."""

_SHARE = 1e-6  # of a step: lengths that differ by rounding alone are equal


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingSpec:
    """The options of tracking. Names and defaults are those of dwi_ml's tracking scripts.

    Args:
        step_size: mm between two points, above 0.
        algo: "det" follows `directions` of the model's direction getter, "prob" its `sample_from`.
        track_forward_only: follow each seed in one direction only.
        min_length, max_length: mm, of the whole line; shorter lines are left out, longer ones end.
        theta: degrees, the largest angle between two steps; a line with a larger one ends. From 180 on, no limit.
        eos_stop: of a model that learned where streamlines end: a line ends where the probability of that is above this
            number, or with "max" where the end is likelier than to continue. None: 0.5.
        discard_last_point: leave out the point outside the mask with which a line ends. A point outside the volume is
            always left out.

    Raises:
        ValueError: an option is out of range.

    Source: dwi_ml, `l2t_track_from_model.py` (names and defaults). There `max_length` does not hold for lines tracked
        in both directions, and both lengths count points.

    Example:
        >>> spec = TrackingSpec(step_size=0.5, min_length=10, max_length=100)
        >>> spec.min_steps, spec.max_steps
        (20, 200)
    """

    step_size: float
    algo: Algorithm = "det"
    track_forward_only: bool = False
    min_length: float = 10.0
    max_length: float = 300.0
    theta: float = 90.0
    eos_stop: float | Literal["max"] | None = None
    discard_last_point: bool = False

    def __post_init__(self) -> None:
        check_choice("algo", self.algo, get_args(Algorithm))
        check_number("step_size", self.step_size, above=0)
        check_number("min_length", self.min_length, at_least=0)
        check_number("max_length", self.max_length, above=0)
        check_number("theta", self.theta, above=0)
        if self.max_length < self.min_length:
            raise ValueError(
                f"max_length: expected at least min_length, {self.min_length} mm, received {self.max_length}."
            )
        if self.max_steps < 1:
            raise ValueError(f"max_length: expected at least a step, {self.step_size} mm, received {self.max_length}.")
        if self.eos_stop not in (None, "max"):
            if isinstance(self.eos_stop, str):
                raise ValueError(f"eos_stop: expected a probability or max, received {self.eos_stop!r}.")
            check_number("eos_stop", self.eos_stop, at_least=0)
            if self.eos_stop > 1:
                raise ValueError(f"eos_stop: expected a probability from 0 to 1, received {self.eos_stop}.")

    @property
    def max_steps(self) -> int:
        """Steps of the longest line."""
        return math.floor(self.max_length / self.step_size + _SHARE)

    @property
    def min_steps(self) -> int:
        """Steps of the shortest line that is kept; at least 1."""
        return max(1, math.ceil(self.min_length / self.step_size - _SHARE))
