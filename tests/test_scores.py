"""Scores of tractograms: beside loops over streamlines in float64, dipy's distances, and what must be so."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from dwiml_func.core.rng import Key
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.tracking.distances import direct_flip_distances, equidistant_points, line_lengths, points_at
from dwiml_func.tracking.overlap import overlap_within, voxel_overlap
from dwiml_func.tracking.scores import ceiling_scores, reference_bundles, score_lines, score_tractogram

NAMES = ("arc", "straight", "bend")
VOXELS = (2.0, 1.5, 3.0)


def some_bundles(num: int = 12, seed: int = 0) -> tuple[list[np.ndarray], Bundles]:
    """Three bundles of curved lines in mm, of different numbers of points, half of them turned round."""
    rng = np.random.default_rng(seed)
    lines, share = [], np.linspace(0, 1, 60)[:, None]
    for name in NAMES:
        for _ in range(num):
            bend = {"arc": 30.0, "straight": 0.0, "bend": -12.0}[name] + rng.normal(0, 1.5)
            start = np.array([0.0, {"arc": 0.0, "straight": 40.0, "bend": 90.0}[name], 0.0]) + rng.normal(0, 2.0, 3)
            along = np.hstack([60 * share, bend * np.sin(np.pi * share), 5 * share])
            line = (start + along)[np.sort(rng.choice(60, rng.integers(20, 50), replace=False))]
            lines.append(line[:: rng.choice([-1, 1])].astype(np.float32).astype(np.float64))
    return lines, Bundles(NAMES, np.repeat(np.arange(3), num))


def some_tracked(seed: int = 1) -> list[np.ndarray]:
    """Lines beside those of `some_bundles`: along one, stopped early, leaving it, or from one to another."""
    real, _ = some_bundles(seed=seed)
    rng = np.random.default_rng(seed)
    lines = [line + rng.normal(0, 1.0, 3) for line in real]
    lines += [line[: len(line) // 2] for line in real[::3]]
    lines += [line + 25 * np.sin(np.pi * np.linspace(0, 1, len(line)))[:, None] * [0, 0, 1] for line in real[::4]]
    lines += [np.linspace(real[i][0], real[(i + 13) % 36][-1], 30) for i in range(0, 36, 3)]
    return [line.astype(np.float32).astype(np.float64) for line in lines]


def mdf(line: np.ndarray, other: np.ndarray) -> float:
    direct = [np.linalg.norm(p - q) for p, q in zip(line, other, strict=True)]
    flipped = [np.linalg.norm(p - q) for p, q in zip(line, other[::-1], strict=True)]
    return min(float(np.mean(direct)), float(np.mean(flipped)))


def walk(line: np.ndarray, distance: float) -> np.ndarray:
    """The point at a distance along a line, found segment by segment."""
    for first, second in pairwise(line):
        size = float(np.linalg.norm(second - first))
        if size > 0 and distance <= size:
            return first + (second - first) * distance / size
        distance -= size
    return line[-1]


def sampled(line: np.ndarray) -> np.ndarray:
    length = sum(np.linalg.norm(q - p) for p, q in pairwise(line))
    return np.array([walk(line, float(length * i / 19)) for i in range(20)])


def by_loops(tracked: list[np.ndarray], real: list[np.ndarray], bundles: Bundles) -> tuple[list[Any], list[Any]]:
    """Thresholds (ends, MDF) a bundle, and (bundle, class) a line."""
    parts = [[sampled(line) for line, row in zip(real, bundles.ids, strict=True) if row == b] for b in range(3)]
    for lines in parts:  # turn the lines as that one runs which is nearest to all
        sums = [sum(mdf(line, other) for other in lines) for line in lines]
        middle = lines[int(np.argmin(sums))]
        for i, line in enumerate(lines):
            straight = np.mean([np.linalg.norm(p - q) for p, q in zip(line, middle, strict=True)])
            turned = np.mean([np.linalg.norm(p - q) for p, q in zip(line[::-1], middle, strict=True)])
            lines[i] = line if straight <= turned else line[::-1]
    thresholds = []
    for lines in parts:
        ends, nearest = [], []
        for i, line in enumerate(lines):
            others = [other for j, other in enumerate(lines) if j != i]
            ends += [min(float(np.linalg.norm(line[e] - other[e])) for other in others) for e in (0, -1)]
            nearest.append(min(mdf(line, other) for other in others))
        thresholds.append((max(4.0, np.percentile(ends, 95)), np.percentile(nearest, 95)))
    found = []
    for line in map(sampled, tracked):
        joined, at_end = [], [False, False]
        for lines, (ends_mm, mdf_mm) in zip(parts, thresholds, strict=True):
            near = [[min(np.linalg.norm(line[e] - o[c]) for o in lines) <= ends_mm for c in (0, -1)] for e in (0, -1)]
            at_end = [before or any(now) for before, now in zip(at_end, near, strict=True)]
            distance = min(mdf(line, other) for other in lines)
            joins = (near[0][0] and near[1][1]) or (near[0][1] and near[1][0])
            joined.append((0 if joins and distance <= mdf_mm else 1 if joins else 2, distance))
        rank, _ = min(joined)
        kind = ("valid", "wrong path", "wrong connection" if all(at_end) else "no connection")[rank]
        found.append((joined.index(min(joined)), kind))
    return thresholds, found


def test_thresholds_and_classes_are_those_of_loops_over_streamlines() -> None:
    real, bundles = some_bundles()
    tracked = some_tracked()
    thresholds, expected = by_loops(tracked, real, bundles)
    references = reference_bundles(Streamlines.from_list(real), bundles)
    np.testing.assert_allclose([(r.ends_mm, r.mdf_mm) for r in references], thresholds, rtol=1e-9)
    found = score_lines(Streamlines.from_list(tracked), references)
    classes = {"valid": found.valid, "wrong path": found.wrong_path}
    classes |= {"wrong connection": found.wrong_connection, "no connection": found.no_connection}
    np.testing.assert_array_equal(sum(which.astype(int) for which in classes.values()), 1)  # each line is one of them
    names = [next(name for name, which in classes.items() if which[i]) for i in range(len(tracked))]
    assert list(zip(found.bundle.tolist(), names, strict=True)) == expected
    assert len(set(names)) == 4
    np.testing.assert_array_equal(found.both_ends, found.valid | found.wrong_path)


def test_mean_direct_flip_distances_are_dipys() -> None:
    from dipy.tracking.distances import bundles_distances_mdf
    from dipy.tracking.streamline import set_number_of_points

    real, _ = some_bundles()
    tracked = some_tracked()
    pairs = [[np.asarray(line, np.float32) for line in set_number_of_points(lines, 20)] for lines in (tracked, real)]
    points = [equidistant_points(Streamlines.from_list(lines), 20) for lines in (tracked, real)]
    received = np.minimum(*direct_flip_distances(*points))
    np.testing.assert_allclose(received, bundles_distances_mdf(*pairs), atol=1e-3)


def test_distances_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [equidistant_points(Streamlines.from_list(lines), 20) for lines in (some_tracked(), some_bundles()[0])]
    whole = direct_flip_distances(*points)
    monkeypatch.setattr("dwiml_func.tracking.distances._BLOCK_VALUES", 5000)
    np.testing.assert_allclose(direct_flip_distances(*points), whole, rtol=1e-14)


def test_points_along_lines_are_those_of_a_walk_and_stay_at_the_ends() -> None:
    lines = [*some_tracked()[:10], np.zeros((1, 3)), np.array([[0.0, 0, 0], [0, 0, 0], [0, 0, 2], [0, 0, 2]])]
    flat = Streamlines.from_list(lines)
    ways = np.random.default_rng(0).uniform(0, 80, (12, 7))
    expected = [[walk(line, way) for way in of_line] for line, of_line in zip(lines, ways, strict=True)]
    np.testing.assert_allclose(points_at(flat, ways), expected, atol=1e-9)
    np.testing.assert_array_equal(points_at(flat, -np.ones((12, 1)))[:, 0], [line[0] for line in lines])
    np.testing.assert_allclose(line_lengths(flat)[-2:], [0, 2])


def test_a_line_is_of_the_bundle_it_was_started_on_where_that_is_given() -> None:
    real, bundles = some_bundles()
    lines = Streamlines.from_list(real)
    references = reference_bundles(lines, bundles)
    own = score_lines(lines, references, expected=bundles.ids)
    other = score_lines(lines, references, expected=(bundles.ids + 1) % 3)
    assert own.valid.mean() > 0.9
    assert not other.valid.any()
    assert other.wrong_connection[own.valid].all()


def test_scores_are_shares_of_lines_their_mean_is_over_bundles_with_lines() -> None:
    real, bundles = some_bundles()
    references = reference_bundles(Streamlines.from_list(real), bundles)
    tracked = Streamlines.from_list([line for line in some_tracked() if line[:, 1].max() < 60])  # none of "bend"
    found = score_lines(tracked, references)
    scores = score_tractogram(tracked, references, voxel_sizes=VOXELS)
    assert scores.all.valid == found.valid.mean()
    assert scores.bundles["arc"].wrong_path == found.wrong_path[found.bundle == 0].mean()
    assert scores.bundles["bend"].num_streamlines == 0
    assert np.isnan(scores.bundles["bend"].valid)
    assert scores.bundles["bend"].overlap == 0
    two = [scores.bundles[name].valid for name in ("arc", "straight")]
    assert scores.mean.valid == pytest.approx(np.mean(two))
    assert scores.all.length_mm == pytest.approx(np.mean(line_lengths(tracked)))
    assert scores.all.mdf_mm == pytest.approx(np.mean(found.mdf))
    for name in ("valid", "both_ends", "wrong_path", "wrong_connection", "no_connection"):
        assert getattr(scores.all, name) == getattr(found, name).mean()
    every = Streamlines.from_list(real)
    by_voxels, within = voxel_overlap(tracked, every, VOXELS), overlap_within(tracked, every)
    for name in ("overlap", "overreach", "f1"):
        assert getattr(scores.all, name) == pytest.approx(getattr(by_voxels, name))
        assert getattr(scores.all, f"{name}_2mm") == pytest.approx(getattr(within, name))


def test_turning_lines_round_and_their_order_change_nothing() -> None:
    real, bundles = some_bundles()
    tracked = some_tracked()
    before = score_lines(Streamlines.from_list(tracked), reference_bundles(Streamlines.from_list(real), bundles))
    order = np.random.default_rng(0).permutation(len(real))
    shuffled = Streamlines.from_list([real[i][::-1] for i in order])
    references = reference_bundles(shuffled, Bundles(NAMES, bundles.ids[order]))
    after = score_lines(Streamlines.from_list([line[::-1] for line in tracked]), references)
    for received, expected in zip(after, before, strict=True):
        np.testing.assert_allclose(received, expected, atol=1e-9)


def test_the_ceiling_is_that_of_halves_and_addressed_by_its_key() -> None:
    real, bundles = some_bundles(20)
    lines = Streamlines.from_list(real)
    first, again, other = (ceiling_scores(lines, bundles, voxel_sizes=VOXELS, key=Key(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first is not None
    assert first.all.num_streamlines == 30
    assert 0.6 < first.mean.valid < 1
    assert 0.2 < first.mean.f1 < 0.95  # a half against itself would have 1


def test_the_ceiling_is_the_mean_of_both_halves_of_two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    real, bundles = some_bundles(5)
    lines = Streamlines.from_list(real)
    calls: list[tuple[Any, ...]] = []

    def recorded(scored: Streamlines, references: Any, **options: Any) -> Any:
        found = score_tractogram(scored, references, **options)
        others = [line for reference in references for line in reference.lines.to_list()]
        calls.append((*({tuple(line[0].tolist()) for line in part} for part in (scored.to_list(), others)), found))
        return found

    monkeypatch.setattr("dwiml_func.tracking.scores.score_tractogram", recorded)
    ceiling = ceiling_scores(lines, bundles, voxel_sizes=VOXELS, key=Key(0))
    assert ceiling is not None
    assert [len(scored) + len(others) for scored, others, _ in calls] == [15] * 4
    assert not any(scored & others for scored, others, _ in calls)
    assert calls[0][:2] == calls[1][1::-1]
    assert calls[2][:2] == calls[3][1::-1]
    assert {frozenset(calls[0][0]), frozenset(calls[0][1])} != {frozenset(calls[2][0]), frozenset(calls[2][1])}
    assert ceiling.all.f1 == pytest.approx(np.mean([found.all.f1 for *_, found in calls]))


def test_bundles_that_are_too_small() -> None:
    lines = Streamlines.from_list(some_bundles()[0][:4])
    bundles = Bundles(("one", "none", "more"), np.array([0, 2, 2, 2]))
    with pytest.raises(ValueError, match="at least two streamlines in bundle 'one'"):
        reference_bundles(lines, bundles)
    assert ceiling_scores(lines, bundles, voxel_sizes=VOXELS, key=Key(0)) is None
    assert [r.name for r in reference_bundles(lines, Bundles(("a", "b"), np.zeros(4, np.int64)))] == ["a"]
