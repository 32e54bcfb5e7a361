"""The file with the scores of how a run's best model tracks, and these scores as they are recorded there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["TRACKING_FILE", "read_scores"]

TRACKING_FILE = "tracking.json"
"""The scores of an experiment, in its folder."""


def read_scores(directory: str | Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The recorded scores by who tracked, protocol and score; empty if there are none or the file is corrupt."""
    import pydantic

    try:
        recorded = json.loads((Path(directory) / TRACKING_FILE).read_bytes())["scores"]
        return pydantic.TypeAdapter(dict[str, dict[str, dict[str, Any]]]).validate_python(recorded)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
