"""Inspect a dataset: measure every group of every subject, and list all problems, not only the first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from dwiml_func._checks import one_line
from dwiml_func.data.grid import Grid
from dwiml_func.data.hdf5.consistency import (
    Volume,
    copied_streamlines,
    disjoint_subsets,
    same_volumes,
    separate_streamlines,
    subjects_of,
)
from dwiml_func.data.hdf5.grid import same_grid
from dwiml_func.data.hdf5.layout import Subset, read_resampling, subject_group
from dwiml_func.data.hdf5.problems import Checked, Problem, collect, corrupt_file, open_hdf5, scalar, to_python
from dwiml_func.data.inspection.groups import StreamlineSummary, VolumeSummary, inspect_streamlines, inspect_volume

if TYPE_CHECKING:
    import h5py

__all__ = ["Inspection", "Summaries", "inspect_dataset"]

# What h5py raises about corrupt parts, whichever they are; memory runs out when it is a size that is corrupt.
_H5PY_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)
_ONE_VALUE = ("step_size", "nb_points", "compress")
_STEP_TOLERANCE = 0.2  # of the step that the file names; dwi_ml's own steps are up to this much longer

Summaries = Mapping[str, VolumeSummary | StreamlineSummary]
"""The groups of a subject, by name."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is in a dataset, what is wrong, and what may be. Attributes are text; subjects are in the file's order."""

    path: Path
    num_bytes: int
    attributes: dict[str, str]
    subsets: dict[str, tuple[str, ...]]
    subjects: dict[str, Summaries]
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()


def inspect_dataset(path: str | os.PathLike[str]) -> Inspection:
    """Look at every group of every subject, one subject at a time in memory.

    Raises FileNotFoundError or ValueError where the file cannot be opened at all.
    """
    path = Path(path)
    problems: list[Problem] = []
    with open_hdf5(path) as file:
        try:
            attributes = {
                name: str(scalar(value) if name in _ONE_VALUE else to_python(value))
                for name, value in file.attrs.items()
            }
            collect(read_resampling(file), problems)
            in_file = [str(name) for name in file]
            subsets = collect(_inspect_subsets(file, in_file), problems) or {}
            listed = [name for names in subsets.values() for name in names]
        except _H5PY_ERRORS as error:
            raise corrupt_file(path, error) from error
        subjects = {
            name: collect(_inspect_subject(file, name), problems) or {} for name in dict.fromkeys([*listed, *in_file])
        }
        lines = [name for found in subjects.values() for name, of in found.items() if isinstance(of, StreamlineSummary)]
        for group in dict.fromkeys(lines):
            collect(separate_streamlines(file, subsets, group), problems)
        copies = [copied for group in dict.fromkeys(lines) for copied in copied_streamlines(file, subsets, group)]
    collect(_compare_subjects(subjects), problems)
    collect(_check_step(attributes, subjects), problems)
    return Inspection(
        path=path,
        num_bytes=path.stat().st_size,
        attributes=attributes,
        subsets=subsets,
        subjects=subjects,
        problems=tuple(problems),
        warnings=tuple(copies),
    )


def _inspect_subsets(file: h5py.File, in_file: list[str]) -> Checked[dict[str, tuple[str, ...]]]:
    subsets: dict[str, tuple[str, ...]] = {}
    for subset in get_args(Subset):
        subsets[subset] = (yield from subjects_of(file, subset, required=subset == "training")) or ()
    yield from disjoint_subsets(subsets)
    listed = {name for names in subsets.values() for name in names}
    for name in in_file:
        if name not in listed:
            yield Problem(f"subject {name!r}", "in the file, but in no subset")
    return subsets


def _inspect_subject(file: h5py.File, name: str) -> Checked[Summaries]:
    summaries: dict[str, VolumeSummary | StreamlineSummary] = {}
    parent = yield from subject_group(file, name)
    first: tuple[str, Grid] | None = None
    if parent is not None and len(parent) == 0:
        yield Problem(f"subject {name!r}", "no groups")
    for group_name in () if parent is None else map(str, parent):
        try:
            group = parent.get(group_name)  # type: ignore[union-attr]
            summary = yield from _inspect_group(group, f"subject {name!r}, group {group_name!r}")
        except _H5PY_ERRORS as error:
            yield Problem(f"subject {name!r}, group {group_name!r}", f"corrupt, cannot be read ({one_line(error)})")
            continue
        if summary is None:
            continue
        summaries[group_name] = summary
        if summary.grid is not None:
            first = first or (group_name, summary.grid)
            yield from same_grid(group, summary.grid, *first)  # type: ignore[arg-type]
    return summaries


def _inspect_group(group: object, where: str) -> Checked[VolumeSummary | StreamlineSummary]:
    import h5py

    kind = scalar(group.attrs.get("type")) if isinstance(group, h5py.Group) else None
    if isinstance(group, h5py.Group) and kind == "volume":
        return (yield from inspect_volume(group))
    if isinstance(group, h5py.Group) and kind == "streamlines":
        return (yield from inspect_streamlines(group))
    yield Problem(where, f"type {kind!r}. Expected a group of type 'volume' or 'streamlines'")


def _compare_subjects(subjects: Mapping[str, Summaries]) -> Checked[None]:
    """All subjects shall have the same groups, with the same features on voxel axes of the same orientation."""
    first_with: dict[str, str] = {}
    for subject, groups in subjects.items():
        for group in groups:
            first_with.setdefault(group, subject)
    for group, first in first_with.items():
        for subject, groups in subjects.items():
            if not groups:
                continue
            summary = groups.get(group)
            if summary is None:
                sentence = f"no group {group!r} that can be read, which subject {first!r} has"
                yield Problem(f"subject {subject!r}", sentence)
            elif type(summary) is not type(subjects[first][group]):
                sentence = f"of another type than that of subject {first!r}"
                yield Problem(f"subject {subject!r}, group {group!r}", sentence)
            elif isinstance(summary, VolumeSummary):
                expected, volume = _common(subjects[first][group]), _common(summary)
                if expected is not None and volume is not None:
                    yield from same_volumes(group, first, expected, subject, volume)


def _common(summary: VolumeSummary | StreamlineSummary) -> Volume | None:
    if not isinstance(summary, VolumeSummary) or summary.shape is None:
        return None
    return Volume(summary.shape[3], summary.grid, summary.attributes)


def _check_step(attributes: Mapping[str, str], subjects: Mapping[str, Summaries]) -> Checked[None]:
    try:
        step_size = float(attributes.get("step_size", ""))
    except ValueError:
        return  # "Not defined by user"
    for subject, groups in subjects.items():
        for name, summary in groups.items():
            median = summary.steps.median if isinstance(summary, StreamlineSummary) and summary.steps else step_size
            if abs(median - step_size) > _STEP_TOLERANCE * step_size:
                sentence = f"a median step of {median:.3g} mm, but the file's step_size is {step_size:g} mm"
                yield Problem(f"subject {subject!r}, group {name!r}", sentence)
