"""Each direction getter's loss against a closed form, its density against its integral, its samples against both."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.models.direction_getters import DIRECTION_GETTERS, DirectionGetter, make_direction_getter
from dwiml_func.models.direction_getters.base import sample_classes
from dwiml_func.models.direction_getters.fisher_von_mises import (
    fisher_von_mises_log_density,
    sample_fisher_von_mises,
)
from dwiml_func.models.direction_getters.gaussian import gaussian_log_density
from dwiml_func.models.direction_getters.sphere_classification import sphere_vertices

scipy: Any = import_module(
    "scipy"
)  # without its parts, which are imported where they are used; its stubs are too narrow
RNG = np.random.default_rng(5)
TARGETS = RNG.normal(size=(40, 3)) * RNG.uniform(0.1, 4, size=(40, 1))
FEATURES = torch.from_numpy(3 * RNG.normal(size=(40, 9)))


def made(key: str, **options: Any) -> tuple[DirectionGetter, np.ndarray]:
    """A getter in float64, and its outputs at 40 points."""
    with torch_rng(Key(1)):
        getter = make_direction_getter(key, 9, **options).double()
    return getter, getter(FEATURES).detach().numpy()


def losses(getter: DirectionGetter, outputs: np.ndarray) -> np.ndarray:
    return getter.losses(torch.from_numpy(outputs), torch.from_numpy(TARGETS)).numpy()


def units(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_regressions_compare_angles_and_distances():
    getter, outputs = made("cosine-regression")
    cosines = 1 - (units(outputs) * units(TARGETS)).sum(axis=1)
    np.testing.assert_allclose(losses(getter, outputs), cosines, rtol=1e-10)
    getter, outputs = made("l2-regression")
    distances = np.linalg.norm(outputs - TARGETS + 1e-6, axis=1)
    np.testing.assert_allclose(losses(getter, outputs), distances, rtol=1e-10)
    getter, outputs = made("cosine-plus-l2-regression")
    both = 1 - (units(outputs) * units(TARGETS)).sum(axis=1) + np.linalg.norm(outputs - TARGETS + 1e-6, axis=1)
    np.testing.assert_allclose(losses(getter, outputs), both, rtol=1e-10)


def test_normalisation_gives_targets_and_outputs_their_lengths():
    getter, outputs = made("l2-regression", normalize_targets=2.0, normalize_outputs=0.5)
    np.testing.assert_allclose(np.linalg.norm(outputs, axis=1), 0.5)
    distances = np.linalg.norm(outputs - 2 * units(TARGETS) + 1e-6, axis=1)
    np.testing.assert_allclose(losses(getter, outputs), distances, rtol=1e-10)


@pytest.mark.parametrize("key", ["l2-regression", "cosine-plus-l2-regression", "gaussian", "gaussian-mixture"])
def test_targets_of_a_length_are_compared_in_every_loss_that_knows_lengths(key):
    getter, outputs = made(key)
    twice = torch.from_numpy(2 * units(TARGETS))
    expected = getter.losses(torch.from_numpy(outputs), twice).numpy()
    np.testing.assert_allclose(losses(made(key, normalize_targets=2.0)[0], outputs), expected, rtol=1e-10)


def test_normalised_outputs_with_eos_have_their_length_in_all_four_columns_and_0_is_none():
    plain, with_eos = (made("l2-regression", add_eos=True, **o)[1] for o in ({}, {"normalize_outputs": 0.5}))
    np.testing.assert_allclose(with_eos, 0.5 * units(plain), rtol=1e-10)
    np.testing.assert_array_equal(made("l2-regression", add_eos=True, normalize_outputs=0.0)[1], plain)


@pytest.mark.parametrize("key", ["sphere-classification", "smooth-sphere-classification"])
def test_eos_is_one_class_of_all_whose_label_is_1_at_last_points(key):
    getter, outputs = made(key, sphere="repulsion100", add_eos=True)
    is_last = np.arange(40) % 4 == 3
    targets = TARGETS * ~is_last[:, None]
    found = getter.losses(*map(torch.from_numpy, (outputs, targets, is_last))).numpy()
    np.testing.assert_allclose(found[is_last], -log_softmax(outputs)[is_last, -1], rtol=1e-10)
    # Elsewhere EOS takes its share of the probability, and nothing else changes.
    without = losses(made(key, sphere="repulsion100")[0], outputs[:, :-1])
    share = scipy.special.logsumexp(outputs, axis=1) - scipy.special.logsumexp(outputs[:, :-1], axis=1)
    np.testing.assert_allclose(found[~is_last], (without + share)[~is_last], rtol=1e-9)


def test_classification_is_the_cross_entropy_with_the_nearest_point():
    getter, outputs = made("sphere-classification", sphere="repulsion100")
    vertices = sphere_vertices("repulsion100").double().numpy()
    nearest = np.linalg.norm(units(TARGETS)[:, None] - vertices, axis=2).argmin(axis=1)
    expected = -log_softmax(outputs)[np.arange(40), nearest]
    np.testing.assert_allclose(losses(getter, outputs), expected, rtol=1e-10)


def test_smooth_classification_is_the_divergence_from_labels_that_fall_with_the_angle():
    getter, outputs = made("smooth-sphere-classification", sphere="repulsion100")
    vertices = sphere_vertices("repulsion100").double().numpy()
    angles = np.arccos(np.clip(units(TARGETS) @ vertices.T, -1, 1))
    labels = np.exp(-angles / 0.1)
    labels /= labels.sum(axis=1, keepdims=True)
    expected = (labels * (np.log(labels) - log_softmax(outputs))).sum(axis=1)
    np.testing.assert_allclose(losses(getter, outputs), expected, rtol=1e-9)


def normal_logpdf(target: np.ndarray, mean: np.ndarray, log_sigma: np.ndarray) -> float:
    return float(scipy.stats.multivariate_normal(mean, np.diag(np.exp(2 * log_sigma))).logpdf(target))


def test_the_gaussian_is_scipys_multivariate_normal():
    getter, outputs = made("gaussian")
    expected = [-normal_logpdf(target, row[:3], row[3:]) for target, row in zip(TARGETS, outputs, strict=True)]
    np.testing.assert_allclose(losses(getter, outputs), expected, rtol=1e-9)


def test_its_entropy_is_scipys_too():
    getter, outputs = made("gaussian", entropy_weight=0.7)
    entropies = [
        float(scipy.stats.multivariate_normal(row[:3], np.diag(np.exp(2 * row[3:]))).entropy()) for row in outputs
    ]
    np.testing.assert_allclose(
        losses(made("gaussian")[0], outputs) - losses(getter, outputs), 0.7 * np.array(entropies)
    )


def test_the_gaussian_mixture_is_a_weighted_sum_of_scipys():
    getter, outputs = made("gaussian-mixture", nb_gaussians=2)
    expected = []
    for target, row in zip(TARGETS, outputs, strict=True):
        parts = [normal_logpdf(target, row[2 + 3 * g : 5 + 3 * g], row[8 + 3 * g : 11 + 3 * g]) for g in range(2)]
        expected.append(-scipy.special.logsumexp(log_softmax(row[:2]) + parts))
    np.testing.assert_allclose(losses(getter, outputs), expected, rtol=1e-9)


def fisher_logpdf(target: np.ndarray, mean: np.ndarray, kappa: float) -> float:
    return float(scipy.stats.vonmises_fisher(units(mean), kappa).logpdf(units(target)))


def test_the_fisher_von_mises_is_scipys():
    getter, outputs = made("fisher-von-mises")
    assert ((outputs[:, 3] > 0) & (outputs[:, 3] < 20)).all()
    expected = [-fisher_logpdf(target, row[:3], row[3]) for target, row in zip(TARGETS, outputs, strict=True)]
    np.testing.assert_allclose(losses(getter, outputs), expected, rtol=1e-9)


def test_the_fisher_von_mises_mixture_is_a_weighted_sum_of_scipys():
    getter, outputs = made("fisher-von-mises-mixture", n_cluster=2)
    expected = []
    for target, row in zip(TARGETS, outputs, strict=True):
        parts = [fisher_logpdf(target, row[2 + 3 * c : 5 + 3 * c], row[8 + c]) for c in range(2)]
        expected.append(-scipy.special.logsumexp(log_softmax(row[:2]) + parts))
    np.testing.assert_allclose(losses(getter, outputs), expected, rtol=1e-9)


# --- integrals -------------------------------------------------------------------------------------------------------


def sphere_grid() -> tuple[Tensor, np.ndarray]:
    """Points on the sphere and their solid angles: Gauss-Legendre in z, even steps in azimuth."""
    heights, weights = np.polynomial.legendre.leggauss(64)
    azimuths = (np.arange(96) + 0.5) * (2 * math.pi / 96)
    z, azimuth = (grid.ravel() for grid in np.meshgrid(heights, azimuths, indexing="ij"))
    around = np.sqrt(1 - z**2)
    points = np.stack([around * np.cos(azimuth), around * np.sin(azimuth), z], axis=1)
    return torch.from_numpy(points), np.repeat(weights, 96) * (2 * math.pi / 96)


@pytest.mark.parametrize("key", ["fisher-von-mises", "fisher-von-mises-mixture"])
def test_densities_on_the_sphere_integrate_to_one(key):
    getter, outputs = made(key)
    points, solid_angles = sphere_grid()
    for row in torch.from_numpy(outputs[:5]):
        densities = (-getter.losses(row.expand(len(points), -1), points)).exp().numpy()
        assert (densities * solid_angles).sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("key", "num_means"), [("gaussian", 3), ("gaussian-mixture", 9)])
def test_densities_in_space_integrate_to_one(key, num_means):
    getter, outputs = made(key)
    along = torch.linspace(-12, 12, 97, dtype=torch.float64)
    points = torch.cartesian_prod(along, along, along)
    for row in torch.from_numpy(outputs[:3]):
        means, log_sigmas = row[:-num_means].clamp(-3, 3), row[-num_means:].clamp(-0.5, 0.5)  # so that the cube has all
        bounded = torch.cat([means, log_sigmas])
        densities = (-getter.losses(bounded.expand(len(points), -1), points)).exp()
        assert densities.sum().item() * 0.25**3 == pytest.approx(1, abs=1e-3)


# --- the ends of the ranges, in float32 ------------------------------------------------------------------------------


def exact_log_peak(kappa: float) -> float:
    """log(kappa / (2π (1 - e^(-2 kappa)))) with 60 digits."""
    from mpmath import exp, log, mp, mpf, pi

    with mp.workdps(60):
        k = mpf(kappa)
        return float(log(k / (2 * pi * (1 - exp(-2 * k)))))


def exact_slope(kappa: float) -> float:
    """The derivative of that: 1 / kappa - 2 / (e^(2 kappa) - 1)."""
    from mpmath import exp, mp, mpf

    with mp.workdps(90):
        k = mpf(kappa)
        return float(1 / k - 2 / (exp(2 * k) - 1)) if kappa < 1e4 else float(1 / k)


KAPPAS = [1e-38, 1e-20, 1e-8, 1e-4, 0.01, 0.29, 0.31, 1.0, 5.0, 20.0, 90.0, 1e4, 1e10, 1e30]


@pytest.mark.parametrize("kappa", KAPPAS)
def test_the_fisher_density_holds_in_float32_for_kappa_of_any_size(kappa):
    z = torch.tensor([0.0, 0, 1])
    kappas = torch.tensor(kappa, requires_grad=True)
    value = fisher_von_mises_log_density(z, z, kappas)
    (slope,) = torch.autograd.grad(value, kappas)
    assert value.item() == pytest.approx(exact_log_peak(kappas.item()), rel=3e-6)
    assert slope.item() == pytest.approx(exact_slope(kappas.item()), rel=3e-6, abs=1e-38)


def test_without_concentration_the_density_is_uniform_and_can_learn():
    z = torch.tensor([0.0, 0, 1])
    for target, expected in (z, 1.0), (-z, -1.0):
        kappas = torch.tensor(0.0, requires_grad=True)
        value = fisher_von_mises_log_density(target, z, kappas)
        assert value.item() == pytest.approx(-math.log(4 * math.pi), rel=1e-6)
        assert torch.autograd.grad(value, kappas)[0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("log_sigma", [-200.0, -20.0, -10.0, 0.0, 10.0, 20.0, 200.0])
def test_the_gaussian_density_is_finite_in_float32_for_sigma_of_any_size(log_sigma):
    log_sigmas = torch.full((3,), log_sigma, requires_grad=True)
    mean = torch.zeros(3, requires_grad=True)
    value = gaussian_log_density(torch.tensor([1.0, -2, 0]), mean, log_sigmas)
    gradients = torch.autograd.grad(value, [mean, log_sigmas])
    bounded = max(-20.0, min(20.0, log_sigma))
    exact = -0.5 * (3 * math.log(2 * math.pi) + 5 * math.exp(-2 * bounded)) - 3 * bounded
    assert value.item() == pytest.approx(exact, rel=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients)
    # Down to the bound, one that is too small is led back: its log density grows with it.
    assert bool(gradients[1][0] > 0) == (log_sigma < 0)


# --- samples ---------------------------------------------------------------------------------------------------------

LEAST = 1e-3  # of a p-value; seeds are fixed, so this holds or it does not


@pytest.mark.parametrize("kappa", [1e-7, 0.1, 2.0, 20.0, 1e4])
def test_samples_of_fisher_von_mises_follow_its_density(kappa):
    mean = units(np.array([1.0, -2, 0.5]))
    uniforms = torch.from_numpy(np.random.default_rng(3).uniform(size=(4000, 2)))
    drawn = sample_fisher_von_mises(
        torch.from_numpy(mean).expand(4000, 3), torch.full((4000,), kappa, dtype=torch.float64), uniforms
    ).numpy()
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, rtol=1e-9)
    # 1 - cos to the mean has the distribution function (1 - e^(-kappa t)) / (1 - e^(-2 kappa)) on 0 to 2.
    less = 1 - drawn @ mean
    assert scipy.stats.kstest(less, lambda t: np.expm1(-kappa * t) / np.expm1(-2 * kappa)).pvalue > LEAST
    across = np.linalg.svd(mean[None])[2][1:]  # two axes across the mean
    azimuths = np.arctan2(*(drawn @ across.T).T)
    assert scipy.stats.kstest(azimuths, scipy.stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > LEAST


def test_samples_of_a_gaussian_follow_it_along_each_axis():
    row = torch.tensor([1.0, -2, 0.5, 0.0, -1.0, 1.0])
    drawn = make_direction_getter("gaussian", 4).sample(row.expand(4000, 6), Key(4)).double().numpy()
    for axis, (mean, sigma) in enumerate(zip((1, -2, 0.5), np.exp([0.0, -1, 1]), strict=True)):
        assert scipy.stats.kstest(drawn[:, axis], scipy.stats.norm(mean, sigma).cdf).pvalue > LEAST
    assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.06


@pytest.mark.parametrize("add_eos", [False, True])
def test_samples_of_a_classification_have_its_probabilities(add_eos):
    getter = make_direction_getter("sphere-classification", 4, sphere="repulsion100", add_eos=add_eos)
    logits = torch.from_numpy(np.random.default_rng(8).normal(size=100)).float()
    row = torch.cat([logits, torch.tensor([50.0])]) if add_eos else logits  # EOS is not among the directions
    drawn = getter.sample(row.expand(20000, -1), Key(5))
    classes = (drawn @ sphere_vertices("repulsion100").T).argmax(dim=1).numpy()
    expected = 20000 * logits.double().softmax(dim=0).numpy()
    observed = np.bincount(classes, minlength=100)
    assert scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > LEAST


@pytest.mark.parametrize("key", ["gaussian-mixture", "fisher-von-mises-mixture"])
def test_samples_of_a_mixture_come_from_its_parts_by_their_weights(key):
    weights, means = torch.tensor([0.2, 0.5, 0.3]), torch.eye(3)
    narrow = torch.full((9,), -5.0) if key == "gaussian-mixture" else torch.full((3,), 1e4)
    row = torch.cat([weights.log(), means.flatten(), narrow])
    drawn = make_direction_getter(key, 4).sample(row.expand(6000, -1), Key(6))
    observed = np.bincount((drawn @ means.T).argmax(dim=1).numpy(), minlength=3)
    assert (
        scipy.stats.chisquare(observed, 6000 * weights.double().numpy() / weights.double().sum().item()).pvalue > LEAST
    )
    assert ((drawn @ means.T).max(dim=1).values > 0.9).all()


@pytest.mark.parametrize("key", ["gaussian-mixture", "fisher-von-mises-mixture"])
def test_samples_of_a_mixture_have_the_width_of_their_part_and_do_not_depend_on_which_it_is(key):
    is_gaussian, means = key == "gaussian-mixture", torch.eye(3)
    widths = torch.tensor([0.01, 0.03, 0.1])
    parts = widths.log().repeat_interleave(3) if is_gaussian else widths**-2
    row = torch.cat([torch.zeros(3), means.flatten(), parts])
    drawn = make_direction_getter(key, 4).sample(row.expand(6000, -1), Key(7)).double()
    drawn_from = (drawn @ means.double().T).argmax(dim=1)
    for part in range(3):
        away = (drawn[drawn_from == part] - means[part]).numpy() / widths[part].item()
        across = away[:, [axis for axis in range(3) if axis != part]]  # normal, also on the sphere where it is narrow
        assert scipy.stats.kstest(across[:, 0], "norm").pvalue > LEAST
        assert scipy.stats.kstest(across[:, 1], "norm").pvalue > LEAST
        assert not is_gaussian or scipy.stats.kstest(away[:, part], "norm").pvalue > LEAST


@pytest.mark.parametrize("key", [key for key, getter in DIRECTION_GETTERS.items() if getter.is_probabilistic])
def test_a_row_of_a_sample_depends_on_its_own_row_alone(key):
    getter = make_direction_getter(key, 4, add_eos=True)
    generator = np.random.default_rng(9)
    outputs = torch.from_numpy(generator.normal(size=(40, getter.output_size))).float()
    uniforms = torch.from_numpy(generator.uniform(size=(40, 4)))
    whole = getter.sample_from(outputs, uniforms)
    assert torch.equal(getter.sample_from(outputs[7:8], uniforms[7:8]), whole[7:8])
    assert torch.equal(getter.sample_from(outputs.flip(0), uniforms.flip(0)), whole.flip(0))
    assert whole.isfinite().all()


@pytest.mark.parametrize("uniform", [0.0, 1e-12, 1 - 1e-12, 1.0])
def test_no_uniform_number_gives_a_class_without_probability(uniform):
    logits = torch.tensor([[-math.inf, 0.0, -200.0]])
    assert sample_classes(logits, torch.tensor([uniform], dtype=torch.float64)).tolist() == [1]


def test_deterministic_directions_are_the_means_the_best_parts_or_the_best_classes():
    getter, outputs = made("gaussian")
    np.testing.assert_array_equal(getter.directions(torch.from_numpy(outputs)), outputs[:, :3])
    for key in ("gaussian-mixture", "fisher-von-mises-mixture"):
        getter, outputs = made(key)
        best = outputs[:, :3].argmax(axis=1)
        expected = np.stack([row[3 + 3 * b : 6 + 3 * b] for row, b in zip(outputs, best, strict=True)])
        np.testing.assert_array_equal(getter.directions(torch.from_numpy(outputs)), expected)
    getter, outputs = made("sphere-classification", add_eos=True)
    expected = sphere_vertices().double().numpy()[outputs[:, :-1].argmax(axis=1)]
    np.testing.assert_array_equal(getter.directions(torch.from_numpy(outputs)), expected)
