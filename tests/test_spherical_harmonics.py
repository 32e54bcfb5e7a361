"""The simulated signal and its spherical harmonics, against dipy."""

import warnings
from typing import Any

import numpy as np
import pytest

from dwiml_func.data.spherical_harmonics import (
    assumed_signal,
    half_sphere_directions,
    harmonics_fault,
    multi_tensor_signal,
    sh_matrix,
)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_the_signal_is_that_of_dipy():
    from dipy.core.gradients import gradient_table
    from dipy.sims.voxel import multi_tensor

    rng = np.random.default_rng(0)
    fibres, directions = unit(rng.normal(size=(5, 3, 3))), half_sphere_directions(30)
    fractions = rng.dirichlet([1, 1, 1], size=5)
    gradients = gradient_table(np.full(30, 1000.0), bvecs=directions)
    no_noise: Any = None  # dipy documents None, and annotates an integer
    expected = [
        multi_tensor(gradients, [[1.5e-3, 3e-4, 3e-4]] * 3, angles=fibre, fractions=100 * share, snr=no_noise)[0]
        for fibre, share in zip(fibres, fractions, strict=True)
    ]
    signal = multi_tensor_signal(fibres, fractions, directions, b_value=1000, parallel=1.5e-3, perpendicular=3e-4)
    np.testing.assert_allclose(signal, expected, rtol=1e-9)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("basis", ["descoteaux07", "tournier07"])
def test_the_coefficients_are_those_of_dipy(basis, legacy):
    from dipy.core.sphere import Sphere
    from dipy.reconst.shm import sf_to_sh

    directions = half_sphere_directions(60)
    function = np.random.default_rng(1).normal(size=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)  # of the legacy bases
        expected = sf_to_sh(function, Sphere(xyz=directions), sh_order_max=6, basis_type=basis, legacy=legacy, smooth=0)
    coefficients = np.linalg.pinv(sh_matrix(directions, 6, basis=basis, legacy=legacy)) @ function
    np.testing.assert_allclose(coefficients, expected, atol=1e-9)


def test_descoteaux07_is_orthonormal():
    directions = half_sphere_directions(20_000)
    values = sh_matrix(directions, 6)
    np.testing.assert_allclose(values.T @ values * 4 * np.pi / 20_000, np.eye(28), atol=1e-3)


def test_directions_are_spread_evenly_over_half_a_sphere():
    directions = half_sphere_directions(60)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1)
    assert (directions[:, 2] > 0).all()
    cosines = np.abs(directions @ directions.T)
    np.fill_diagonal(cosines, 0)
    nearest = np.degrees(np.arccos(cosines.max(axis=1)))
    # 60 caps of equal area on half a sphere have a diameter of 21 degrees.
    assert nearest.min() > 11
    assert nearest.max() < 22
    assert np.linalg.cond(sh_matrix(directions, 6)) < 3


@pytest.mark.parametrize(
    ("attributes", "named"),
    [
        ({}, None),
        ({"sh_order": 2, "sh_basis": "tournier07", "sh_of": "fodf"}, None),
        ({"sh_order": 2.0, "standardization_mean": [0.5], "standardization_std": 1}, None),
        ({"standardization_mean": np.zeros(6), "standardization_std": np.ones(6)}, None),
        ({"standardization_mean": np.zeros(5)}, "'standardization_mean' of shape (5,). Expected one finite number"),
        ({"standardization_mean": [0, 0, 0, 0, 0, np.nan]}, "'standardization_mean'"),
        ({"standardization_std": [1, 1, 1, 1, 1, 0.0]}, "'standardization_std'"),
        ({"standardization_std": "one"}, "'standardization_std'"),
        ({"sh_order": 4}, "Expected 15 features for spherical harmonics of order 4. Received: 6"),
        *(({"sh_order": order}, "Expected an even number of at least 0") for order in (-2, 1.5, 3, "two", [2, 2])),
        ({"sh_order": 2, "sh_basis": "mine"}, "'sh_basis' is 'mine'"),
        ({"sh_order": 2, "sh_of": "noise"}, "'sh_of' is 'noise'"),
    ],
)
def test_attributes_of_harmonics_fit_or_are_named(attributes, named):
    fault = harmonics_fault(attributes, 6)
    assert fault is None if named is None else fault is not None and named in fault


def test_directions_whose_length_is_1_to_rounding_have_values():
    along = sh_matrix(np.array([[0, 0, 1.0], [0, 0, 1 + 1e-15]]), 4)
    np.testing.assert_array_equal(along[1], along[0])


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match=r"at least one direction\. Received: 0"):
        half_sphere_directions(0)
    for order in (3, -2):
        with pytest.raises(ValueError, match=f"even order of spherical harmonics. Received: {order}"):
            sh_matrix(np.eye(3), order)
    with pytest.raises(ValueError, match=r"sh_basis: expected one of descoteaux07, tournier07, received 'tournier'"):
        sh_matrix(np.eye(3), 4, basis="tournier")


@pytest.mark.parametrize(
    ("attributes", "is_assumed"), [({"sh_order": 2}, True), ({"sh_order": 2, "sh_of": "fod"}, False), ({}, False)]
)
def test_harmonics_that_do_not_say_what_they_describe_are_taken_for_the_signals(attributes, is_assumed):
    assert assumed_signal(attributes) == (", taken for the signal's (no 'sh_of')" if is_assumed else "")
