"""How often a run saves a snapshot: every so many batches, minutes or epochs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from dwiml_func._checks import shown

__all__ = ["Cadence", "parse_cadence"]

_FORM = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?) ?(?:(?P<batch>batch(?:es)?)|(?P<minute>minutes?)|(?P<epoch>epochs?))", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often to save.

    A snapshot at the end of an epoch is always due, but where the unit is epochs.

    Args:
        number: how many of the unit, above 0.
        unit: what is counted: batches and minutes within an epoch, or epochs.

    Example:
        >>> Cadence(50, "batch").due_within_epoch(batch=100, seconds=3.0)
        True
    """

    number: float
    unit: Literal["batch", "minute", "epoch"]

    def due_within_epoch(self, *, batch: int, seconds: float) -> bool:
        """Whether to save after a batch.

        Args:
            batch: batches done in the epoch.
            seconds: time since the last save.

        Returns:
            True when a snapshot is due.
        """
        if self.unit == "batch":
            return batch % self.number == 0
        return self.unit == "minute" and seconds >= 60 * self.number

    def due_after_epoch(self, epoch: int) -> bool:
        """Whether to save after an epoch.

        Args:
            epoch: epochs done.

        Returns:
            True when a snapshot is due.

        Example:
            >>> [epoch for epoch in range(1, 8) if Cadence(3, "epoch").due_after_epoch(epoch)]
            [3, 6]
        """
        return self.unit != "epoch" or epoch % self.number == 0


def parse_cadence(text: str) -> Cadence:
    """Read how often to save.

    Args:
        text: a number and a unit: "50batches", "10minutes", "0.5 minutes", "1epoch".

    Returns:
        The cadence.

    Raises:
        ValueError: the text has another form, or the number is 0 or, for batches and epochs, not whole.

    Example:
        >>> parse_cadence("50batches")
        Cadence(number=50, unit='batch')
    """
    match = _FORM.fullmatch(text)
    number = float(match["number"]) if match else 0.0
    if match and number > 0:
        if match["minute"]:
            return Cadence(number, "minute")
        if number.is_integer():
            return Cadence(int(number), "batch" if match["batch"] else "epoch")
    raise ValueError(
        f"checkpoint_every: expected a number and a unit, such as 50batches, 10minutes or 1epoch, "
        f"received {shown(text)}."
    )
