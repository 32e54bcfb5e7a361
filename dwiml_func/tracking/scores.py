"""Scores of tracked streamlines beside real ones: which of them run from end to end of a bundle, and along it.

All streamlines are in mm, in one space. What is near is measured on the real streamlines alone: see `ReferenceBundle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwiml_func.core.rng import Key, fold_in, numpy_rng
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.streamlines import Streamlines, join_streamlines
from dwiml_func.tracking.distances import direct_flip_distances, equidistant_points, line_lengths
from dwiml_func.tracking.overlap import overlap_within, voxel_overlap

__all__ = [
    "BundleScores",
    "LineScores",
    "ReferenceBundle",
    "TractogramScores",
    "ceiling_scores",
    "reference_bundles",
    "score_lines",
    "score_tractogram",
]

_NUM_POINTS = 20  # of a streamline, for the mean direct-flip distance
_QUANTILE = 0.95  # of the real streamlines, each left out once, pass a threshold
_LEAST_ENDS_MM = 4.0
_MOST_LINES = 2000  # of a bundle, evenly spaced, to which others are compared
_NUM_SPLITS = 2  # into halves, each of which is scored against the other


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReferenceBundle:
    """A bundle of real streamlines, and how near a streamline must come to be of it.

    Args:
        name: of the bundle.
        lines: N streamlines in mm, at least two.
        points: (N, 20, 3) float64, equidistant points of them, turned to run one way; of every n-th, where the bundle
            has more than 2,000.
        ends_mm: how near to the nearest end of a cloud of ends a streamline must end: the distance that 95 % of the
            bundle's own ends keep from those of the others, at least 4 mm.
        mdf_mm: how near to the nearest streamline it must run (mean direct-flip distance), by the same rule.

    Example:
        >>> lines = Streamlines.from_list([[[0, 0, z], [50, 0, z]] for z in (0, 1, 2)])
        >>> (bundle,) = reference_bundles(lines, Bundles(("CST",), np.zeros(3, dtype=np.int64)))
        >>> bundle.ends_mm, bundle.mdf_mm
        (4.0, 1.0)
    """

    name: str
    lines: Streamlines
    points: NDArray[np.float64]
    ends_mm: float
    mdf_mm: float


class LineScores(NamedTuple):
    """What became of each of S streamlines: one of valid, wrong path, wrong connection and no connection.

    bundle: (S,) int64, of which bundle it is: the nearest among those whose rules it keeps best.
    valid: (S,) bool, it joins both ends of the bundle, and runs along it.
    both_ends: (S,) bool, it joins both ends of the bundle.
    wrong_path: (S,) bool, it joins both ends and does not run along the bundle.
    wrong_connection: (S,) bool, it ends at ends of bundles that do not belong together.
    no_connection: (S,) bool, at least one of its ends is at no end of a bundle.
    mdf: (S,) float64, mm, mean direct-flip distance to the nearest streamline of the bundle.
    lengths: (S,) float64, mm.

    Example:
        >>> LineScores._fields[:3]
        ('bundle', 'valid', 'both_ends')
    """

    bundle: NDArray[np.int64]
    valid: NDArray[np.bool_]
    both_ends: NDArray[np.bool_]
    wrong_path: NDArray[np.bool_]
    wrong_connection: NDArray[np.bool_]
    no_connection: NDArray[np.bool_]
    mdf: NDArray[np.float64]
    lengths: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleScores:
    """Scores of the streamlines of one bundle, of all, or their mean over bundles. Shares are of the streamlines.

    Args:
        num_streamlines: streamlines that were tracked.
        valid, both_ends, wrong_path, wrong_connection, no_connection: shares, see `LineScores`.
        length_mm: mean length.
        mdf_mm: mean of the mean direct-flip distances to the nearest real streamline.
        overlap, overreach, f1: by voxels, see `dwiml_func.tracking.Overlap`.
        overlap_2mm, overreach_2mm, f1_2mm: within 2 mm.

    Example:
        >>> [field.name for field in fields(BundleScores)][:3]
        ['num_streamlines', 'valid', 'both_ends']
    """

    num_streamlines: float
    valid: float
    both_ends: float
    wrong_path: float
    wrong_connection: float
    no_connection: float
    length_mm: float
    mdf_mm: float
    overlap: float
    overreach: float
    f1: float
    overlap_2mm: float
    overreach_2mm: float
    f1_2mm: float


class TractogramScores(NamedTuple):
    """Scores of a tractogram.

    bundles: by the name of the bundle.
    mean: the mean over the bundles that have streamlines.
    all: of all streamlines together.

    Example:
        >>> TractogramScores._fields
        ('bundles', 'mean', 'all')
    """

    bundles: dict[str, BundleScores]
    mean: BundleScores
    all: BundleScores


def reference_bundles(lines: Streamlines, bundles: Bundles) -> tuple[ReferenceBundle, ...]:
    """Measure the bundles of real streamlines: a threshold is what 95 % of them keep, each left out once.

    Args:
        lines: S real streamlines in mm, of any orientation.
        bundles: of which bundle each is.

    Returns:
        The bundles, without those that have no streamline.

    Raises:
        ValueError: a bundle has a single streamline.

    Example:
        >>> lines = Streamlines.from_list([[[0, 0, 0], [9, 0, 0]], [[9, 5, 0], [0, 5, 0]]])
        >>> reference_bundles(lines, Bundles(("CST", "AF"), np.array([0, 0])))[0].ends_mm
        5.0
    """
    numbers = [np.flatnonzero(bundles.ids == row) for row in range(len(bundles.names))]
    return tuple(
        _reference_bundle(name, lines.select(of_bundle))
        for name, of_bundle in zip(bundles.names, numbers, strict=True)
        if len(of_bundle) > 0
    )


def score_lines(
    lines: Streamlines, references: Sequence[ReferenceBundle], *, expected: NDArray[np.int64] | None = None
) -> LineScores:
    """Tell for each streamline whether it joins the ends of a bundle, and runs along it.

    Args:
        lines: S streamlines in mm, of one point or more.
        references: the real bundles.
        expected: (S,) int64, rows of `references`: of which bundle each streamline should be, where it was started on
            a real one; another bundle is then a wrong connection. None: any bundle counts.

    Returns:
        What became of each streamline.

    Example:
        >>> real = Streamlines.from_list([[[0, 0, z], [50, 0, z]] for z in (0, 1, 2)])
        >>> references = reference_bundles(real, Bundles(("CST",), np.zeros(3, dtype=np.int64)))
        >>> lines = Streamlines.from_list([[[49, 1, 0], [1, 0, 1]], [[0, 0, 0], [25, 0, 0]]])
        >>> score_lines(lines, references).valid.tolist()
        [True, False]
    """
    from scipy.spatial import KDTree

    points = equidistant_points(lines, _NUM_POINTS)
    joins = np.zeros((len(lines), len(references)), dtype=bool)
    mdf = np.zeros((len(lines), len(references)))
    is_at_an_end = np.zeros((len(lines), 2), dtype=bool)
    for row, reference in enumerate(references):
        near = np.stack(  # (S, 2, 2): the first, the last point of a line; the first, the last cloud
            [KDTree(reference.points[:, cloud]).query(points[:, [0, -1]])[0] <= reference.ends_mm for cloud in (0, -1)],
            axis=-1,
        )
        joins[:, row] = (near[:, 0, 0] & near[:, 1, 1]) | (near[:, 0, 1] & near[:, 1, 0])
        is_at_an_end |= near.any(axis=2)
        mdf[:, row] = np.minimum(*direct_flip_distances(points, reference.points)).min(axis=1)
    runs_along = joins & (mdf <= [reference.mdf_mm for reference in references])
    faults = 2 - joins.astype(np.int64) - runs_along
    best = faults == faults.min(axis=1, keepdims=True)
    bundle = np.where(best, mdf, np.inf).argmin(axis=1) if expected is None else expected
    rows = np.arange(len(lines))
    valid, both_ends = runs_along[rows, bundle], joins[rows, bundle]
    at_ends = is_at_an_end.all(axis=1)
    return LineScores(
        bundle,
        valid,
        both_ends,
        both_ends & ~valid,
        at_ends & ~both_ends,
        ~at_ends & ~both_ends,
        mdf[rows, bundle],
        line_lengths(lines),
    )


def score_tractogram(
    lines: Streamlines,
    references: Sequence[ReferenceBundle],
    *,
    voxel_sizes: tuple[float, float, float],
    expected: NDArray[np.int64] | None = None,
) -> TractogramScores:
    """Score a tractogram beside real bundles.

    Args:
        lines: S streamlines of two points or more, in mm from the corner of the grid.
        references: the real bundles, in the same space.
        voxel_sizes: of the grid, mm.
        expected: see `score_lines`.

    Returns:
        Scores of each bundle, their mean, and those of all streamlines together.

    Example:
        >>> real = Streamlines.from_list([[[0, 0, z], [50, 0, z]] for z in (0, 1, 2)])
        >>> references = reference_bundles(real, Bundles(("CST",), np.zeros(3, dtype=np.int64)))
        >>> scores = score_tractogram(real, references, voxel_sizes=(2.0, 2.0, 2.0))
        >>> scores.bundles["CST"].valid, scores.mean.f1
        (1.0, 1.0)
    """
    found = score_lines(lines, references, expected=expected)
    bundles = {}
    for row, reference in enumerate(references):
        of_bundle = np.flatnonzero(found.bundle == row)
        part = LineScores._make(values[of_bundle] for values in found)
        bundles[reference.name] = _summary(part, lines.select(of_bundle), reference.lines, voxel_sizes)
    real = join_streamlines([reference.lines for reference in references])
    return TractogramScores(bundles, _mean(list(bundles.values())), _summary(found, lines, real, voxel_sizes))


def ceiling_scores(
    lines: Streamlines, bundles: Bundles, *, voxel_sizes: tuple[float, float, float], key: Key
) -> TractogramScores | None:
    """Score real streamlines beside each other: what a tractogram can reach that is as good as they are.

    Each bundle is split at random into halves, each half is scored against the other, whose streamlines also set the
    thresholds; the scores are means over two splits.

    Args:
        lines: S real streamlines in mm from the corner of the grid.
        bundles: of which bundle each is.
        voxel_sizes: of the grid, mm.
        key: of the splits.

    Returns:
        As `score_tractogram`; None where a bundle has fewer than four streamlines.

    Example:
        >>> lines = Streamlines.from_list([[[0, 0, z], [50, 0, z]] for z in range(6)])
        >>> ceiling = ceiling_scores(
        ...     lines, Bundles(("CST",), np.zeros(6, dtype=np.int64)), voxel_sizes=(2.0, 2.0, 2.0), key=Key(0)
        ... )
        >>> ceiling.mean.both_ends
        1.0
    """
    sizes = np.bincount(bundles.ids, minlength=len(bundles.names))
    if (sizes[sizes > 0] < 4).any():
        return None
    found: list[TractogramScores] = []
    for split in range(_NUM_SPLITS):
        shuffled = numpy_rng(fold_in(key, split)).permutation(len(lines))
        shuffled = shuffled[np.argsort(bundles.ids[shuffled], kind="stable")]
        place = np.arange(len(lines)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        halves = [np.sort(shuffled[place % 2 == half]) for half in (0, 1)]
        for scored, others in (halves, halves[::-1]):
            references = reference_bundles(lines.select(others), Bundles(bundles.names, bundles.ids[others]))
            found.append(score_tractogram(lines.select(scored), references, voxel_sizes=voxel_sizes))
    names = found[0].bundles
    return TractogramScores(
        {name: _mean([scores.bundles[name] for scores in found]) for name in names},
        _mean([scores.mean for scores in found]),
        _mean([scores.all for scores in found]),
    )


def _reference_bundle(name: str, lines: Streamlines) -> ReferenceBundle:
    if len(lines) < 2:
        raise ValueError(f"Expected at least two streamlines in bundle {name!r}. Received: one.")
    compared = np.linspace(0, len(lines) - 1, min(len(lines), _MOST_LINES)).round().astype(np.int64)
    points = equidistant_points(lines.select(compared), _NUM_POINTS)
    direct, flipped = direct_flip_distances(points, points)
    middle = np.minimum(direct, flipped).sum(axis=1).argmin()
    turned = flipped[:, middle] < direct[:, middle]
    points[turned] = points[turned, ::-1]
    mdf = np.minimum(direct, flipped)
    np.fill_diagonal(mdf, np.inf)
    ends = [_to_the_others(points[:, end]) for end in (0, -1)]
    return ReferenceBundle(
        name=name,
        lines=lines,
        points=points,
        ends_mm=max(_LEAST_ENDS_MM, float(np.quantile(np.concatenate(ends), _QUANTILE))),
        mdf_mm=float(np.quantile(mdf.min(axis=1), _QUANTILE)),
    )


def _to_the_others(ends: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) mm from each of (N, 3) points to the nearest other one."""
    from scipy.spatial import KDTree

    return KDTree(ends).query(ends, k=2)[0][:, 1]


def _summary(
    found: LineScores, lines: Streamlines, reference: Streamlines, voxel_sizes: tuple[float, float, float]
) -> BundleScores:
    by_voxels, within = voxel_overlap(lines, reference, voxel_sizes), overlap_within(lines, reference)
    means = [float(values.mean()) if len(lines) else float("nan") for values in found[1:]]
    shares = dict(zip(LineScores._fields[1:6], means[:5], strict=True))
    return BundleScores(
        num_streamlines=len(lines),
        **shares,
        length_mm=means[6],
        mdf_mm=means[5],
        **by_voxels._asdict(),
        **{f"{name}_2mm": value for name, value in within._asdict().items()},
    )


def _mean(scores: Sequence[BundleScores]) -> BundleScores:
    """The mean of each score; bundles without streamlines have no part in it."""
    names = [field.name for field in fields(BundleScores)]
    table = np.array([[getattr(score, name) for name in names] for score in scores])
    known = np.isfinite(table)
    totals, counts = np.where(known, table, 0.0).sum(axis=0), known.sum(axis=0)
    return BundleScores(
        **{
            name: float(total / count) if count else float("nan")
            for name, total, count in zip(names, totals, counts, strict=True)
        }
    )
