"""Look at a dataset: what every subject holds, and everything that is wrong, not only the first of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dwiml_func.data.grid import Grid, grid_difference
from dwiml_func.data.inspection.groups import (
    Report,
    StreamlineSummary,
    VolumeSummary,
    inspect_streamlines,
    inspect_volume,
)

if TYPE_CHECKING:
    import h5py

__all__ = ["Inspection", "inspect_dataset"]

# What h5py raises about corrupt parts, whichever they are; memory runs out when it is a size that is corrupt.
_H5PY_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)
_SUBSETS = ("training", "validation", "testing")
_STEP_TOLERANCE = 0.2  # of the step that the file names; the reference's own steps are up to this much longer


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is in a dataset.

    Args:
        path: the file.
        num_bytes: its size.
        attributes: the file's attributes as text.
        subsets: subset -> subjects.
        subjects: subject -> group -> what it holds, in the file's order.
        problems: what is wrong, a line each.

    Example:
        >>> Inspection(path=Path("a.hdf5"), num_bytes=0, attributes={}, subsets={}, subjects={}, problems=()).problems
        ()
    """

    path: Path
    num_bytes: int
    attributes: dict[str, str]
    subsets: dict[str, tuple[str, ...]]
    subjects: dict[str, dict[str, VolumeSummary | StreamlineSummary]]
    problems: tuple[str, ...]


def inspect_dataset(path: str | os.PathLike[str]) -> Inspection:
    """Look at every group of every subject, one subject at a time in memory.

    Args:
        path: the HDF5 file.

    Returns:
        What it holds, and what is wrong.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not HDF5, or so corrupt that it cannot be opened.

    Example:
        >>> inspect_dataset("/nowhere/data.hdf5")
        Traceback (most recent call last):
        FileNotFoundError: The HDF5 file does not exist: /nowhere/data.hdf5
    """
    import h5py

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"The HDF5 file does not exist: {path}")
    if not path.is_file():
        raise ValueError(f"Expected an HDF5 file. Received: {path}, which is not a file")
    problems: list[str] = []
    try:
        with h5py.File(path, "r") as file:
            attributes = {name: str(_text(value)) for name, value in file.attrs.items()}
            subsets = {subset: _names(file.attrs.get(f"{subset}_subjs", ())) for subset in _SUBSETS}
            listed = [name for names in subsets.values() for name in names]
            names = list(dict.fromkeys([*listed, *map(str, file)]))
            _check_subsets(subsets, [*map(str, file)], problems.append)
            subjects = {name: _inspect_subject(file, name, problems.append) for name in names}
    except _H5PY_ERRORS as error:
        reason = " ".join(str(error).split())
        what = "truncated or corrupt" if h5py.is_hdf5(path) or _has_signature(path) else "no HDF5 file"
        raise ValueError(f"{path} is {what} ({reason}). Copy or create it anew") from error
    _compare_subjects(subjects, problems.append)
    _check_step(attributes, subjects, problems.append)
    return Inspection(
        path=path,
        num_bytes=path.stat().st_size,
        attributes=attributes,
        subsets=subsets,
        subjects=subjects,
        problems=tuple(problems),
    )


def _has_signature(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def _text(value: object) -> object:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _names(value: object) -> tuple[str, ...]:
    """A list of names; the reference writes an empty one as an array of floats."""
    return tuple(str(_text(name)) for name in np.atleast_1d(np.asarray(value)).tolist() if not isinstance(name, float))


def _check_subsets(subsets: dict[str, tuple[str, ...]], present: list[str], report: Report) -> None:
    if not subsets["training"]:
        report("The file lists no training subjects")
    subset_of: dict[str, str] = {}
    for subset, names in subsets.items():
        for name in names:
            if subset_of.get(name) == subset:
                report(f"subject {name!r}: listed twice in the {subset} subset")
            elif name in subset_of:
                report(f"subject {name!r}: in two subsets, {subset_of[name]} and {subset}")
            subset_of[name] = subset
    for name in present:
        if name not in subset_of:
            report(f"subject {name!r}: in the file, but in no subset")


def _inspect_subject(file: h5py.File, name: str, report: Report) -> dict[str, VolumeSummary | StreamlineSummary]:
    import h5py

    parent = file.get(name)
    if not isinstance(parent, h5py.Group):
        report(f"subject {name!r}: listed, but not in the file")
        return {}
    summaries: dict[str, VolumeSummary | StreamlineSummary] = {}
    first: tuple[str, Grid] | None = None
    for group_name in map(str, parent):
        place = f"subject {name!r}, group {group_name!r}: "

        def report_here(problem: str, place: str = place) -> None:
            report(place + problem)

        try:
            group = parent.get(group_name)
            if not isinstance(group, h5py.Group):
                report_here("no group, expected one of type 'volume' or 'streamlines'")
                continue
            kind = _text(group.attrs.get("type"))
            if kind == "volume":
                summary = inspect_volume(group, report_here)
            elif kind == "streamlines":
                summary = inspect_streamlines(group, report_here)
            else:
                report_here(f"type {kind!r}, expected 'volume' or 'streamlines'")
                continue
        except _H5PY_ERRORS as error:
            report_here(f"corrupt, cannot be read ({' '.join(str(error).split())})")
            continue
        summaries[group_name] = summary
        if summary.grid is not None:
            first = first or (group_name, summary.grid)
            difference = grid_difference(summary.grid, first[1])
            if difference is not None:
                report_here(f"{difference}, as group {first[0]!r} has")
    return summaries


def _compare_subjects(subjects: dict[str, dict[str, VolumeSummary | StreamlineSummary]], report: Report) -> None:
    """All subjects shall have the same groups, with the same number of features."""
    first_with: dict[str, str] = {}
    for subject, groups in subjects.items():
        for group in groups:
            first_with.setdefault(group, subject)
    for subject, groups in subjects.items():
        for group, first in first_with.items():
            if group not in groups:
                if groups:
                    report(f"subject {subject!r}: no group {group!r} that can be read, which subject {first!r} has")
                continue
            one, other = groups[group], subjects[first][group]
            if type(one) is not type(other):
                report(f"subject {subject!r}, group {group!r}: of another type than that of subject {first!r}")
            elif isinstance(one, VolumeSummary) and isinstance(other, VolumeSummary):
                numbers = [(summary.shape or ())[3:] for summary in (one, other)]
                if numbers[0] != numbers[1]:
                    what = " and ".join(str(number[0]) if number else "an unknown number of" for number in numbers)
                    report(f"subjects {subject!r} and {first!r}, group {group!r}: {what} features")


def _check_step(
    attributes: dict[str, str], subjects: dict[str, dict[str, VolumeSummary | StreamlineSummary]], report: Report
) -> None:
    try:
        step_size = float(attributes.get("step_size", ""))
    except ValueError:
        return  # "Not defined by user"
    for subject, groups in subjects.items():
        for name, summary in groups.items():
            if isinstance(summary, StreamlineSummary) and summary.steps is not None:
                median = summary.steps.median
                if abs(median - step_size) > _STEP_TOLERANCE * step_size:
                    report(
                        f"subject {subject!r}, group {name!r}: a median step of {median:.3g} mm, but the file's "
                        f"step_size is {step_size:g} mm"
                    )
