"""Intervals in words, such as "50batches": how often to save or to validate."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from dwiml_func._checks import truncated_repr

__all__ = ["Interval", "parse_interval", "validation_interval"]

_FORM = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?) ?(?:(?P<batch>batch(?:es)?)|(?P<minute>minutes?)|(?P<epoch>epochs?))", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Interval:
    """Every `number` batches or minutes and at each epoch's end, or every `number` epochs."""

    number: float
    unit: Literal["batch", "minute", "epoch"]

    def due_within_epoch(self, *, batch: int, seconds: float = 0.0) -> bool:
        """Whether it is due after so many batches of the epoch, `seconds` after the last time."""
        if self.unit == "batch":
            return batch % self.number == 0
        return self.unit == "minute" and seconds >= 60 * self.number

    def due_after_epoch(self, epoch: int) -> bool:
        """Whether it is due after so many epochs."""
        return self.unit != "epoch" or epoch % self.number == 0


def parse_interval(text: str, *, name: str, units: Collection[str] = ("batch", "minute", "epoch")) -> Interval:
    """Read a number and a unit: "50batches", "10minutes", "0.5 minutes", "1epoch"; ValueError for any other text."""
    match = _FORM.fullmatch(text)
    if match and (number := float(match["number"])) > 0:
        if match["minute"] and "minute" in units:
            return Interval(number, "minute")
        if number.is_integer() and not match["minute"]:
            return Interval(int(number), "batch" if match["batch"] else "epoch")
    examples = ["50batches", *(["10minutes"] if "minute" in units else [])]
    raise ValueError(
        f"{name}: expected a number and a unit, such as {', '.join(examples)} or 1epoch, "
        f"received {truncated_repr(text)}."
    )


def validation_interval(every: int | str) -> Interval:
    """When to validate: every so many epochs, or "500batches" or "3epochs"; ValueError for anything else."""
    if isinstance(every, str):
        return parse_interval(every, name="validate_every", units=("batch", "epoch"))
    is_number = hasattr(every, "__index__") or isinstance(every, float)
    if isinstance(every, bool) or not is_number or every % 1 or every < 1:
        raise ValueError(f"Expected validate_every of at least 1, or a text such as '500batches'. Received: {every!r}")
    return Interval(int(every), "epoch")
