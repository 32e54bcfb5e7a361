"""The history of a run, the reports of its epochs, as it is recorded in checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.manifest import Serialized, report_text
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.report import EpochReport, Validation
from dwiml_func.files.json import to_json_data

__all__ = [
    "fill_digests",
    "history_from_json",
    "history_to_json",
    "last_saved",
    "one_an_epoch",
    "remember_saved",
    "serialize_history",
]

T = TypeVar("T")

_MAX_REMEMBERED = 1 << 16  # reports; then all are forgotten


class _Memo(Generic[T]):
    """What was made of reports, which are never changed, by their identity."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[EpochReport, T]] = {}

    def get(self, report: EpochReport) -> T | None:
        found = self._made.get(id(report))
        return None if found is None else found[1]

    def put(self, report: EpochReport, made: T) -> T:
        if len(self._made) >= _MAX_REMEMBERED:
            self._made.clear()
        self._made[id(report)] = report, made  # which keeps the report, and so its identity
        return made


_texts: _Memo[Serialized] = _Memo()
_filled: _Memo[EpochReport] = _Memo()

_ADDED = {"batch": 0, "monitor": "loss", "validations": ()}
"""Fields that came later, with the values at which they are not written: old histories keep their bytes."""


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
    rows = [asdict(report) | {"best": report.best.to_fields()} for report in history]
    for row in rows:
        for name, default in _ADDED.items():
            if row[name] == default:
                del row[name]
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
    return tuple(
        EpochReport(
            **{
                **report,
                "best": Best(**report["best"]),
                "validations": tuple(Validation(*pair) for pair in report.get("validations", ())),
            }
        )
        for report in data
    )


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
    for index, report in enumerate(one_an_epoch(history)):
        if report.epoch == epoch and digest is not None:
            if report.digest != digest:
                report = _filled.put(report, replace(report, digest=digest))
        elif report.digest is None and index < len(earlier):
            recorded = earlier[index]
            if recorded is report or recorded is _filled.get(report) or _text(report) == _text(recorded):
                report = _filled.put(report, recorded)
        filled.append(report)
    return tuple(filled)


def serialize_history(history: Sequence[EpochReport]) -> Serialized:
    """A history as JSON text. Each report is made text once, so that a save does not take longer with every epoch."""
    texts = [_texts.get(report) or _texts.put(report, report_text(history_to_json([report])[0])) for report in history]
    return Serialized(*(f"[{', '.join([each[part] for each in texts])}]" for part in (0, 1)))


def one_an_epoch(history: Sequence[EpochReport]) -> tuple[EpochReport, ...]:
    """A history with the last report of each epoch: that of a whole epoch replaces those from within it."""
    return tuple({report.epoch: report for report in history}.values())


def _text(report: EpochReport) -> str:
    """All but the digest; as text, since NaN is not equal to itself."""
    return json.dumps(history_to_json([replace(report, digest=None)]))


_saved: dict[Path, tuple[tuple[int, ...] | None, tuple[EpochReport, ...]]] = {}
"""By path of a checkpoint folder: the stamp of the checkpoint that was saved last there, and its history."""


def remember_saved(path: Path, history: tuple[EpochReport, ...]) -> None:
    """Remember the history of the checkpoint at `path`, which has just been written."""
    _saved[path.parent.absolute()] = _stamp(path), history


def last_saved(directory: str | Path) -> tuple[EpochReport, ...] | None:
    """The history of the newest checkpoint; None where another process, or nobody, has written it."""
    folder = (Path(directory) / "checkpoint").absolute()
    stamp, history = _saved.get(folder, (None, ()))
    newest = list_checkpoints(directory)[-1:]
    return history if stamp is not None and newest and _stamp(folder / newest[0]) == stamp else None


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What no other checkpoint has."""
    try:
        status = (path / "manifest.json").stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
