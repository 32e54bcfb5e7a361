"""How a run's best model tracks, as the run has recorded it in its `tracking.json`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from dwiml_func._checks import one_line
from dwiml_func.files.json import read_record

__all__ = [
    "TRACKING_FILE",
    "Drift",
    "RecordedTracking",
    "has_tracking_evaluation",
    "read_drift",
    "read_scores",
    "read_tracking",
]

TRACKING_FILE = "tracking.json"
"""In an experiment's folder."""

_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a corrupt file raises."""


class Drift(NamedTuple):
    """Mean distance from the real streamline by the way gone alone: mm gone, and mm by who tracked (None: unknown)."""

    gone_mm: tuple[float, ...]
    lag_mm: dict[str, tuple[float | None, ...]]


class RecordedTracking(NamedTuple):
    """What `tracking.json` records of the best model of an epoch.

    shares: by who tracked, then by protocol, the shares of valid streamlines and of those that join both ends.
    ceiling: the same of half of the real streamlines; None where there are too few.
    num_streamlines: of the model, by protocol.
    """

    epoch: int
    subject: str
    subset: str
    step_size: float
    has_mask: bool
    shares: dict[str, dict[str, tuple[float, float]]]
    ceiling: tuple[float, float] | None
    num_streamlines: dict[str, int]


def has_tracking_evaluation(directory: str | Path) -> bool:
    """Whether the folder has the scores of a run's best model."""
    return (Path(directory) / TRACKING_FILE).is_file()


def read_tracking(directory: str | Path) -> RecordedTracking | None:
    """What is recorded; None if nothing is, ValueError where the file is corrupt."""
    import pydantic

    path = Path(directory) / TRACKING_FILE
    if not path.is_file():
        return None
    try:
        values = read_record(path) or {}
        scores = values["scores"]
        facts = {name: values[name] for name in ("epoch", "subject", "subset", "step_size", "has_mask")}
        shares = {
            name: {protocol: (found["valid"], found["both_ends"]) for protocol, found in by_protocol.items()}
            for name, by_protocol in scores.items()
        }
        ceiling = None if values["ceiling_valid"] is None else (values["ceiling_valid"], values["ceiling_both_ends"])
        counts = {protocol: found["num_streamlines"] for protocol, found in scores["model"].items()}
        recorded = {**facts, "shares": shares, "ceiling": ceiling, "num_streamlines": counts}
        return pydantic.TypeAdapter(RecordedTracking).validate_python(recorded)
    except _UNREADABLE:
        raise ValueError(f"{path} is corrupt. Make it again with dwiml-func evaluate {directory} --write.") from None


def read_scores(directory: str | Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The recorded scores by who tracked, protocol and score; empty if there are none or they are corrupt."""
    return _part(directory, "scores", dict[str, dict[str, dict[str, Any]]]) or {}


def read_drift(directory: str | Path) -> Drift | None:
    """The recorded drift; None if there is none or it is corrupt."""
    drift = _part(directory, "drift", Drift)
    if drift is None or "model" not in drift.lag_mm or not drift.gone_mm:
        return None
    return drift if {*map(len, drift.lag_mm.values())} == {len(drift.gone_mm)} else None


def _part(directory: str | Path, name: str, type_: Any) -> Any:
    import pydantic

    try:
        recorded = read_record(Path(directory) / TRACKING_FILE) or {}
    except (OSError, ValueError) as error:
        logging.getLogger(__name__).warning("%s", one_line(error))
        return None
    try:
        return pydantic.TypeAdapter(type_).validate_python(recorded[name])
    except _UNREADABLE:
        return None
