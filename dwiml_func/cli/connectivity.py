"""`dwiml-func connectivity`."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from dwiml_func._checks import pluralize
from dwiml_func.cli._connectivity import bloc_image, check_options, names_of, read_matrix, write_labels, write_nifti
from dwiml_func.cli._messages import print_progress
from dwiml_func.cli._output import folders_above
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.data.creation.files import SingleFile
from dwiml_func.data.creation.tractograms import Tractogram, load_streamlines
from dwiml_func.data.creation.volumes import load_grid, load_labels
from dwiml_func.data.grid import Grid
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.data.tractogram_writers import new_tractogram
from dwiml_func.experiment.figures.connectivity import draw_connectivity
from dwiml_func.experiment.figures.plots import save_figure
from dwiml_func.files.atomic import atomic_write
from dwiml_func.tracking.connectivity import (
    connection_counts,
    connectivity_scores,
    end_points,
    mean_square_differences,
    regions_of_blocs,
    regions_of_labels,
    regions_of_longest_segments,
)

__all__ = ["Options", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Count which regions a tractogram's streamlines connect, by their ends: blocs of equal size, or labels. The matrix
    is that of dwi_ml: the smaller region is the row, the lower triangle is empty.

    Example: dwiml-func connectivity tracked.trk matrix.npy --labels atlas.nii.gz

    Example: dwiml-func connectivity matrix.npy --real real.npy
    """

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TRACTOGRAM OUT.npy")]
    """The streamlines, .trk, .tck or .trx, and the matrix to write; or, with --real, a matrix that was written."""
    nb_blocs: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N N]")] = ()
    """Blocs along each axis of the tractogram's grid, one number for all axes or three. dwi_ml has 20."""
    labels: Annotated[str | None, tyro.conf.arg(metavar="FILE.nii.gz")] = None
    """In place of blocs: regions. Rows are all labels of the volume in ascending order, the background 0 too; they are
    listed in OUT_labels.txt."""
    hide_background: Annotated[int | None, tyro.conf.arg(metavar="LABEL")] = None
    """With --labels: leave out the connections of this label. Its row and column stay, with zeros."""
    use_longest_segment: bool = False
    """With --labels: count the first and the last region that a streamline crosses with the background, label 0,
    between them, in place of those of its ends. Streamlines without such a segment have the last row, "not found"."""
    reference: Annotated[str | None, tyro.conf.arg(metavar="FILE.nii.gz")] = None
    """With --nb-blocs, for TCK, which has no grid: a volume on the streamlines' grid."""
    binary: bool = False
    """Write 1 where regions are connected, in place of counts."""
    real: Annotated[str | None, tyro.conf.arg(metavar="REAL.npy")] = None
    """A matrix of the same regions to compare with: print the shares of false and missing connections."""
    save_biggest: Annotated[str | None, tyro.conf.arg(metavar="OUT.trk")] = None
    """Write the streamlines of the largest entry."""
    save_smallest: Annotated[str | None, tyro.conf.arg(metavar="OUT.trk")] = None
    """Write the streamlines of the smallest entry above 0."""
    save_rejected: Annotated[str | None, tyro.conf.arg(metavar="OUT.trk")] = None
    """With --hide-background: write the streamlines that are left out."""
    save_blocs: Annotated[str | None, tyro.conf.arg(metavar="OUT.nii.gz")] = None
    """With --nb-blocs: write the blocs as labels, each the number of its row, from 1."""
    remove_invalid: bool = False
    """Leave out streamlines that leave the volume, have NaN points or have no length; otherwise they are an error."""
    figure: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw the matrix, counts on a logarithmic scale, as .png, .svg or .pdf."""
    overwrite: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Replace existing files."""

    @property
    def blocs(self) -> tuple[int, int, int]:
        """The blocs along each axis."""
        x, y, z = self.nb_blocs * (3 if len(self.nb_blocs) == 1 else 1)
        return x, y, z


