"""How a run's best model tracks, as it is recorded: scores in `tracking.json`, lines in `plots/tracking.npz`."""

from __future__ import annotations

import io
import logging
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dwiml_func._checks import one_line
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.files.atomic import atomic_write
from dwiml_func.files.json import read_checked
from dwiml_func.tracking.protocols import Protocol

__all__ = [
    "TRACKING_FILE",
    "Drift",
    "RecordedLines",
    "RecordedTracking",
    "ShownLines",
    "TrackedLines",
    "has_tracking_evaluation",
    "read_drift",
    "read_scores",
    "read_tracked_lines",
    "read_tracking",
    "tracked_lines_path",
    "write_tracked_lines",
]

TRACKING_FILE = "tracking.json"
"""In an experiment's folder."""

_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a corrupt file raises."""

_REAL = "real"
_FINEST = 0.01  # mm
_LARGEST = 2**15 - 1


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
        values = read_checked(path) or {}
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
        recorded = read_checked(Path(directory) / TRACKING_FILE) or {}
    except (OSError, ValueError) as error:
        logging.getLogger(__name__).warning("%s", one_line(error))
        return None
    try:
        return pydantic.TypeAdapter(type_).validate_python(recorded[name])
    except _UNREADABLE:
        return None


class ShownLines(NamedTuple):
    """Some of a set of streamlines, evenly spaced in their order: RAS mm, rows of bundles (S,), and which are valid
    (S,)."""

    lines: Streamlines
    bundle: NDArray[np.int64]
    valid: NDArray[np.bool_]


class TrackedLines(NamedTuple):
    """What a model tracked, beside the real streamlines, all of which are valid; `names` are those of the bundles."""

    names: tuple[str, ...]
    real: ShownLines
    tracked: dict[Protocol, ShownLines]


class RecordedLines(NamedTuple):
    """Streamlines of the best model of an epoch."""

    epoch: int
    lines: TrackedLines


def tracked_lines_path(directory: Path) -> Path:
    """Where an experiment has them."""
    return directory / "plots" / "tracking.npz"


def write_tracked_lines(directory: Path, lines: TrackedLines, *, epoch: int) -> None:
    """Write them, with coordinates rounded to 0.01 mm, or to what fits into 16 bits."""
    sets = {_REAL: lines.real, **lines.tracked}
    largest = max(
        (float(shown.lines.points.abs().max()) for shown in sets.values() if len(shown.lines.points)), default=0
    )
    unit = max(_FINEST, largest / _LARGEST)
    arrays: dict[str, Any] = {
        "epoch": np.int64(epoch),
        "unit_mm": np.float64(unit),
        "names": np.array(lines.names, "U"),
    }
    for name, shown in sets.items():
        arrays[f"{name}.points"] = (shown.lines.points.double() / unit).round().numpy().astype("<i2")
        arrays[f"{name}.lengths"] = shown.lines.lengths.numpy().astype("<i4")
        arrays[f"{name}.bundle"] = shown.bundle.astype("<i4")
        arrays[f"{name}.valid"] = shown.valid
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    path = tracked_lines_path(directory)
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, content.getvalue())


def read_tracked_lines(directory: Path) -> RecordedLines | None:
    """Read them; None where there are none, ValueError where the file is corrupt."""
    path = tracked_lines_path(directory)
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            names = tuple(map(str, file["names"]))
            unit = float(file["unit_mm"])
            sets = {
                name: _shown(file, name, unit, len(names))
                for name in (_REAL, *get_args(Protocol))
                if f"{name}.points" in file
            }
            return RecordedLines(int(file["epoch"]), TrackedLines(names, sets.pop(_REAL), sets))  # type: ignore[arg-type]
    except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is corrupt: {error}. Make it again with dwiml-func evaluate {directory} --write."
        ) from None


def _shown(file: Any, name: str, unit: float, num_names: int) -> ShownLines:
    points, lengths = file[f"{name}.points"], file[f"{name}.lengths"].astype(np.int64)
    bundle, valid = file[f"{name}.bundle"].astype(np.int64), file[f"{name}.valid"].astype(bool)
    if points.ndim != 2 or points.shape[1] != 3 or points.dtype != np.int16:
        raise ValueError(f"expected points (P, 3) of 16 bits, received {points.dtype} {points.shape}")
    if not len(lengths) == len(bundle) == len(valid) or (lengths < 1).any() or lengths.sum() != len(points):
        raise ValueError("the lengths of its arrays do not fit together")
    if not np.isfinite(unit) or unit <= 0 or ((bundle < 0) | (bundle >= num_names))[valid].any():
        raise ValueError("expected a unit above 0 and rows of its bundles")
    offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(lengths)])
    lines = Streamlines(torch.from_numpy((points * unit).astype(np.float32)), torch.from_numpy(offsets))
    return ShownLines(lines, bundle, valid)
