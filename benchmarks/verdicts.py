"""The last lines of a benchmark, which `python -m benchmarks` reads."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["conclude"]


def conclude(verdicts: Iterable[tuple[bool, str]]) -> int:
    """Print whether each requirement was met.

    Args:
        verdicts: whether it was, and what was measured, with the limit at the end: "..., at most 2 required".

    Returns:
        The exit code: 1 when one was not met.
    """
    verdicts = list(verdicts)
    for passed, text in verdicts:
        print(f"{'pass' if passed else 'FAIL'}: {text}")
    return int(not all(passed for passed, _ in verdicts))
