"""The notation of `--learning-rate`: `RATE*EPOCHS ... RATE`."""

from __future__ import annotations

import math

from dwiml_func._checks import truncated_repr

__all__ = ["parse_learning_rate"]

_MAX_EPOCHS = 1_000_000  # a slip of the finger ("0.1*99999999999") must not fill the memory


def parse_learning_rate(text: str) -> tuple[float, ...]:
    """One learning rate an epoch from `RATE*EPOCHS ... RATE`: "0.01*2 0.1" is (0.01, 0.01, 0.1), whose last repeats."""
    expected = "Expected RATE, or RATE*EPOCHS ... RATE such as '0.001*3 0.0001'."
    terms, given = text.split(), f"Learning rate {truncated_repr(text)}"
    if not terms:
        raise ValueError(f"Learning rate is empty. {expected}")
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
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{given}: {truncated_repr(term)} is not a positive finite rate. {expected}")
        if not 1 <= count <= _MAX_EPOCHS:
            raise ValueError(
                f"{given}: {truncated_repr(term)} lasts {truncated_repr(count)} epochs, expected 1 to {_MAX_EPOCHS}."
            )
        if len(rates) > _MAX_EPOCHS:
            raise ValueError(f"{given}: more than {_MAX_EPOCHS} epochs before its end.")
        rates.extend([value] * count)
    return tuple(rates)
