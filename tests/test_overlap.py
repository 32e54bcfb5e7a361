"""Overlap and overreach: beside fine sampling, pairs of points one by one, and scilpy's definitions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from test_scores import some_bundles, some_tracked

from dwiml_func.data.streamlines import Streamlines
from dwiml_func.tracking.overlap import crossed_voxels, overlap_within, voxel_overlap

SIZES = (2.0, 1.5, 3.0)


def sampled_voxels(lines: list[np.ndarray]) -> set[tuple[int, ...]]:
    """Voxels of 1,000 points on each segment; pieces shorter than that may be missed."""
    share = (np.arange(1000) / 999)[:, None]
    points = [p + (q - p) * share for line in lines for p, q in pairwise(line)]
    return set(map(tuple, np.unique(np.floor(np.concatenate(points) / SIZES).astype(int), axis=0).tolist()))


def decoded(numbers: np.ndarray) -> set[tuple[int, ...]]:
    parts = np.stack([numbers >> 42, numbers >> 21 & (1 << 21) - 1, numbers & (1 << 21) - 1], axis=1)
    return set(map(tuple, (parts - (1 << 20)).tolist()))


def test_voxels_are_those_of_points_sampled_finely() -> None:
    lines = [line.astype(np.float32).astype(np.float64) for line in some_tracked()[::6]]
    found = decoded(crossed_voxels(Streamlines.from_list(lines), SIZES))
    sampled = sampled_voxels(lines)
    assert sampled <= found
    assert len(found - sampled) < 0.002 * len(found)  # corners cut by less than a thousandth of a segment


@pytest.mark.parametrize(
    ("line", "voxels"),
    [
        ([[0.5, 0.5, 0.5], [0.6, 0.5, 0.5]], {(0, 0, 0)}),
        ([[0.5, 0.5, 0.5], [3.5, 0.5, 0.5]], {(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)}),
        ([[3.5, 0.5, 0.5], [-0.5, 0.5, 0.5]], {(3, 0, 0), (2, 0, 0), (1, 0, 0), (0, 0, 0), (-1, 0, 0)}),
        ([[0.5, 0.5, 0.5], [2.5, 2.5, 2.5]], {(0, 0, 0), (1, 1, 1), (2, 2, 2)}),  # through corners
        ([[0.5, 1.5, 0.5], [1.5, 0.5, 0.5]], {(0, 1, 0), (1, 0, 0)}),  # through an edge
        ([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 1.2, 0.5]], {(0, 0, 0), (0, 1, 0)}),  # a point twice
        ([[0.5, 0.5, 0.5], [1.0, 0.5, 0.5]], {(0, 0, 0)}),  # up to a face
    ],
)
def test_voxels_of_a_line_are_those_that_geometry_tells(line: list, voxels: set) -> None:
    assert decoded(crossed_voxels(Streamlines.from_list([line]), (1.0, 1.0, 1.0))) == voxels


def test_shares_of_voxels_are_scilpys() -> None:
    """Overlap: TP / ground truth. Overreach: FP / the bundle. f1: Dice (scilpy, tractanalysis/scoring.py)."""
    real, tracked = some_bundles()[0], some_tracked()
    sets = [decoded(crossed_voxels(Streamlines.from_list(lines), SIZES)) for lines in (tracked, real)]
    shape = np.max([np.max(list(found), axis=0) for found in sets], axis=0) + 41
    masks = np.zeros((2, *shape), dtype=bool)
    for mask, found in zip(masks, sets, strict=True):
        mask[tuple(np.array(list(found)).T + 20)] = True
    true_positive, false_positive = (masks[0] & masks[1]).sum(), (masks[0] & ~masks[1]).sum()
    false_negative = (~masks[0] & masks[1]).sum()
    received = voxel_overlap(Streamlines.from_list(tracked), Streamlines.from_list(real), SIZES)
    assert received.overlap == pytest.approx(true_positive / masks[1].sum(), abs=1e-12)
    assert received.overreach == pytest.approx(false_positive / masks[0].sum(), abs=1e-12)
    dice = 2 * true_positive / (2 * true_positive + false_positive + false_negative)
    assert received.f1 == pytest.approx(dice, abs=1e-12)


@pytest.mark.parametrize(
    ("bundle", "expected"),
    [
        ("AF_L", (0.6460446247464503, 0.3591549295774648, 0.6434343434343435)),
        ("CC_ForcepsMajor", (0.5296928327645051, 0.40030911901081917, 0.5625226531351939)),
        ("CST_R", (0.6008298755186722, 0.40016570008285, 0.6003316749585407)),
    ],
)
def test_the_overlap_of_real_halves_is_that_of_scilpys_voxels(bundle: str, expected: tuple[float, ...]) -> None:
    """Figures of scilpy 2.3.0 (`compute_tract_counts_map`), on the example data: even streamlines beside odd ones."""
    from dwiml_func.data.example.bundles import load_bundles

    lines = load_bundles("sub_4")[bundle]  # the example's voxels of 2 mm have their faces at even mm
    received = voxel_overlap(Streamlines.from_list(lines[::2]), Streamlines.from_list(lines[1::2]), (2.0, 2.0, 2.0))
    np.testing.assert_allclose(received, expected, atol=1e-6)


def test_overlap_within_a_distance_is_that_of_all_pairs() -> None:
    def dense(lines: list[np.ndarray]) -> np.ndarray:
        found = []
        for line in lines:
            travelled = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
            places = np.linspace(0, travelled[-1], max(1, round(travelled[-1] / 0.5)) + 1)
            found.append(np.stack([np.interp(places, travelled, line[:, axis]) for axis in range(3)], axis=1))
        return np.concatenate(found)

    tracked, real = some_tracked()[::7], some_bundles()[0][::4]
    a, b = dense(tracked), dense(real)
    near = np.linalg.norm(a[:, None] - b[None], axis=-1) <= 2
    received = overlap_within(Streamlines.from_list(tracked), Streamlines.from_list(real))
    assert received.overlap == pytest.approx(near.any(axis=0).mean(), abs=1e-12)
    assert received.overreach == pytest.approx(1 - near.any(axis=1).mean(), abs=1e-12)


@pytest.mark.parametrize(("apart", "share"), [(2.0, 1.0), (2.001, 0.0)])
def test_the_distance_itself_is_within_the_distance(apart: float, share: float) -> None:
    lines, others = (Streamlines.from_list([[[0, y, 0], [10, y, 0]]]) for y in (0.0, apart))
    assert overlap_within(lines, others) == (share, 1 - share, share)


def test_nothing_tracked_covers_nothing() -> None:
    real, nothing = Streamlines.from_list(some_bundles()[0]), Streamlines.from_list([])
    for received in (voxel_overlap(nothing, real, SIZES), overlap_within(nothing, real)):
        assert received.overlap == 0
        assert np.isnan(received.overreach)
        assert np.isnan(received.f1)


def test_a_line_that_has_no_reference_lies_wholly_outside_it() -> None:
    tracked, nothing = Streamlines.from_list(some_bundles()[0]), Streamlines.from_list([])
    for received in (voxel_overlap(tracked, nothing, SIZES), overlap_within(tracked, nothing)):
        assert received.overreach == 1
        assert np.isnan(received.overlap)
        assert np.isnan(received.f1)
