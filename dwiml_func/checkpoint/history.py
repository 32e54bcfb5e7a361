"""The history of a run, the reports of its epochs, as it is recorded in checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from dwiml_func.core.early_stopping import Best
from dwiml_func.core.report import EpochReport
from dwiml_func.files.json import to_json_data

__all__ = ["fill_digests", "history_from_json", "history_to_json"]


def history_to_json(history: Sequence[EpochReport]) -> list[dict[str, Any]]:
    """Reports as JSON data.

    Args:
        history: the reports.

    Returns:
        A dict for each.

    Example:
        >>> history_to_json([])
        []
    """
    rows = [asdict(report) | {"best": report.best._asdict()} for report in history]
    return to_json_data(rows, "history")


def history_from_json(data: Sequence[Mapping[str, Any]]) -> tuple[EpochReport, ...]:
    """The inverse of `history_to_json`.

    Args:
        data: a dict for each report.

    Returns:
        The reports.

    Example:
        >>> history_from_json([])
        ()
    """
    return tuple(EpochReport(**{**report, "best": Best(**report["best"])}) for report in data)


def fill_digests(
    history: Sequence[EpochReport], earlier: Sequence[EpochReport], epoch: int, digest: str | None
) -> tuple[EpochReport, ...]:
    """Give reports the digests that they lack.

    Args:
        history: the reports of all epochs so far.
        earlier: a history recorded before; its digests count for reports that are otherwise the same.
        epoch: the epoch after which the state has `digest`.
        digest: the digest of the state, if it stands at that epoch's end.

    Returns:
        The reports, with digests where they are known.

    Example:
        >>> fill_digests((), (), 0, None)
        ()
    """
    filled = []
    for index, report in enumerate(history):
        if report.epoch == epoch and digest is not None:
            report = replace(report, digest=digest)
        elif report.digest is None and index < len(earlier) and _text(report) == _text(earlier[index]):
            report = replace(report, digest=earlier[index].digest)
        filled.append(report)
    return tuple(filled)


def _text(report: EpochReport) -> str:
    """All but the digest; as text, since NaN is not equal to itself."""
    return json.dumps(history_to_json([replace(report, digest=None)]))
