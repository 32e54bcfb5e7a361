"""The streamlines that a run's best model tracked at its end, beside the real ones, in `plots/tracking.npz`."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dwiml_func.data.streamlines import Streamlines
from dwiml_func.experiment.tracking.evaluation import ShownLines, TrackedLines
from dwiml_func.files.atomic import atomic_write
from dwiml_func.tracking.protocols import Protocol

__all__ = ["RecordedLines", "read_tracked_lines", "tracked_lines_path", "write_tracked_lines"]

_REAL = "real"
_FINEST = 0.01  # mm
_LARGEST = 2**15 - 1


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
