"""The text of an inspection: tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dwiml_func._checks import aligned, pluralize
from dwiml_func.data.grid import orientation_of
from dwiml_func.data.inspection.groups import StreamlineSummary, VolumeSummary
from dwiml_func.data.inspection.inspect import Inspection
from dwiml_func.data.spherical_harmonics import DEFAULT_BASIS, assumed_signal

__all__ = ["format_inspection"]

_NUM_PROBLEMS = 50  # lines of problems, at most


def format_inspection(inspection: Inspection) -> str:
    """The text of `dwiml-func info`: the file, its subjects, a table for each group, and what is wrong."""
    lines = [f"{inspection.path}  {inspection.num_bytes / 1e6:.1f} MB{_date(inspection)}"]
    lines += [f"{subset:<12} {pluralize(len(names), 'subject'):<10}  {_shortened(names)}".rstrip()
              for subset, names in inspection.subsets.items()]  # fmt: skip
    lines.append(f"{'points':<12} {_sampling(inspection.attributes)}")
    subset_of = {name: subset for subset, names in inspection.subsets.items() for name in names}
    for group in dict.fromkeys(name for groups in inspection.subjects.values() for name in groups):
        of_group = {subject: groups[group] for subject, groups in inspection.subjects.items() if group in groups}
        volumes = {subject: found for subject, found in of_group.items() if isinstance(found, VolumeSummary)}
        streamlines = {subject: found for subject, found in of_group.items() if isinstance(found, StreamlineSummary)}
        if volumes:
            lines += ["", f"{group} (volume)", *_volume_table(volumes, subset_of)]
        if streamlines:
            lines += ["", f"{group} (streamlines)", *_streamline_table(streamlines, subset_of)]
    lines += ["", *(f"Warning: {warning}" for warning in inspection.warnings[:_NUM_PROBLEMS])]
    if not inspection.problems:
        return "\n".join([*lines, "No problem found."])
    lines.append(pluralize(len(inspection.problems), "problem").upper())
    lines += [f"  {problem}" for problem in inspection.problems[:_NUM_PROBLEMS]]
    if len(inspection.problems) > _NUM_PROBLEMS:
        lines.append(f"  and {len(inspection.problems) - _NUM_PROBLEMS} more")
    return "\n".join(lines)


def _date(inspection: Inspection) -> str:
    date = inspection.attributes.get("data_and_time", "Not recorded")
    return "" if date == "Not recorded" else f", made {date}"


def _shortened(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _sampling(attributes: dict[str, str]) -> str:
    named = {name: text for name, text in attributes.items() if not text.startswith("Not defined")}
    if "step_size" in named:
        return f"resampled to a step of {named['step_size']} mm"
    if "nb_points" in named:
        return f"resampled to {named['nb_points']} points a streamline"
    if "compress" in named:
        return f"compressed to within {named['compress']} mm"
    return "as stored in the file"


def _volume_table(volumes: dict[str, VolumeSummary], subset_of: dict[str, str]) -> list[str]:
    rows = [["subject", "subset", "X x Y x Z", "features", "voxel mm", "axes"]]
    for subject, summary in volumes.items():
        shape = summary.shape or ()
        size, features = " x ".join(map(str, shape[:3])), str(shape[3]) if len(shape) == 4 else "?"
        rows.append([subject, subset_of.get(subject, "none"), size or "?", features, *_axes(summary)])
    harmonics = dict.fromkeys(filter(None, (_harmonics(summary.attributes) for summary in volumes.values())))
    return aligned(rows, left={0, 1, 2, 4, 5}, indent="  ") + [f"  {text}" for text in harmonics]


def _harmonics(attributes: Mapping[str, Any]) -> str:
    """Which spherical harmonics the features are; "" where they are others."""
    if "sh_order" not in attributes:
        return ""
    named = f"spherical harmonics of order {attributes['sh_order']}, basis {attributes.get('sh_basis', DEFAULT_BASIS)}"
    legacy = ", dipy's legacy definition" if attributes.get("sh_legacy", False) else ""
    return named + legacy + (", of an fODF" if attributes.get("sh_of") == "fodf" else assumed_signal(attributes))


def _axes(summary: VolumeSummary) -> list[str]:
    if summary.grid is None:
        return ["?", "?"]
    from nibabel.affines import voxel_sizes

    sizes = " x ".join(f"{size:.4g}" for size in voxel_sizes(summary.grid.affine))
    return [sizes, orientation_of(summary.grid.affine)]


def _streamline_table(streamlines: dict[str, StreamlineSummary], subset_of: dict[str, str]) -> list[str]:
    head = ["subject", "subset", "streamlines", "points", "length mm: mean", "std", "min", "max"]
    rows = [[*head, "step mm: mean", "min", "max"]]
    for subject, summary in streamlines.items():
        rows.append([subject, subset_of.get(subject, "none"), *_measures([summary])])
    if len(streamlines) > 1:
        rows.append(["all", "", *_measures(list(streamlines.values()))])
    extras = list(dict.fromkeys(extra for summary in streamlines.values() for extra in summary.extras))
    bundles = list(dict.fromkeys(name for summary in streamlines.values() for name in summary.bundles))
    extras += [f"{pluralize(len(bundles), 'bundle')}: {_shortened(bundles)}"] if bundles else []
    return aligned(rows, left={0, 1}, indent="  ") + [f"  with {extra}" for extra in extras]


def _measures(summaries: list[StreamlineSummary]) -> list[str]:
    lengths = np.concatenate([np.empty(0), *(found.lengths for found in summaries if found.lengths is not None)])
    steps = [found.steps for found in summaries if found.steps is not None]
    counts = [sum(summary.num_streamlines for summary in summaries), sum(summary.num_points for summary in summaries)]
    texts = [f"{count:,}" for count in counts]
    texts += [f"{f(lengths):.1f}" for f in (np.mean, np.std, np.min, np.max)] if len(lengths) else ["?"] * 4
    if not steps:
        return texts + ["?"] * 3
    mean = sum(found.total for found in steps) / sum(found.number for found in steps)
    ends = min(found.least for found in steps), max(found.greatest for found in steps)
    return texts + [f"{value:.3f}" for value in (mean, *ends)]
