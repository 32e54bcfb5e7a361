"""Claims: lion and the schedule-free optimizers compute what their papers say, written out in float64."""

import inspect

import pytest
import torch
from optimizer_cases import NUM_STEPS, SHAPES, evaluated, gradient, learning_rate, run_updates, some_tensors
from torch import Tensor

from dwiml_func.optim import lion, schedule_free_adamw, schedule_free_sgd

F64 = torch.float64


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_lion(weight_decay, donate):
    params, _ = run_updates(lion(beta1=0.8, beta2=0.95, weight_decay=weight_decay), dtype=F64, donate=donate)
    for name, theta in some_tensors(0, F64).items():
        m = torch.zeros_like(theta)
        for step in range(NUM_STEPS):  # algorithm 2
            g, eta = gradient(step, F64)[name], learning_rate(step)
            c = 0.8 * m + (1 - 0.8) * g
            theta = theta - eta * (torch.sign(c) + weight_decay * theta)
            m = 0.95 * m + (1 - 0.95) * g
        torch.testing.assert_close(params[name], theta)


def schedule_free(name: str, beta: float, direction, weight_decay: float) -> tuple[Tensor, Tensor]:
    """y and x after all steps: equations 3 to 5, with the weights gamma ** 2 of section 4.4 (max lr so far)."""
    x = z = some_tensors(0, F64)[name]
    gamma_max = sum_of_weights = 0.0
    for step in range(NUM_STEPS):
        gamma = learning_rate(step)
        y = (1 - beta) * z + beta * x
        z = z - gamma * (direction(step, gradient(step, F64)[name]) + weight_decay * y)
        gamma_max = max(gamma, gamma_max)
        sum_of_weights += gamma_max**2
        c = gamma_max**2 / sum_of_weights
        x = (1 - c) * x + c * z
    return (1 - beta) * z + beta * x, x


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_schedule_free_sgd(weight_decay, donate):
    optimizer = schedule_free_sgd(momentum=0.7, weight_decay=weight_decay)
    params, opt_state = run_updates(optimizer, dtype=F64, donate=donate)
    average = evaluated(optimizer, opt_state, params)
    for name in SHAPES:
        y, x = schedule_free(name, 0.7, lambda step, g: g, weight_decay)
        torch.testing.assert_close((params[name], average[name]), (y, x))


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_schedule_free_adamw(weight_decay, donate):
    optimizer = schedule_free_adamw(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=weight_decay)
    params, opt_state = run_updates(optimizer, dtype=F64, donate=donate)
    average = evaluated(optimizer, opt_state, params)
    for name in SHAPES:
        v = torch.zeros(SHAPES[name], dtype=F64)

        def direction(step: int, g: Tensor) -> Tensor:
            nonlocal v
            v = 0.9 * v + (1 - 0.9) * g**2
            return g / ((v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-3)

        y, x = schedule_free(name, 0.8, direction, weight_decay)
        torch.testing.assert_close((params[name], average[name]), (y, x))


def test_a_learning_rate_of_zero_at_first_leaves_the_average_finite():
    optimizer, params = schedule_free_sgd(), some_tensors(0)
    for lr in (0.0, torch.tensor(0.0)):
        new, opt_state = optimizer.update(gradient(0), optimizer.init(params), params, lr=lr, step=0)
        torch.testing.assert_close(evaluated(optimizer, opt_state, new), params)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5])
def test_the_weight_of_the_average_is_neither_0_nor_1(beta):
    with pytest.raises(ValueError, match=f"Expected momentum with 0 < value < 1. Received: momentum={beta}"):
        schedule_free_sgd(momentum=beta)
    with pytest.raises(ValueError, match=f"Expected beta1 with 0 < value < 1. Received: beta1={beta}"):
        schedule_free_adamw(beta1=beta)


@pytest.mark.parametrize(
    ("make", "defaults"),
    [
        (lion, {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0}),
        (schedule_free_sgd, {"momentum": 0.9, "weight_decay": 0.0}),
        (schedule_free_adamw, {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}),
    ],
    ids=["lion", "schedule_free_sgd", "schedule_free_adamw"],
)
def test_defaults_are_those_of_the_authors_and_what_is_out_of_range_is_refused(make, defaults):
    assert {name: each.default for name, each in inspect.signature(make).parameters.items()} == defaults
    for name in defaults:
        with pytest.raises(ValueError, match=f"Expected {name} with .*Received: {name}=-0.1"):
            make(**{name: -0.1})


def test_a_schedule_free_step_at_a_rate_of_zero_can_be_differentiated():
    optimizer, params = schedule_free_sgd(), {"w": torch.ones(2, dtype=F64)}

    def moved(lr: Tensor) -> Tensor:
        grads = {"w": torch.ones(2, dtype=F64)}
        return optimizer.update(grads, optimizer.init(params), params, lr=lr, step=0)[0]["w"].sum()

    assert torch.func.grad(moved)(torch.tensor(0.0, dtype=F64)).isfinite()
