"""A figure of a dataset: streamlines over the volume in three views, for some subjects, and the lengths of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dwiml_func.data.bundles import Bundles, join_bundles
from dwiml_func.data.grid import Grid
from dwiml_func.data.hdf5.layout import group_of, read_bundles, read_points, read_table, read_volume, subject_group
from dwiml_func.data.hdf5.problems import Checked, collect, open_hdf5
from dwiml_func.data.inspection.groups import StreamlineSummary, VolumeSummary
from dwiml_func.data.inspection.inspect import Inspection
from dwiml_func.data.interpolation import interpolate
from dwiml_func.data.streamlines import Streamlines, offsets_of
from dwiml_func.experiment.figures.streamline_views import (
    VIEWS,
    LineGroup,
    bundle_colours,
    draw_views,
    labels_of,
    view_limits,
    view_rows,
)

if TYPE_CHECKING:
    import h5py
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_dataset"]

_MOST_SUBJECTS = 4
_MOST_LINES = 300  # of a subject
_NUM_PIXELS = 160  # of a slice, along each axis
_NUM_BINS = 40
_GREY = "#666666"


class _Drawn(NamedTuple):
    """Of one subject: some streamlines in RAS mm, the colour group of each, (S,); a volume (X, Y, Z) and its grid."""

    name: str
    lines: Streamlines
    group: NDArray[np.int64]
    volume: tuple[NDArray[np.float32], Grid] | None


def draw_dataset(inspection: Inspection) -> Figure:
    """Draw at most four subjects, in turn from each subset, in the colours of bundles, or of subjects where not all
    have bundles; and the lengths of the streamlines of all subjects. What is corrupt is left out."""
    streamlines = {name: found for name, groups in inspection.subjects.items() if (found := _of(groups))}
    with open_hdf5(inspection.path) as file:
        bundles = {name: collect(_bundles(file, name, *found), []) for name, found in streamlines.items()}
        joined, ids = _grouped(bundles, streamlines)
        subjects = [_drawn(file, inspection, name, streamlines.get(name), ids) for name in _chosen(inspection)]
    lengths = _lengths_by_group(joined.names, ids, streamlines)
    colours = bundle_colours([len(of_group) for of_group in lengths])
    figure, rows = view_rows(max(1, len(subjects)), above=0.75, below=3.1)
    shown = [subject.lines for subject in subjects if len(subject.lines)]
    limits = view_limits(shown or [_corners(subject.volume[1]) for subject in subjects if subject.volume is not None])
    subset_of = {name: subset for subset, names in inspection.subsets.items() for name in names}
    for row, subject in zip(rows, subjects, strict=False):
        if subject.volume is not None:
            _draw_slices(row, *subject.volume, limits)
        parts = [subject.lines.select(np.flatnonzero(subject.group == number)) for number in range(len(colours))]
        groups = [LineGroup(lines, colour) for lines, colour in zip(parts, colours, strict=True)]
        draw_views(row, groups, limits, is_last=row is rows[-1])
        num = streamlines[subject.name][1].num_streamlines if subject.name in streamlines else 0
        drawn = f", {len(subject.lines)} drawn" if len(subject.lines) < num else ""
        text = f"{subject.name} ({subset_of.get(subject.name, 'no subset')}): {num:,} streamlines{drawn}"
        row[0].set_title(text, loc="left", fontsize=10, fontweight="bold")
    width, height = figure.get_size_inches()
    panel = figure.add_axes((0.65 / width, 0.55 / height, 6.0 / width, 1.6 / height))
    kind = "subjects" if None in bundles.values() else "bundles"
    _draw_lengths(panel, lengths, colours, labels_of(joined.names, colours, kind=kind))
    num_subjects = len(inspection.subjects)
    some = f", {len(subjects)} of {num_subjects} subjects" if len(subjects) < num_subjects else ""
    figure.suptitle(inspection.path.name + some, x=0.65 / width, y=1 - 0.12 / height, ha="left", va="top", fontsize=12)
    return figure


def _of(groups: Mapping[str, VolumeSummary | StreamlineSummary]) -> tuple[str, StreamlineSummary] | None:
    """The first group of streamlines of a subject."""
    return next(((name, found) for name, found in groups.items() if isinstance(found, StreamlineSummary)), None)


def _chosen(inspection: Inspection) -> list[str]:
    turns = [
        names[turn] for turn in range(_MOST_SUBJECTS) for names in inspection.subsets.values() if turn < len(names)
    ]
    chosen = [name for name in turns or inspection.subjects if name in inspection.subjects][:_MOST_SUBJECTS]
    return [name for name in inspection.subjects if name in chosen]


def _grouped(
    bundles: Mapping[str, Bundles | None], streamlines: Mapping[str, tuple[str, StreamlineSummary]]
) -> tuple[Bundles, dict[str, NDArray[np.int64]]]:
    """The groups that have colours, and by subject the group of each streamline: its bundle, or the subject itself."""
    known = [found for found in bundles.values() if found is not None]
    if len(known) < len(bundles):
        known = [
            Bundles((name,), np.zeros(found.num_streamlines, dtype=np.int64))
            for name, (_, found) in streamlines.items()
        ]
    joined = join_bundles(known)
    cuts = np.cumsum([len(found.ids) for found in known])[:-1]
    parts = np.split(joined.ids, cuts) if known else []
    return joined, dict(zip(streamlines, parts, strict=True))


def _bundles(file: h5py.File, subject: str, group_name: str, summary: StreamlineSummary) -> Checked[Bundles]:
    parent = yield from subject_group(file, subject)
    group = None if parent is None else (yield from group_of(parent, group_name, "streamlines"))
    return None if group is None else (yield from read_bundles(group, summary.num_streamlines))


def _drawn(
    file: h5py.File,
    inspection: Inspection,
    name: str,
    streamlines: tuple[str, StreamlineSummary] | None,
    ids: Mapping[str, NDArray[np.int64]],
) -> _Drawn:
    lines, rows = Streamlines.from_list([]), np.empty(0, dtype=np.int64)
    if streamlines is not None and streamlines[1].grid is not None:
        found = collect(_lines(file, name, streamlines[0]), [])
        if found is not None and len(found) == streamlines[1].num_streamlines:
            rows = np.linspace(0, len(found) - 1, min(len(found), _MOST_LINES)).round().astype(np.int64)
            lines = _to_ras(found.select(rows), streamlines[1].grid)
    volumes = inspection.subjects[name].items()
    volume_name = next((group for group, found in volumes if isinstance(found, VolumeSummary)), None)
    volume = None if volume_name is None else collect(_volume(file, name, volume_name), [])
    summary = None if volume_name is None else inspection.subjects[name][volume_name]
    grid = None if summary is None else summary.grid
    of_group = ids[name][rows] if len(rows) else rows
    return _Drawn(name, lines, of_group, None if volume is None or grid is None else (volume, grid))


def _lines(file: h5py.File, subject: str, group_name: str) -> Checked[Streamlines]:
    parent = yield from subject_group(file, subject)
    group = None if parent is None else (yield from group_of(parent, group_name, "streamlines"))
    table = None if group is None else (yield from read_table(group))
    if group is None or table is None:
        return None
    points = yield from read_points(group, table)
    if points is None:
        return None
    return Streamlines(torch.from_numpy(np.ascontiguousarray(points)), offsets_of(torch.from_numpy(table.lengths)))


def _volume(file: h5py.File, subject: str, group_name: str) -> Checked[NDArray[np.float32]]:
    """The first feature of a volume, (X, Y, Z)."""
    parent = yield from subject_group(file, subject)
    group = None if parent is None else (yield from group_of(parent, group_name, "volume"))
    values = None if group is None else (yield from read_volume(group))
    return None if values is None else np.ascontiguousarray(values[..., 0])


def _to_ras(lines: Streamlines, grid: Grid) -> Streamlines:
    affine = torch.from_numpy(grid.affine)
    points = (lines.points.double() - 0.5) @ affine[:3, :3].T + affine[:3, 3]
    return Streamlines(points.float(), lines.offsets)


def _corners(grid: Grid) -> Streamlines:
    corners = np.stack(np.meshgrid(*[(0, size) for size in grid.shape]), axis=-1).reshape(-1, 3)
    return _to_ras(Streamlines.from_list([corners]), grid)


def _draw_slices(row: Sequence[Axes], volume: NDArray[np.float32], grid: Grid, limits: NDArray[np.float64]) -> None:
    """Slices through the middle of what is shown, however the grid lies in space; light, so that lines stand out."""
    inverse, centres = np.linalg.inv(grid.affine), (np.arange(_NUM_PIXELS) + 0.5) / _NUM_PIXELS
    for (_, right, up), panel in zip(VIEWS, row, strict=True):
        across, upwards = (limits[axis, 0] + np.ptp(limits[axis]) * centres for axis in (right, up))
        places = np.broadcast_to(limits.mean(axis=1), (_NUM_PIXELS, _NUM_PIXELS, 3)).copy()
        places[..., right], places[..., up] = across[None, :], upwards[:, None]
        voxels = places.reshape(-1, 3) @ inverse[:3, :3].T + inverse[:3, 3] + 0.5
        read = interpolate(torch.from_numpy(volume)[..., None], torch.from_numpy(voxels).float())[:, 0].numpy()
        is_inside = ((voxels >= 0) & (voxels <= grid.shape)).all(axis=1)
        image = np.where(is_inside, read, np.nan).reshape(_NUM_PIXELS, _NUM_PIXELS)
        if is_inside.any():
            low, high = np.nanpercentile(image, [2, 98])
            extent = (*limits[right], *limits[up])
            panel.imshow(
                image, cmap="gray_r", vmin=low, vmax=low + 2.5 * max(high - low, 1e-6), extent=extent, origin="lower"
            )


def _lengths_by_group(
    names: Sequence[str], ids: Mapping[str, NDArray[np.int64]], streamlines: Mapping[str, tuple[str, StreamlineSummary]]
) -> list[NDArray[np.float64]]:
    known = {name: found.lengths for name, (_, found) in streamlines.items() if found.lengths is not None}
    lengths = np.concatenate([np.empty(0), *known.values()])
    group = np.concatenate([np.empty(0, dtype=np.int64), *(ids[name] for name in known)])
    return [lengths[group == number] for number in range(len(names))]


def _draw_lengths(
    panel: Axes, lengths: Sequence[NDArray[np.float64]], colours: Sequence[str], labels: Mapping[str, str]
) -> None:
    """A histogram for each colour."""
    whole = np.concatenate([np.empty(0), *lengths])
    panel.set_title(f"Lengths of all {len(whole):,} streamlines", loc="left", fontsize=10, fontweight="bold")
    panel.set_xlabel("length (mm)", fontsize=8)
    panel.set_ylabel("streamlines", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    if len(whole) == 0:
        panel.text(0.5, 0.5, "none", transform=panel.transAxes, ha="center", va="center", color=_GREY)
        return
    edges = np.histogram_bin_edges(whole, bins=_NUM_BINS)
    entries = {}  # given as they are: in a legend that is made by itself, names that begin with _ are hidden
    for colour, label in labels.items():
        own = np.concatenate([found for found, of in zip(lengths, colours, strict=True) if of == colour])
        counts = np.histogram(own, edges)[0]
        entries[f"{label} ({len(own):,})"] = panel.stairs(counts, edges, color=colour, linewidth=1.8)
    panel.legend(
        [*entries.values()], [*entries], loc="upper left", bbox_to_anchor=(1.02, 1.08), frameon=False, fontsize=9
    )
