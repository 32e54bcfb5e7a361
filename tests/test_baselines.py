"""The two baselines and the angle that measures them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.spherical_harmonics import half_sphere_directions, multi_tensor_signal, sh_matrix
from dwiml_func.data.streamlines import Streamlines, directions
from dwiml_func.models.baselines import angular_error, keep_straight, principal_direction

SH6 = {"sh_order": 6}


def make_batch(lines, inputs=None) -> StreamlineBatch:
    streamlines = Streamlines.from_list(lines)
    ids = torch.arange(len(streamlines))
    if inputs is None:
        inputs = torch.zeros(len(streamlines.points) - len(streamlines), 28)
    return StreamlineBatch(
        points=streamlines.points, offsets=streamlines.offsets, subject=ids * 0, ids=ids, inputs=inputs
    )


def random_lines(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [np.cumsum(rng.normal(size=(n, 3)), axis=0) for n in lengths]


def noisy_sh(num, seed=0, order=6, **basis) -> tuple[np.ndarray, np.ndarray]:
    """SH coefficients of noisy one-fibre signals, and their fibres."""
    rng = np.random.default_rng(seed)
    fibres = rng.normal(size=(num, 1, 3))
    fibres /= np.linalg.norm(fibres, axis=-1, keepdims=True)
    g = half_sphere_directions(60)
    signal = multi_tensor_signal(fibres, np.ones((num, 1)), g, b_value=1000, parallel=1.5e-3, perpendicular=3e-4)
    signal += rng.normal(size=signal.shape) / 30
    return signal @ np.linalg.pinv(sh_matrix(g, order, **basis)).T, fibres[:, 0]


def axial_error(a, b):
    errors = angular_error(torch.as_tensor(a), torch.as_tensor(b))
    return torch.minimum(errors, 180 - errors)


@given(
    st.floats(0, 180),
    st.floats(-30, 30),
    st.floats(-30, 30),
    st.integers(0, 2**32 - 1),
)
def test_the_angle_is_the_one_the_vectors_were_made_with(degrees, log_length_u, log_length_v, seed):
    frame, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    u, w = frame.T[:2]
    v = np.cos(np.radians(degrees)) * u + np.sin(np.radians(degrees)) * w
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        pair = (torch.tensor(x * 10.0**n, dtype=dtype)[None] for x, n in ((u, log_length_u), (v, log_length_v)))
        error = angular_error(*pair)
        assert error.dtype == dtype
        assert abs(error.item() - degrees) < tolerance


def test_equal_and_opposite_directions_are_exact():
    u = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    assert (angular_error(u, u) == 0).all()
    assert (angular_error(u, -u) == 180).all()


def test_what_has_no_direction_is_90_degrees_from_all_and_sizes_do_not_count():
    one, none = torch.tensor([[0.0, 1, 0]]), torch.zeros(1, 3)
    assert [angular_error(a, b).item() for a, b in ((none, one), (one, none), (none, none))] == [90, 90, 90]
    assert angular_error(1e-30 * one, -1e30 * one).item() == 180


def test_small_angles_do_not_round_to_zero():
    error = angular_error(torch.tensor([[1.0, 0, 0]]), torch.tensor([[1.0, 1e-5, 0]]))
    assert error.item() == pytest.approx(np.degrees(1e-5), rel=1e-3)


def test_no_direction_counts_as_a_right_angle():
    nothing = torch.tensor([[0.0, 0, 0], [float("nan"), 1, 0], [float("inf"), 1, 0]])
    something = torch.tensor([[1.0, 2, 3]]).expand(3, 3)
    assert angular_error(nothing, something).tolist() == [90.0] * 3
    assert angular_error(something, nothing).tolist() == [90.0] * 3


def test_going_straight_repeats_the_previous_direction():
    lines = random_lines([4, 2, 1, 6])
    predictions, valid = keep_straight(make_batch(lines))
    expected = [np.concatenate([np.zeros((1, 3)), np.diff(line, axis=0)[:-1]]) for line in lines if len(line) > 1]
    np.testing.assert_allclose(predictions.numpy(), np.concatenate(expected), atol=1e-5)
    assert valid.tolist() == [False, True, True, False, False, True, True, True, True]


def test_going_straight_along_a_circle_is_off_by_the_turn_of_a_step():
    angles = np.radians(np.arange(0, 90, 3.0))
    batch = make_batch([np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1) * 20 + 50])
    predictions, valid = keep_straight(batch)
    errors = angular_error(predictions, directions(batch.points, batch.offsets))[valid]
    np.testing.assert_allclose(errors.numpy(), 3.0, atol=1e-2)


def test_the_principal_direction_is_that_of_dipy():
    from dipy.core.gradients import gradient_table
    from dipy.reconst.dti import TensorModel

    sh, fibres = noisy_sh(300)
    batch = make_batch(random_lines([101] * 3), torch.tensor(sh, dtype=torch.float32))
    result = principal_direction(batch, SH6)
    assert result is not None
    predictions, valid = result

    g = half_sphere_directions(150)
    gradients = gradient_table(np.r_[0, np.full(150, 1000.0)], bvecs=np.r_[[[0, 0, 0]], g])
    signal = np.concatenate([np.ones((300, 1)), sh @ sh_matrix(g, 6).T], axis=1)
    dipy = TensorModel(gradients, fit_method="OLS").fit(signal).evecs[..., 0]
    assert axial_error(predictions[valid].double(), dipy[valid.numpy()]).max() < 1
    assert axial_error(predictions[valid].double(), fibres[valid.numpy()]).mean() < 5


def test_the_sign_comes_from_the_previous_direction_and_lengths_are_one():
    batch = make_batch(random_lines([40, 3, 2, 60]), torch.tensor(noisy_sh(101)[0], dtype=torch.float32))
    result = principal_direction(batch, SH6)
    assert result is not None
    predictions, valid = result
    previous, straight_valid = keep_straight(batch)
    assert torch.equal(valid, straight_valid)
    assert ((predictions * previous).sum(dim=1)[valid] >= 0).all()
    torch.testing.assert_close(predictions[valid].norm(dim=1), torch.ones(int(valid.sum())))
    assert (predictions[~valid] == 0).all()


@pytest.mark.parametrize(
    ("mean", "std"), [(0.06, 0.32), (np.linspace(-1, 1, 28), np.linspace(0.1, 3, 28))], ids=["all", "independent"]
)
def test_standardisation_is_undone(mean, std):
    sh, lines = noisy_sh(100)[0], random_lines([101])
    plain = principal_direction(make_batch(lines, torch.tensor(sh, dtype=torch.float32)), SH6)
    standardised = make_batch(lines, torch.tensor((sh - mean) / std, dtype=torch.float32))
    attributes = {**SH6, "standardization_mean": mean, "standardization_std": std}
    undone = principal_direction(standardised, attributes)
    assert plain is not None
    assert undone is not None
    assert angular_error(undone[0], plain[0])[plain[1]].max() < 0.01


def test_the_basis_of_the_attributes_is_used():
    lines, reference = random_lines([101]), None
    for basis in ("descoteaux07", "tournier07"):
        for legacy in (False, True):
            sh = noisy_sh(100, order=8, basis=basis, legacy=legacy)[0]
            attributes = {"sh_order": 8, "sh_basis": basis, "sh_legacy": np.bool_(legacy)}
            result = principal_direction(make_batch(lines, torch.tensor(sh, dtype=torch.float32)), attributes)
            assert result is not None
            reference = result if reference is None else reference
            assert angular_error(result[0], reference[0])[result[1]].max() < 0.01


def test_of_an_fodf_the_peak_near_the_previous_direction_is_followed():
    g, fibres = (
        half_sphere_directions(300),
        torch.nn.functional.normalize(torch.tensor([[3.0, 1, 0], [-1, 1, 2]]), dim=1),
    )
    lobes = (g @ fibres.numpy().T) ** 8  # of order 8: the fit is exact
    sh = np.linalg.pinv(sh_matrix(g, 8)) @ (lobes @ [1.0, 0.6])
    attributes = {"sh_order": 8, "sh_of": "fodf"}
    for fibre, sign in ((0, 1), (0, -1), (1, 1), (1, -1)):
        line = np.arange(4.0)[:, None] * (sign * fibres[fibre] + torch.tensor([0.1, 0.2, -0.1])).numpy()
        result = principal_direction(make_batch([line], torch.tensor(sh, dtype=torch.float32).repeat(3, 1)), attributes)
        assert result is not None
        assert angular_error(result[0], sign * fibres[[fibre]].expand(3, 3))[result[1]].max() < 7  # grid, other lobe


def test_signal_below_zero_is_no_trouble():
    g = half_sphere_directions(60)
    sh = np.linalg.pinv(sh_matrix(g, 6)) @ (0.5 - 0.8 * g[:, 2] ** 2)  # -0.3 along z
    line = np.stack([np.zeros(4), np.zeros(4), np.arange(4.0)], axis=1)
    result = principal_direction(make_batch([line], torch.tensor(sh, dtype=torch.float32).repeat(3, 1)), SH6)
    assert result is not None
    assert angular_error(result[0], torch.tensor([[0.0, 0, 1]]).expand(3, 3))[result[1]].max() < 1


def test_inputs_that_are_not_known_to_be_sh_give_none():
    assert principal_direction(make_batch(random_lines([5])), {"nb_features": 28}) is None


def test_a_number_of_features_that_does_not_fit_the_order_is_refused():
    with pytest.raises(ValueError, match=r"Expected 45 features for .* order 8\. Received: 28"):
        principal_direction(make_batch(random_lines([5])), {"sh_order": 8})


def test_a_batch_without_streamlines_gives_no_rows():
    batch = make_batch([])
    result = principal_direction(batch, SH6)
    assert result is not None
    for tensor in (*keep_straight(batch), *result):
        assert len(tensor) == 0


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_angles_do_not_depend_on_the_size_of_vectors_along_an_axis_or_beside_it(size):
    vectors = size * torch.tensor([[1.0, 0, 0], [1.0, 1, 0], [0, 0, -1]])
    errors = angular_error(vectors, torch.tensor([[2.0, 0, 0], [1.0, 0, 0], [0, 3, 0]]))
    torch.testing.assert_close(errors, torch.tensor([0.0, 45.0, 90.0]))
