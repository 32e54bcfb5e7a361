"""The notation of `--learning-rate`: rates by epoch, or a schedule in words, by epoch or by step."""

from __future__ import annotations

import math
from collections.abc import Callable

from dwiml_func._checks import GREATEST, LEAST, truncated_repr
from dwiml_func.optim.schedules import (
    constant,
    cosine,
    one_cycle,
    per_epoch,
    per_step,
    reduce_on_plateau,
    warm_up,
    warmup_stable_decay,
)
from dwiml_func.types import Schedule

__all__ = ["parse_learning_rate", "parse_rates"]

_MAX_LENGTH = 1_000_000  # a slip of the finger ("0.1*99999999999") must not fill the memory
_UNITS = {"step": True, "steps": True, "epoch": False, "epochs": False}
_NUMBERS = {
    "warmup": "LENGTH",
    "cosine": "RATE LENGTH [FINAL_RATE]",
    "wsd": "PEAK WARMUP STABLE DECAY [FINAL_RATE]",
    "onecycle": "PEAK LENGTH",
    "plateau": "RATE FACTOR PATIENCE",
}
"""The words, and the numbers that each takes."""
_LEAST = {"LENGTH": 1, "WARMUP": 0, "STABLE": 0, "DECAY": 0, "PATIENCE": 0}
"""The numbers that count something."""


def parse_learning_rate(text: str) -> Schedule:
    """The schedule of a text, `[warmup LENGTH] SCHEDULE [steps|epochs]`; ValueError with one sentence for any other.

    SCHEDULE is `RATE*EPOCHS ... RATE` or a word with its numbers. Lengths are epochs, with `steps` steps; a patience
    counts validations.
    """
    words = text.split()
    given = f"Learning rate {truncated_repr(text)}" if words else "Learning rate is empty"
    by_step = _UNITS[words.pop()] if words and words[-1] in _UNITS else None
    warmup = 0
    if words and words[0] == "warmup":
        (warmup,), words = _numbers("warmup", words[1:2], given), words[2:]
        warmup = int(warmup)
    name, factor, patience = words[0] if words else "", None, 0
    if name == "plateau":
        if by_step is not None and not warmup:
            raise ValueError(
                f"{given}: expected no unit. Received: one for plateau, whose patience counts validations."
            )
        rate, factor, patience = _numbers(name, words[1:], given)
        schedule: Callable[[int], float] = constant(rate)
    elif name in _NUMBERS:
        if warmup and name != "cosine":
            raise ValueError(f"{given}: expected no warmup before {name}, which has its own.")
        schedule = _in_words(name, _numbers(name, words[1:], given), given)
    else:
        schedule = per_epoch(parse_rates(words, given))
    if warmup:
        schedule = warm_up(schedule, length=warmup)
    counted = per_step(schedule) if by_step else schedule
    if factor is None:
        return counted
    try:
        return reduce_on_plateau(counted, factor=factor, patience=int(patience))
    except ValueError as error:
        raise ValueError(f"{given}: {error}") from None


def parse_rates(terms: list[str], given: str) -> tuple[float, ...]:
    """The rates of `RATE*EPOCHS ... RATE`, one an epoch: 0.01*2 0.1 is (0.01, 0.01, 0.1), whose last one repeats."""
    words = ", ".join(_NUMBERS)
    expected = f"Expected RATE, RATE*EPOCHS ... RATE such as '0.001*3 0.0001', or one of the words {words}."
    if not terms:
        raise ValueError(f"{given}: no rate was given. {expected}")
    rates: list[float] = []
    for position, term in enumerate(terms):
        rate, star, epochs = term.partition("*")
        is_last = position == len(terms) - 1
        try:
            value, count = float(rate), int(epochs) if star else 1
        except ValueError:
            raise ValueError(f"{given}: cannot read {truncated_repr(term)}. {expected}") from None
        if not star and not is_last:
            raise ValueError(f"{given}: {truncated_repr(term)} has no number of epochs. {expected}")
        if not LEAST <= value <= GREATEST:
            raise ValueError(f"{given}: {truncated_repr(term)} is not a positive finite rate. {expected}")
        if not 1 <= count <= _MAX_LENGTH:
            raise ValueError(
                f"{given}: {truncated_repr(term)} lasts {truncated_repr(count)} epochs, expected 1 to {_MAX_LENGTH}."
            )
        if len(rates) > _MAX_LENGTH:
            raise ValueError(f"{given}: more than {_MAX_LENGTH} epochs before its end.")
        rates.extend([value] * count)
    return tuple(rates)


def _in_words(name: str, numbers: list[float], given: str) -> Callable[[int], float]:
    rate, *others = numbers
    try:
        if name == "cosine":
            return cosine(rate, length=int(others[0]), final=numbers[2] if len(numbers) > 2 else 0.0)
        if name == "onecycle":
            return one_cycle(rate, length=int(others[0]))
        warmup, stable, decay = map(int, others[:3])
        final = numbers[4] if len(numbers) > 4 else 0.0
        return warmup_stable_decay(rate, warmup=warmup, stable=stable, decay=decay, final=final)
    except ValueError as error:
        raise ValueError(f"{given}: {error}") from None


def _numbers(name: str, words: list[str], given: str) -> list[float]:
    """The numbers after a word, each in its range."""
    form = _NUMBERS[name]
    names = form.replace("[", "").replace("]", "").split()
    if not len(names) - form.count("[") <= len(words) <= len(names):
        raise ValueError(f"{given}: expected {name} {form}. Received after {name}: {' '.join(words) or 'nothing'}.")
    numbers = []
    for own, word in zip(names, words, strict=False):
        least, is_rate = _LEAST.get(own), own in ("RATE", "PEAK")
        try:
            number = float(word) if least is None else int(word)
            fits = LEAST <= number <= GREATEST if is_rate else math.isfinite(number) and number >= (least or 0)
        except ValueError:
            number, fits = 0.0, False
        if not fits:
            least = f"a whole number of at least {least}" if own in _LEAST else "a number of at least 0"
            kind = "a number above 0" if is_rate else least
            raise ValueError(f"{given}: expected {name} {form}, {own} being {kind}. Received: {truncated_repr(word)}")
        numbers.append(number)
    return numbers
