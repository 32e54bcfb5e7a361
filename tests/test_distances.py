"""Lag, final distance and connectivity: closed forms, and loops over streamlines."""

from __future__ import annotations

import numpy as np
import pytest
from test_scores import some_tracked

from dwiml_func.data.streamlines import Streamlines
from dwiml_func.tracking.connectivity import (
    connection_counts,
    connectivity_scores,
    end_points,
    regions_of_blocs,
    regions_of_labels,
)
from dwiml_func.tracking.distances import final_distances, lags


def test_a_line_along_another_chord_of_a_circle_lags_by_what_geometry_tells() -> None:
    radius, angles = 50.0, np.linspace(0, np.pi, 20001)
    circle = radius * np.stack([np.sin(angles), 1 - np.cos(angles), 0 * angles], axis=1)
    straight = np.stack([np.arange(101.0), np.zeros(101), np.zeros(101)], axis=1)
    received = lags(Streamlines.from_list([straight]), Streamlines.from_list([circle]))
    ways = np.array([10.0, 20, 40, 80])
    on_circle = radius * np.stack([np.sin(ways / radius), 1 - np.cos(ways / radius)], axis=1)
    expected = np.hypot(ways - on_circle[:, 0], on_circle[:, 1])
    np.testing.assert_allclose(received[0], expected, atol=1e-3)


def test_a_line_that_stopped_counts_where_it_stopped_and_a_short_real_one_does_not_count() -> None:
    real = Streamlines.from_list([[[0, 0, 0], [100, 0, 0]], [[0, 0, 0], [100, 0, 0]], [[0, 0, 0], [40, 0, 0]]])
    lines = Streamlines.from_list([[[0, 0, 0], [12, 0, 0]], [[0, 0, 0]], [[0, 0, 0], [100, 0, 0]]])
    expected = [[0, 8, 28, 68], [10, 20, 40, 80], [0, 0, 0, np.nan]]
    np.testing.assert_allclose(lags(lines, real), expected)


def test_final_distances_are_those_of_last_points() -> None:
    lines = some_tracked()
    received = final_distances(Streamlines.from_list(lines[:10]), Streamlines.from_list(lines[10:20]))
    expected = [np.linalg.norm(a[-1] - b[-1]) for a, b in zip(lines[:10], lines[10:20], strict=True)]
    np.testing.assert_allclose(received, expected)


def test_connections_are_those_of_loops_over_streamlines() -> None:
    rng = np.random.default_rng(0)
    shape, blocs = (12, 10, 9), (3, 2, 4)
    ends = rng.uniform(-0.5, 1.05, (200, 2, 3)) * shape
    labels = rng.choice([0, 3, 17, 40], shape)
    names = sorted(set(labels.reshape(-1).tolist()))
    expected = {"blocs": np.zeros((24, 24), int), "labels": np.zeros((4, 4), int)}
    for line in ends:
        rows = []
        for point in line:
            x, y, z = (
                min(max(int(np.floor(p * n / size)), 0), n - 1) for p, n, size in zip(point, blocs, shape, strict=True)
            )
            voxel = tuple(min(max(int(np.floor(p)), 0), size - 1) for p, size in zip(point, shape, strict=True))
            rows.append((x * 8 + y * 4 + z, names.index(int(labels[voxel]))))
        for kind, pair in zip(expected, zip(*rows, strict=True), strict=True):
            expected[kind][min(pair), max(pair)] += 1
    np.testing.assert_array_equal(connection_counts(regions_of_blocs(ends, shape, blocs), 24), expected["blocs"])
    np.testing.assert_array_equal(connection_counts(regions_of_labels(ends, labels), 4), expected["labels"])


def test_false_connections_are_dwi_mls_score_and_missing_ones_stand_beside_them() -> None:
    rng = np.random.default_rng(1)
    counts = np.triu(rng.integers(0, 3, (6, 6)))
    real = np.triu(rng.integers(0, 2, (6, 6)))
    false = sum(counts[i, j] * (1 - real[i, j]) for i in range(6) for j in range(6) if counts[i, j] > 0)
    missing = sum(1 for i in range(6) for j in range(6) if real[i, j] and not counts[i, j])
    for matrix in (real, real + real.T, real.T, real.astype(bool)):  # a triangle, or both
        received = connectivity_scores(counts, matrix)
        assert received.false_connections == pytest.approx(false / counts.sum())
        assert received.missing_connections == pytest.approx(missing / real.sum())
    nothing = connectivity_scores(np.zeros_like(counts), real)
    assert np.isnan(nothing.false_connections)
    assert nothing.missing_connections == 1
    assert np.isnan(connectivity_scores(counts, np.zeros_like(real)).missing_connections)


def test_end_points() -> None:
    lines = some_tracked()
    np.testing.assert_allclose(end_points(Streamlines.from_list(lines)), [[line[0], line[-1]] for line in lines])
