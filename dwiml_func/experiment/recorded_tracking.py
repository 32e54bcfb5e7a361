"""The scores of tracking that a run has recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from dwiml_func.experiment.tracking_scores import TRACKING_FILE

__all__ = ["RecordedTracking", "read_tracking"]


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


def read_tracking(directory: str | Path) -> RecordedTracking | None:
    """The recorded scores; None if there are none, ValueError where the file is corrupt."""
    import pydantic

    path = Path(directory) / TRACKING_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
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
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is corrupt. Make it again with dwiml-func evaluate {directory} --write.") from None
