"""What all direction getters have in common: options, shapes, EOS, gradients, transforms, and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from dwiml_func.core.rng import Key
from dwiml_func.models.direction_getters import DIRECTION_GETTERS, DirectionGetter, make_direction_getter
from dwiml_func.models.direction_getters.base import TwoLayerNetwork
from dwiml_func.models.direction_getters.regression import cosine_losses, l2_losses
from dwiml_func.models.direction_getters.sphere_classification import SphereClassification

KEYS = [
    "cosine-regression",
    "l2-regression",
    "cosine-plus-l2-regression",
    "sphere-classification",
    "smooth-sphere-classification",
    "gaussian",
    "gaussian-mixture",
    "fisher-von-mises",
    "fisher-von-mises-mixture",
]
COMPRESSED = {"l2-regression", "gaussian", "gaussian-mixture"}
REGRESSIONS = KEYS[:3]
CLASSIFICATIONS = KEYS[3:5]
PROBABILISTIC = KEYS[3:]
SPECIAL = {  # options that change how a loss is computed, each away from its default
    "cosine-regression": {"normalize_targets": 2.0, "normalize_outputs": 3.0},
    "l2-regression": {"normalize_targets": 2.0, "normalize_outputs": 3.0},
    "cosine-plus-l2-regression": {"normalize_targets": 2.0, "normalize_outputs": 3.0},
    "sphere-classification": {"sphere": "repulsion100"},
    "smooth-sphere-classification": {"sphere": "repulsion100"},
    "gaussian": {"normalize_targets": 2.0, "entropy_weight": 0.5},
    "gaussian-mixture": {"nb_gaussians": 2, "normalize_targets": 2.0},
    "fisher-von-mises": {},
    "fisher-von-mises-mixture": {"n_cluster": 2},
}


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _make(key: str, input_size: int = 8, **options: Any) -> DirectionGetter:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return make_direction_getter(key, input_size, **options)


def _case(key: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[DirectionGetter, tuple[Any, ...]]:
    """A getter, and the outputs, targets and last points of two streamlines (of 3 and 4 points where there is EOS)."""
    getter = _make(key, **options).to(dtype)
    features = 3 * _random(7, 8, dtype=dtype)
    targets = _random(7, 3, seed=1, dtype=dtype)
    if not getter.add_eos:
        return getter, (getter(features), targets)
    is_last = torch.tensor([False, False, True, False, False, False, True])
    return getter, (getter(features), targets * ~is_last[:, None], is_last)


DEFAULTS = {
    "normalize_targets": None,
    "normalize_outputs": None,
    "sphere": "symmetric724",
    "entropy_weight": 0.0,
    "nb_gaussians": 3,
    "n_cluster": 3,
}


@pytest.fixture(params=[(key, eos, special) for key in KEYS for eos in (False, True) for special in (False, True)])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    key, add_eos, special = request.param
    return {"key": key, "add_eos": add_eos, **(SPECIAL[key] if special else {})}


def test_there_are_nine_getters_by_the_keys_of_dwi_ml() -> None:
    assert list(DIRECTION_GETTERS) == KEYS
    assert {key for key, getter in DIRECTION_GETTERS.items() if getter.supports_compressed} == COMPRESSED
    assert [key for key, getter in DIRECTION_GETTERS.items() if getter.is_probabilistic] == PROBABILISTIC
    assert all(getter.key == key for key, getter in DIRECTION_GETTERS.items())


def test_every_getter_gives_a_loss_and_a_direction_at_each_point(options: dict[str, Any]) -> None:
    getter, case = _case(**options)
    assert case[0].shape == (7, getter.output_size)
    losses = getter.losses(*case)
    assert losses.shape == (7,)
    assert losses.isfinite().all()
    assert getter.directions(case[0]).shape == (7, 3)


def test_the_loss_is_the_mean_over_all_rows_and_their_number(options: dict[str, Any]) -> None:
    getter, case = _case(**options)
    mean, weight = getter.loss(*case)
    assert mean.shape == ()
    assert mean.item() == pytest.approx(sum(getter.losses(*case).tolist()) / 7, rel=1e-6)
    assert weight == 7


def test_options_have_their_defaults_and_become_attributes() -> None:
    for key, getter in DIRECTION_GETTERS.items():
        assert set(SPECIAL[key]) == set(getter.option_names)
        made = _make(key)
        assert {name: getattr(made, name) for name in getter.option_names} == {
            name: DEFAULTS[name] for name in getter.option_names
        }
        made = _make(key, **SPECIAL[key])
        assert {name: getattr(made, name) for name in getter.option_names} == SPECIAL[key]


NETWORKS = {  # parameters and their rows in dwi_ml, for 8 features
    "cosine-regression": {"layers": 3},
    "l2-regression": {"layers": 3},
    "cosine-plus-l2-regression": {"layers": 3},
    "sphere-classification": {"layers": 724},
    "smooth-sphere-classification": {"layers": 724},
    "gaussian": {"layers_mean": 3, "layers_sigmas": 3},
    "gaussian-mixture": {"layers_mixture": 3, "layers_mean": 9, "layers_sigmas": 9},
    "fisher-von-mises": {"layers_mean": 3, "layers_kappa": 1},
    "fisher-von-mises-mixture": {"layers_mixture": 3, "layers_mean": 9, "layers_kappa": 3},
}


@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("key", KEYS)
def test_the_state_has_the_names_and_shapes_of_dwi_mls(key: str, add_eos: bool) -> None:
    expected = {}
    for network, rows in NETWORKS[key].items():
        with_eos = rows + (add_eos and network in ("layers", "layers_mean"))
        expected[f"{network}.0.weight"] = (4, 8)
        expected[f"{network}.0.bias"] = (4,)
        expected[f"{network}.1.weight"] = (with_eos, 4)
        expected[f"{network}.1.bias"] = (with_eos,)
    getter = _make(key, add_eos=add_eos)
    assert {name: tuple(tensor.shape) for name, tensor in getter.state_dict().items()} == expected
    assert not list(getter.buffers())


# --- gradients and transforms ---------------------------------------------------------------------------------------


def test_gradients_agree_with_finite_differences(options: dict[str, Any]) -> None:
    getter, case = _case(dtype=torch.float64, **options)
    outputs, *rest = (part[4:] for part in case)  # three points, one of them the last of a streamline
    outputs = outputs.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: getter.losses(x, *rest), outputs)


def test_gradients_through_forward_agree_with_finite_differences(options: dict[str, Any]) -> None:
    getter, (_, *rest) = _case(dtype=torch.float64, **options)
    features = (3 * _random(7, 8, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: getter.losses(getter(x), *rest), features)


def test_functional_gradients_equal_autograds(options: dict[str, Any]) -> None:
    getter, (_, *rest) = _case(**options)
    features = 3 * _random(7, 8)
    parameters = dict(getter.named_parameters())
    gradients = grad(lambda p: getter.loss(functional_call(getter, p, (features,)), *rest)[0])(parameters)
    expected = torch.autograd.grad(getter.loss(getter(features), *rest)[0], list(parameters.values()))
    for ours, theirs in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_one_point_at_a_time_by_vmap_equals_all_at_once(options: dict[str, Any]) -> None:
    getter, (outputs, *rest) = _case(**options)
    torch.testing.assert_close(vmap(getter.losses)(outputs, *rest), getter.losses(outputs, *rest))
    per_point = vmap(grad(lambda *case: getter.losses(*case)))(outputs, *rest)
    together = grad(lambda x: getter.losses(x, *rest).sum())(outputs)
    torch.testing.assert_close(per_point, together)


def test_directions_and_eos_work_under_vmap(options: dict[str, Any]) -> None:
    getter, (outputs, *_) = _case(**options)
    assert torch.equal(vmap(getter.directions)(torch.stack([outputs, 2 * outputs]))[0], getter.directions(outputs))
    if getter.add_eos:
        batched = vmap(getter.eos_probability)(outputs[None])[0]
        torch.testing.assert_close(batched, getter.eos_probability(outputs))


def test_double_precision_in_gives_double_precision_out(options: dict[str, Any]) -> None:
    getter, case = _case(dtype=torch.float64, **options)
    assert getter.losses(*case).dtype == torch.float64
    assert getter.directions(case[0]).dtype == torch.float64
    single = [tensor.float() if tensor.is_floating_point() else tensor for tensor in case]
    torch.testing.assert_close(getter.losses(*single), getter.losses(*case).float())


# --- directions without length, and features that drive outputs to their ends --------------------------------------


def test_directions_without_length_have_finite_losses_and_gradients(options: dict[str, Any]) -> None:
    getter, (outputs, targets, *is_last) = _case(**options)
    zeros = torch.zeros_like(outputs)
    for some_outputs, some_targets in [(outputs, 0 * targets), (zeros, targets), (zeros, 0 * targets)]:
        some_outputs = some_outputs.detach().requires_grad_()
        losses = getter.losses(some_outputs, some_targets, *is_last)
        (gradient,) = torch.autograd.grad(losses.sum(), some_outputs)
        assert losses.isfinite().all()
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 1e3


def test_lengths_below_1e_8_count_as_1e_8_in_a_cosine_and_distances_are_shifted_by_1e_6() -> None:
    directions = torch.tensor([[0.5e-8, 0, 0], [1e-8, 0, 0], [1, 0, 0]], dtype=torch.float64)
    ones = directions[2:].expand(3, 3)
    for given in ((directions, ones), (ones, directions)):
        torch.testing.assert_close(cosine_losses(*given).tolist(), [0.5, 0.0, 0.0])
    torch.testing.assert_close(l2_losses(ones, ones), torch.full((3,), 3**0.5 * 1e-6, dtype=torch.float64))


def test_a_network_that_gives_zeros_has_finite_gradients_and_can_learn(options: dict[str, Any]) -> None:
    getter, (_, targets, *is_last) = _case(**options)
    for network in (module for module in getter.modules() if isinstance(module, TwoLayerNetwork)):
        torch.nn.init.zeros_(network[1].weight)  # pyright: ignore[reportArgumentType]
        torch.nn.init.zeros_(network[1].bias)  # pyright: ignore[reportArgumentType]
    gradients = grad(lambda p: getter.loss(functional_call(getter, p, (_random(7, 8),)), targets, *is_last)[0])(
        dict(getter.named_parameters())
    )
    assert all(gradient.isfinite().all() and gradient.abs().max() < 1e3 for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values())


def test_features_of_any_size_have_finite_losses_and_gradients(options: dict[str, Any]) -> None:
    getter, (_, *rest) = _case(**options)
    for size in (1e-6, 30.0, 1e4):
        losses = getter.losses(getter(size * _random(7, 8)), *rest)
        assert losses.isfinite().all(), size
        assert all(g.isfinite().all() for g in torch.autograd.grad(losses.mean(), list(getter.parameters()))), size


# --- EOS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos_weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("key", [key for key in KEYS if key not in CLASSIFICATIONS])
def test_the_eos_loss_is_a_weighted_cross_entropy_added_to_that_of_the_direction(key: str, eos_weight: float) -> None:
    getter, (outputs, targets, is_last) = _case(key, add_eos=True, eos_weight=eos_weight)
    without = _make(key)
    of_directions = without.losses(outputs[:, :-1], targets).tolist()
    expected = []
    for logit, last, of_direction in zip(outputs[:, -1].tolist(), is_last.tolist(), of_directions, strict=True):
        probability = 1 / (1 + math.exp(-logit))
        expected.append(of_direction - eos_weight * math.log(probability if last else 1 - probability))
    assert getter.losses(outputs, targets, is_last).tolist() == pytest.approx(expected, rel=1e-5)
    assert getter.eos_probability(outputs).tolist() == pytest.approx(outputs[:, -1].sigmoid().tolist())


@pytest.mark.parametrize("key", CLASSIFICATIONS)
def test_the_eos_probability_of_a_classification_is_that_of_its_last_class(key: str) -> None:
    getter, (outputs, _, _) = _case(key, add_eos=True)
    powers = outputs.detach().double().exp()
    assert getter.eos_probability(outputs).tolist() == pytest.approx((powers[:, -1] / powers.sum(dim=1)).tolist())


@pytest.mark.parametrize("key", [key for key in KEYS if key not in CLASSIFICATIONS])
def test_a_confident_mistake_about_eos_costs_its_logit_and_can_be_unlearned(key: str) -> None:
    getter, (outputs, targets, is_last) = _case(key, add_eos=True)
    base = getter.losses(outputs, targets, is_last).detach()
    mistaken = outputs.detach().clone()
    mistaken[:, -1] = torch.where(is_last, -200.0, 200.0)
    losses = getter.losses(mistaken.requires_grad_(), targets, is_last)
    assert (losses - base).tolist() == pytest.approx([200.0] * 7, abs=10)
    (gradient,) = torch.autograd.grad(losses.sum(), mistaken)
    assert gradient[:, -1].tolist() == [-1.0 if last else 1.0 for last in is_last.tolist()]


# --- sampling: what holds for all; test_getter_densities.py tests each density        ----------------------------


@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("key", PROBABILISTIC)
def test_a_key_decides_the_sample_and_the_global_generator_stays(key: str, add_eos: bool) -> None:
    getter, (outputs, *_) = _case(key, add_eos=add_eos)
    before = torch.get_rng_state()
    first, again, other = (getter.sample(outputs, Key(3, (i,))) for i in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (7, 3)
    assert not first.requires_grad


@pytest.mark.parametrize("key", REGRESSIONS)
def test_regressions_have_no_distribution_to_sample(key: str) -> None:
    with pytest.raises(
        ValueError, match=f"^{key} has no distribution of directions to sample from. Use `directions`.$"
    ):
        _make(key).sample(torch.zeros(1, 3), Key(0))


# --- the network -----------------------------------------------------------------------------------------------------


def test_the_hidden_layer_is_half_the_input_rounded_up() -> None:
    assert TwoLayerNetwork(5, 3)[0].out_features == 3
    assert TwoLayerNetwork(1, 3)[0].out_features == 1


def test_the_network_is_linear_relu_linear_from_torchs_initial_values() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = TwoLayerNetwork(7, 3)
        torch.manual_seed(2)
        expected = torch.nn.Sequential(torch.nn.Linear(7, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    x = _random(11, 7)
    assert torch.equal(network(x), expected(x))


@pytest.mark.parametrize("key", KEYS)
def test_dropout_acts_only_in_training(key: str) -> None:
    x = _random(20, 30)
    getter = _make(key, 30, dropout=0.5).eval()
    assert torch.equal(getter(x), getter(x))
    assert torch.equal(getter(x), _make(key, 30)(x))
    getter.train()
    assert not torch.equal(getter(x), getter(x))


@pytest.mark.parametrize("key", CLASSIFICATIONS)
def test_the_vertices_follow_the_module_to_its_device_and_keep_their_precision(key: str) -> None:
    getter = _make(key)
    vertices = getter._vertices
    assert isinstance(vertices, torch.Tensor)
    assert torch.equal(getter.half()._vertices, vertices)  # pyright: ignore[reportArgumentType]
    assert getter.to("meta")._vertices.device.type == "meta"  # pyright: ignore[reportAttributeAccessIssue]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("key", KEYS)
def test_dropout_out_of_range_is_refused(key: str, dropout: float) -> None:
    with pytest.raises(ValueError, match=f"^dropout: expected .* received {dropout}."):
        make_direction_getter(key, 6, dropout=dropout)


@pytest.mark.parametrize("key", KEYS)
def test_an_option_of_another_getter_is_refused(key: str) -> None:
    own = DIRECTION_GETTERS[key].option_names
    foreign = sorted({name for getter in DIRECTION_GETTERS.values() for name in getter.option_names} - set(own))
    for name in foreign:
        with pytest.raises(ValueError, match="has no such option") as error:
            make_direction_getter(key, 6, **{name: 1})  # pyright: ignore[reportArgumentType]
        hint = "Leave it out or choose another direction getter."
        assert str(error.value) == f"{name}: {key} has no such option. {hint}"


@pytest.mark.parametrize(
    ("key", "arguments", "message"),
    [
        ("cosine", {}, f"dg_key: expected one of {', '.join(KEYS)}, received 'cosine'."),
        (
            "gaussian",
            {"input_size": 0},
            "input_size: expected at least 1, received 0.",
        ),
        ("gaussian", {"eos_weight": -1.0}, "eos_weight: expected .* received -1.0."),
        ("gaussian", {"eos_weight": math.nan}, "eos_weight: expected .* received nan."),
        ("gaussian", {"entropy_weight": -1.0}, "entropy_weight: expected .* received -1.0."),
        (
            "gaussian",
            {"normalize_targets": 0.0},
            "normalize_targets: expected .* received 0.0.",
        ),
        (
            "l2-regression",
            {"normalize_outputs": -1.0},
            "normalize_outputs: expected .* received -1.0.",
        ),
        (
            "gaussian-mixture",
            {"nb_gaussians": 0},
            "nb_gaussians: expected .* received 0.",
        ),
        (
            "fisher-von-mises-mixture",
            {"n_cluster": 0},
            "n_cluster: expected .* received 0.",
        ),
        (
            "sphere-classification",
            {"sphere": "round"},
            "sphere: expected one of symmetric362, symmetric642, symmetric724, repulsion724, repulsion100, "
            "repulsion200, received 'round'.",
        ),
        *(
            (
                key,
                {"add_eos": True, "eos_weight": 0.5},
                rf"eos_weight: expected none \(or 1\) with {key}, where EOS is one class of all and has no separate "
                "loss, received 0.5.",
            )
            for key in CLASSIFICATIONS
        ),
    ],
)
def test_arguments_out_of_range_are_refused(key: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_direction_getter(key, **{"input_size": 6, **arguments})


@pytest.mark.parametrize("key", KEYS)
def test_rows_that_do_not_fit_are_refused(key: str) -> None:
    getter, (outputs, targets) = _case(key)
    size = getter.output_size
    for bad_outputs, bad_targets in [(outputs[:, 1:], targets), (outputs, targets[:, 1:]), (outputs, targets[1:])]:
        with pytest.raises(ValueError, match="Expected outputs") as error:
            getter.losses(bad_outputs, bad_targets)
        assert str(error.value) == (
            f"Expected outputs (N, {size}) and targets (N, 3). "
            f"Received: {tuple(bad_outputs.shape)} and {tuple(bad_targets.shape)}."
        )
    with pytest.raises(ValueError, match=r"^Expected is_last None without add_eos\. Received: a tensor\.$"):
        getter.losses(outputs, targets, torch.zeros(7, dtype=torch.bool))
    with pytest.raises(ValueError, match="Make it with add_eos=True"):
        getter.eos_probability(outputs)
    getter, (outputs, targets, is_last) = _case(key, add_eos=True)
    with pytest.raises(ValueError, match=r"^Expected is_last with add_eos: which points are the last\. Received: None"):
        getter.losses(outputs, targets)
    with pytest.raises(ValueError, match=r"^Expected is_last \(7,\). Received: \(6,\)\.$"):
        getter.losses(outputs, targets, is_last[1:])


def test_eos_is_most_likely_where_no_direction_is_likelier() -> None:
    getter = SphereClassification(6, add_eos=True)
    outputs = torch.linspace(-1, 1, getter.output_size).repeat(3, 1)
    outputs[:, -1] = torch.tensor([0.99, 1.01, -2.0])  # the likeliest direction has a logit just below 1
    assert getter.eos_is_most_likely(outputs).tolist() == [False, True, False]
    assert (getter.eos_probability(outputs) < 0.5).all()
    assert not getter.eos_is_most_likely(torch.zeros_like(outputs)).any()  # of equals the first, as argmax
    with pytest.raises(ValueError, match="add_eos=True"):
        SphereClassification(6).eos_is_most_likely(outputs[:, :-1])
