from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from dwiml_func.data.interpolation import interpolate
from dwiml_func.data.neighborhood import (
    Neighborhood,
    check_cubic_voxels,
    direction_units,
    interpolate_neighborhood,
    neighborhood_vectors,
)

neighborhoods = st.builds(
    Neighborhood,
    type=st.sampled_from(["axes", "grid"]),
    radius=st.integers(1, 2),
    resolution=st.sampled_from([0.1, 0.5, 1.0, 1.5]),
)


def test_axes_come_from_the_nearest_to_the_farthest_as_in_dwi_ml():
    ring = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0], [0, -1, 0], [0, 0, -1]]
    expected = np.array([[0, 0, 0], *ring, *(2 * np.array(ring)).tolist()]) * 0.5
    found = neighborhood_vectors(Neighborhood(type="axes", radius=2, resolution=0.5))
    assert found.dtype == torch.float32
    assert found.tolist() == expected.tolist()


def test_the_grid_has_the_point_first_and_then_runs_by_x_y_z_as_in_dwi_ml():
    found = neighborhood_vectors(Neighborhood(type="grid", radius=1, resolution=1.5)).tolist()
    others = [list(step) for step in itertools.product((-1.5, 0.0, 1.5), repeat=3) if any(step)]
    assert found == [[0.0, 0.0, 0.0], *others]


@given(neighborhoods)
def test_the_number_of_points_is_known_without_making_them(neighborhood):
    vectors = neighborhood_vectors(neighborhood)
    assert len(vectors) == neighborhood.num_points
    assert len(vectors.unique(dim=0)) == len(vectors)


@given(neighborhoods, st.integers(0, 2**16))
def test_features_are_those_at_the_point_then_each_neighbours_clamped_outside(neighborhood, seed):
    rng = np.random.default_rng(seed)
    volume = rng.standard_normal((4, 3, 5, 2))
    points = rng.uniform(-1, 6, size=(15, 3))
    found = interpolate_neighborhood(torch.from_numpy(volume), torch.from_numpy(points), neighborhood)
    assert found.shape == (15, 2 * neighborhood.num_points)
    for number, vector in enumerate(neighborhood_vectors(neighborhood).double().numpy()):
        for feature in range(2):
            expected = map_coordinates(volume[..., feature], (points + vector - 0.5).T, order=1, mode="nearest")
            np.testing.assert_allclose(found[:, 2 * number + feature], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["nearest", "trilinear", "trilinear-corner"])
def test_no_neighborhood_is_the_point_alone_and_every_mode_passes_through(mode):
    generator = torch.Generator().manual_seed(1)
    volume, points = torch.randn(4, 4, 4, 3, generator=generator), torch.rand(9, 3, generator=generator) * 4
    alone = interpolate(volume, points, mode=mode)
    assert torch.equal(interpolate_neighborhood(volume, points, None, mode=mode), alone)
    around = interpolate_neighborhood(volume, points, Neighborhood(type="grid"), mode=mode)
    assert torch.equal(around[:, :3], alone)


def test_no_points_give_no_rows():
    found = interpolate_neighborhood(torch.zeros(2, 2, 2, 3), torch.zeros(0, 3), Neighborhood(type="axes"))
    assert found.shape == (0, 21)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "ball"}, r"expected one of axes, grid, received 'ball'\.$"),
        ({"type": "axes", "radius": 0}, "at least 1. Received: 0$"),
        ({"type": "axes", "resolution": 0.0}, "above 0 voxels. Received: 0.0$"),
        ({"type": "axes", "resolution": float("nan")}, "above 0 voxels. Received: nan$"),
    ],
)
def test_what_is_no_neighborhood_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Neighborhood(**options)


@pytest.mark.parametrize(("longest", "is_cubic"), [(2.0, True), (2.0019, True), (2.003, False), (3.0, False)])
def test_voxels_are_cubes_to_a_thousandth(longest, is_cubic):
    sizes = torch.tensor([2.0, longest, 2.0])
    expected = torch.ones(3) if is_cubic else sizes
    assert torch.equal(direction_units(sizes[None]), expected[None])


def test_a_neighbourhood_needs_cubes_to_a_thousandth():
    check_cubic_voxels(torch.tensor([[2.0, 2.0019, 2.0]]), ["a"])
    with pytest.raises(ValueError, match=r"Received: 2 x 2\.003 x 2 mm \(b\)"):
        check_cubic_voxels(torch.tensor([[2.0, 2.0, 2.0], [2.0, 2.003, 2.0]]), ["a", "b"])
