"""Direction getters: their networks, losses and directions."""

import math

import pytest
import torch
from torch.func import functional_call, grad

from dwiml_func.models.direction_getters import DIRECTION_GETTERS, CosineRegression, DirectionGetter
from dwiml_func.models.direction_getters.two_layer_network import TwoLayerNetwork


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("key", DIRECTION_GETTERS)
def test_every_getter_gives_a_loss_and_a_direction_at_each_point(key: str) -> None:
    getter = DIRECTION_GETTERS[key](8)
    assert isinstance(getter, DirectionGetter)
    outputs = getter(_random(5, 8))
    assert getter.losses(outputs, _random(5, 3)).shape == (5,)
    assert getter.directions(outputs).shape == (5, 3)


def test_parameters_are_named_as_in_dwi_ml() -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in CosineRegression(12).named_parameters()}
    assert shapes == {
        "layers.0.weight": (6, 12),
        "layers.0.bias": (6,),
        "layers.1.weight": (3, 6),
        "layers.1.bias": (3,),
    }


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


def test_dropout_acts_only_in_training() -> None:
    x = _random(20, 30)
    network = TwoLayerNetwork(30, 3, dropout=0.5)
    network.eval()
    assert torch.equal(network(x), network(x))
    assert torch.equal(network(x), network[1](network[0](x).relu()))
    network.train()
    assert not torch.equal(network(x), network(x))


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_dropout_out_of_range_is_refused(dropout: float) -> None:
    with pytest.raises(ValueError, match=f"Expected a dropout of at least 0 and below 1. Received: {dropout}"):
        CosineRegression(6, dropout=dropout)


@pytest.mark.parametrize("degrees", [0.0, 10.0, 60.0, 90.0, 135.0, 180.0])
@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_the_cosine_loss_is_one_minus_the_cosine_whatever_the_lengths(degrees: float, length: float) -> None:
    angle = math.radians(degrees)
    outputs = length * torch.tensor([[math.cos(angle), math.sin(angle), 0.0]])
    loss = CosineRegression(6).losses(outputs, torch.tensor([[0.5, 0.0, 0.0]]))
    assert loss.tolist() == pytest.approx([1 - math.cos(angle)], abs=1e-6)


def test_a_vector_without_length_costs_one_and_keeps_gradients_finite() -> None:
    losses = CosineRegression(6).losses
    zero, some = torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 3.0]])
    for outputs, targets in [(zero, some), (some, zero), (zero, zero)]:
        assert losses(outputs, targets).tolist() == [1.0]
        assert grad(lambda x, y=targets: losses(x, y).sum())(outputs).isfinite().all()


def test_a_target_without_length_teaches_nothing() -> None:
    outputs = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    loss = CosineRegression(6).losses(outputs, torch.zeros(1, 3)).sum()
    assert not torch.autograd.grad(loss, outputs)[0].any()


def test_gradients_of_the_cosine_loss_agree_with_finite_differences() -> None:
    outputs = _random(6, 3, dtype=torch.float64).requires_grad_()
    targets = _random(6, 3, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: CosineRegression(6).losses(x, targets), outputs)


def test_functional_gradients_equal_autograds() -> None:
    getter = CosineRegression(8)
    x, targets = _random(5, 8), _random(5, 3, seed=1)
    parameters = dict(getter.named_parameters())
    gradients = grad(lambda p: getter.losses(functional_call(getter, p, (x,)), targets).mean())(parameters)
    expected = torch.autograd.grad(getter.losses(getter(x), targets).mean(), list(parameters.values()))
    for ours, theirs in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_direction_of_cosine_regression_is_its_output() -> None:
    outputs = _random(4, 3)
    assert torch.equal(CosineRegression(6).directions(outputs), outputs)
