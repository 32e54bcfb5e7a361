"""Resampling on flat arrays: what dipy does to each streamline alone, for all of them at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwiml_func.data.resampling import lengths_mm, resample, steps_for

COUNTS = st.lists(st.integers(2, 12), min_size=1, max_size=6)


def make(counts: list[int], seed: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lines = [rng.normal(size=(count, 3)).cumsum(axis=0) + rng.normal(scale=100, size=3) for count in counts]
    for line in lines[::2]:
        line[len(line) // 2] = line[len(line) // 2 - 1]  # a point may come twice
        line[-1] += 1
    return lines, np.concatenate(lines), np.cumsum([0, *counts])


@given(COUNTS, st.integers(0, 10**6), st.integers(1, 20))
def test_points_are_those_of_dipy(counts, seed, num_steps):
    from dipy.tracking.streamlinespeed import set_number_of_points

    lines, points, offsets = make(counts, seed)
    new_points, new_offsets = resample(points, offsets, np.full(len(lines), num_steps))
    expected = np.concatenate([set_number_of_points(line, num_steps + 1) for line in lines])
    np.testing.assert_allclose(new_points, expected, atol=1e-9)
    assert new_offsets.tolist() == [(num_steps + 1) * row for row in range(len(lines) + 1)]


@given(COUNTS, st.integers(0, 10**6), st.floats(0.05, 30))
def test_ends_stay_and_steps_come_closest_to_the_size(counts, seed, step_size):
    from dipy.tracking.streamlinespeed import length

    lines, points, offsets = make(counts, seed)
    lengths = lengths_mm(points, offsets)
    np.testing.assert_allclose(lengths, [length(line) for line in lines], rtol=1e-9)
    num_steps = steps_for(lengths, step_size)
    new_points, new_offsets = resample(points, offsets, num_steps)
    np.testing.assert_array_equal(new_points[new_offsets[:-1]], points[offsets[:-1]])
    np.testing.assert_array_equal(new_points[new_offsets[1:] - 1], points[offsets[1:] - 1])
    assert np.diff(new_offsets).tolist() == (num_steps + 1).tolist()
    closest = np.abs(lengths / num_steps - step_size)
    for other in (num_steps + 1, np.maximum(num_steps - 1, 1)):
        ratio = np.abs(np.log(lengths / other / step_size))
        assert (np.abs(np.log(lengths / num_steps / step_size)) <= ratio + 0.41).all()
    assert (closest[num_steps > 1] <= step_size / 3 + 1e-9).all()


@given(st.lists(st.floats(0.01, 200), min_size=1, max_size=9), st.floats(0.05, 30))
def test_by_dwi_mls_rule_there_are_as_many_points_as_steps_fit_rounded_up(lengths, step_size):
    found = steps_for(np.array(lengths), step_size, "dwi_ml")
    # Of scilpy's resample_streamlines_step_size: ceil(length / step_size) points, and two at least.
    assert (found + 1).tolist() == [max(2, int(np.ceil(length / step_size))) for length in lengths]


def test_a_million_points_are_resampled_without_a_loop():
    import time

    counts = np.full(10_000, 100)
    points = np.random.default_rng(0).normal(size=(counts.sum(), 3)).cumsum(axis=0)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    started = time.process_time()
    new_points, _ = resample(points, offsets, np.full(10_000, 49))
    together = time.process_time() - started
    assert len(new_points) == 500_000
    started = time.process_time()
    for number in range(1000):
        resample(points[number * 100 : number * 100 + 100], offsets[:2], np.array([49]))
    assert together < (time.process_time() - started) * 10 / 2


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_a_straight_line_is_divided_evenly(num_steps):
    line = np.array([[0.0, 0, 0], [1, 2, 2], [2, 4, 4]])
    points, _ = resample(line, np.array([0, 3]), np.array([num_steps]))
    np.testing.assert_allclose(np.diff(points, axis=0), np.tile(np.array([2, 4, 4]) / num_steps, (num_steps, 1)))
