"""Claims about differentiable training: several steps have gradients that finite differences confirm."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from dwiml_func import Key, adam, adamw, eval_step, init_state, module_loss, radam, sgd, train_step
from dwiml_func.core.state import TrainState

OPTIMIZERS = {
    "sgd": sgd,
    "momentum": partial(sgd, momentum=0.9),
    "adam": adam,
    "adamw": adamw,
    "radam": radam,
}


def squared_error(model, batch):
    inputs, targets = batch
    return (model(inputs) - targets).square().mean(), len(inputs)


def make_problem(seed: int = 0):
    """A small network in float64, five training batches and one to validate on."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    batches = [(torch.randn(8, 3).double(), torch.randn(8, 1).double()) for _ in range(6)]
    return model, batches[:5], batches[5]


def validation_loss_after_training(make_optimizer, clip_grad=None, non_finite=None) -> tuple[TrainState, Callable]:
    """The first state, and the validation loss as a function of parameters, learning rate and weight decay."""
    model, batches, held_out = make_problem()
    loss_fn = module_loss(model, squared_error, stochastic=False)
    start = init_state(model, make_optimizer(), seed=0)

    def loss_after(params, lr, weight_decay) -> Tensor:
        optimizer = make_optimizer(weight_decay=weight_decay)
        step = partial(train_step, loss_fn=loss_fn, optimizer=optimizer, clip_grad=clip_grad, non_finite=non_finite)
        state = start.replace(params=params, opt_state=optimizer.init(params))
        for batch in batches:
            state, _ = step(state, batch, lr=lr)
        return loss_fn(state.params, state.buffers, held_out, key=Key(0), train=False).loss

    return start, loss_after


def central_difference(function: Callable[[float], Tensor], size: float = 1e-4) -> float:
    """The slope at 0 by finite differences of order 4; the error is of the order of size**4 and of 1e-16 / size."""
    values = [float(function(step * size)) for step in (-2, -1, 1, 2)]
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * size)


@pytest.mark.parametrize("clip_grad", [None, 0.3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hypergradients_through_five_steps_are_those_of_finite_differences(name, clip_grad):
    start, loss_after = validation_loss_after_training(OPTIMIZERS[name], clip_grad)
    lr, decay = (torch.tensor(value, dtype=torch.float64) for value in (0.05, 0.1))
    params = dict(start.params)
    slopes, lr_slope, decay_slope = torch.func.grad(loss_after, argnums=(0, 1, 2))(params, lr, decay)

    # Plain numbers and tensors, so the finite differences go through the fused optimizers and torch.autograd.
    by_lr = central_difference(lambda change: loss_after(params, 0.05 + change, 0.1))
    by_decay = central_difference(lambda change: loss_after(params, 0.05, 0.1 + change))
    assert float(lr_slope) == pytest.approx(by_lr, rel=1e-5)
    assert float(decay_slope) == pytest.approx(by_decay, rel=1e-5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        towards = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in params.items()}
        moved = lambda change, towards=towards: {n: p + change * towards[n] for n, p in params.items()}  # noqa: E731
        by_params = central_difference(lambda change, moved=moved: loss_after(moved(change), 0.05, 0.1))
        along = sum(float((slopes[n] * towards[n]).sum()) for n in params)
        assert along == pytest.approx(by_params, rel=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_graph_of_torch_autograd_around_the_steps_gives_the_same(name):
    start, loss_after = validation_loss_after_training(OPTIMIZERS[name])
    leaves = {n: p.clone().requires_grad_() for n, p in start.params.items()}
    lr, decay = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.05, 0.1))
    actual = torch.autograd.grad(loss_after(leaves, lr, decay), [*leaves.values(), lr, decay])
    slopes, *others = torch.func.grad(loss_after, argnums=(0, 1, 2))(dict(start.params), lr.detach(), decay.detach())
    torch.testing.assert_close(list(actual), [*slopes.values(), *others], rtol=1e-10, atol=1e-14)


def test_training_can_be_mapped_over_learning_rates():
    start, loss_after = validation_loss_after_training(adam)
    rates = torch.tensor([0.1, 0.05, 0.001], dtype=torch.float64)
    losses = torch.func.vmap(loss_after, in_dims=(None, 0, None))(dict(start.params), rates, 0.1)
    expected = torch.stack([loss_after(start.params, float(rate), 0.1) for rate in rates])
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("make_optimizer", [adam, adamw, radam])
def test_a_unit_that_is_off_does_not_spoil_a_hypergradient(make_optimizer):
    # Its gradients and second moments are exactly zero, where the square root has an infinite slope.
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)).double()
    torch.nn.init.constant_(model.get_parameter("0.bias")[:1], -100.0)
    batch = (torch.rand(4, 2, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64))
    loss_fn = module_loss(model, squared_error, stochastic=False)
    start = init_state(model, make_optimizer(), seed=0)

    def loss_after(lr):
        state = start
        for _ in range(7):
            state, _ = train_step(state, batch, loss_fn=loss_fn, optimizer=make_optimizer(weight_decay=0.0), lr=lr)
        return loss_fn(state.params, {}, batch, key=Key(0), train=False).loss

    slope = torch.func.grad(loss_after)(torch.tensor(0.01, dtype=torch.float64))
    assert float(slope) == pytest.approx(central_difference(lambda change: loss_after(0.01 + change)), rel=1e-5)


def test_metrics_of_a_differentiated_step_carry_no_graph():
    start, _ = validation_loss_after_training(sgd)
    model, batches, _ = make_problem()
    loss_fn = module_loss(model, squared_error, stochastic=False)

    def after(lr):
        state, metrics = train_step(start, batches[0], loss_fn=loss_fn, optimizer=sgd(), lr=lr)
        totals = ({name: total for name, (total, _) in sums.items()} for sums in (metrics, state.sums))
        return state.params["0.bias"].sum(), tuple(totals)

    _, (metrics, sums) = torch.func.grad(after, has_aux=True)(torch.tensor(0.1).double())
    plain, plain_metrics = train_step(start, batches[0], loss_fn=loss_fn, optimizer=sgd(), lr=0.1)
    for name, (total, _) in plain_metrics.items():
        assert not metrics[name].requires_grad
        assert (
            float(metrics[name]) == float(sums[name]) == pytest.approx(total) == pytest.approx(plain.sums[name].total)
        )


def test_a_step_with_plain_numbers_leaves_no_graph_behind():
    model, batches, held_out = make_problem()
    loss_fn = module_loss(model, squared_error, stochastic=False)
    state = init_state(model, adam(), seed=0)
    for batch in batches:
        state, _ = train_step(state, batch, loss_fn=loss_fn, optimizer=adam(), lr=0.1)
    assert not any(tensor.requires_grad for tensor in state.params.values())
    assert eval_step(state, held_out, loss_fn=loss_fn)["loss"].weight == 8
