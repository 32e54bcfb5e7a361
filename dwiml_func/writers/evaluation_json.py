"""`evaluation.json`: how the best model of a training does beside the baselines."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dwiml_func.evaluation import Evaluation
from dwiml_func.files.atomic import atomic_write

__all__ = ["read_evaluation", "write_evaluation"]

_NAME = "evaluation.json"


def write_evaluation(directory: str | Path, evaluation: Evaluation, *, epoch: int, subset: str) -> None:
    """Write the file.

    Args:
        directory: the experiment.
        evaluation: of its best model; NaN is written as null.
        epoch: the best epoch.
        subset: whose streamlines it was evaluated on, "validation" or "training".

    Raises:
        OSError: the disk is full, or the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> evaluation = Evaluation(
        ...     model=10.0, keep_straight=4.0, principal_direction=None, num_points=7, num_streamlines=1)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write_evaluation(directory, evaluation, epoch=3, subset="validation")
        ...     read_evaluation(directory) == evaluation
        True
    """
    values = {name: None if _is_nan(value) else value for name, value in asdict(evaluation).items()}
    atomic_write(Path(directory) / _NAME, json.dumps({"epoch": epoch, "subset": subset, **values}, indent=2) + "\n")


def read_evaluation(directory: str | Path) -> Evaluation | None:
    """Read what was recorded.

    Args:
        directory: the experiment.

    Returns:
        The evaluation; None where there is none, or the file is damaged.

    Example:
        >>> read_evaluation("/no/such/experiment") is None
        True
    """
    import pydantic

    try:
        values = json.loads((Path(directory) / _NAME).read_bytes())
        angles = {name: math.nan if values[name] is None else values[name] for name in ("model", "keep_straight")}
        known = {name: values[name] for name in ("principal_direction", "num_points", "num_streamlines")}
        return pydantic.TypeAdapter(Evaluation).validate_json(json.dumps({**angles, **known}), strict=True)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