def run(options: Options) -> int:
    """Write the matrix, or compare one that was written."""
    check_options(options)
    real = None if options.real is None else read_matrix(options.real)
    if len(options.paths) == 1:
        assert real is not None
        _print_scores(read_matrix(options.paths[0]), real, options)
        return 0
    path = SingleFile.at(options.paths[0])
    labels = None if options.labels is None else load_labels(SingleFile.at(options.labels), None)
    where = options.labels or options.reference
    expected = None if where is None else load_grid(SingleFile.at(where))
    lines = load_streamlines(
        [path], expected=expected, remove_invalid=options.remove_invalid, allow_empty=True, note=print_progress
    )
    assert lines.grid is not None
    streamlines = Streamlines(torch.from_numpy(lines.points), torch.from_numpy(lines.offsets))
    if labels is None:
        regions = regions_of_blocs(end_points(streamlines), lines.grid.shape, options.blocs)
        names = list(map(str, range(1, math.prod(options.blocs) + 1)))
    elif options.use_longest_segment:
        regions, names = regions_of_longest_segments(streamlines, labels), [*names_of(labels), "not found"]
    else:
        regions, names = regions_of_labels(end_points(streamlines), labels), names_of(labels)
    kept = np.ones(len(regions), dtype=bool)
    if options.hide_background is not None:
        if str(options.hide_background) not in names:
            raise ValueError(f"hide_background: expected a label of {options.labels}, received another one.")
        kept = (regions != names.index(str(options.hide_background))).all(axis=1)
    counts = connection_counts(regions[kept], len(names))
    if real is not None and real.shape != counts.shape:
        raise ValueError(f"{options.real}: expected a matrix of {len(names)} rows, received {len(real)}.")
    _write(options, lines, regions, kept, counts)
    if labels is not None:
        write_labels(options.paths[1], names)
    if options.figure is not None:
        with folders_above(options.figure) as path:
            save_figure(draw_connectivity(counts, names, title=options.paths[0]), path)
    if options.save_blocs is not None:
        write_nifti(options.save_blocs, bloc_image(lines.grid.shape, options.blocs), lines.grid)
    num_pairs, hidden = int(np.count_nonzero(counts)), len(kept) - int(kept.sum())
    left_out = f", {pluralize(hidden, 'streamline')} of label {options.hide_background} left out" if hidden else ""
    print(
        f"{options.paths[1]}: {pluralize(int(kept.sum()), 'streamline')}, "
        f"{pluralize(num_pairs, 'connection')} between {len(names)} regions{left_out}"
    )
    if real is not None:
        _print_scores(counts, real, options)
    return 0


def _write(
    options: Options, lines: Tractogram, regions: NDArray[np.int64], kept: NDArray[np.bool_], counts: NDArray[np.int64]
) -> None:
    """The matrix, and the streamlines that are asked for."""
    low, high = regions.min(axis=1), regions.max(axis=1)
    entries = {}
    if counts.any():
        entries["save_biggest"] = np.unravel_index(counts.argmax(), counts.shape)
        smallest = np.where(counts > 0, counts, counts.max() + 1).argmin()
        entries["save_smallest"] = np.unravel_index(smallest, counts.shape)
    chosen = {name: (low == row) & (high == column) for name, (row, column) in entries.items()}
    chosen["save_rejected"] = ~kept
    for name in ("save_biggest", "save_smallest", "save_rejected"):
        out = getattr(options, name)
        if out is not None:
            _save_lines(out, lines, chosen.get(name, np.zeros(len(kept), dtype=bool)), overwrite=options.overwrite)
    buffer = io.BytesIO()
    np.save(buffer, (counts > 0).astype(np.uint8) if options.binary else counts)
    with folders_above(options.paths[1]) as path:
        atomic_write(path, buffer.getvalue())


def _save_lines(out: str, lines: Tractogram, chosen: NDArray[np.bool_], *, overwrite: bool) -> None:
    grid: Grid | None = lines.grid
    assert grid is not None
    found = Streamlines(torch.from_numpy(lines.points).float(), torch.from_numpy(lines.offsets)).select(
        torch.from_numpy(chosen.nonzero()[0])
    )
    with folders_above(out) as path, new_tractogram(path, grid, overwrite=overwrite) as file:
        file.write(found.points.numpy(), found.offsets.numpy())


def _print_scores(counts: NDArray, real: NDArray, options: Options) -> None:
    if counts.shape != real.shape:
        raise ValueError(f"{options.real}: expected a matrix of {len(counts)} rows, received {len(real)}.")
    scores = connectivity_scores(counts.astype(np.int64), real)
    print(f"false connections {scores.false_connections:.4f} of the streamlines, beside {options.real}")
    print(f"missing connections {scores.missing_connections:.4f} of the real ones")
    if counts.any() and real.any() and max(counts.max(), real.max()) > 1:
        raw, shares = mean_square_differences(counts, real)
        print(f"mean square of the difference {raw:.6g}, of shares of all streamlines {shares:.6g}")
