"""Claims about the compiled gradient: that of an eager step, shard by shard, with one graph for all sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_compiled_learn2track import NUM_FEATURES, some_batch

from dwiml_func import Key, module_loss
from dwiml_func.compiled.gradient import JitGradient
from dwiml_func.core.gradients import value_and_grad
from dwiml_func.core.rng import torch_rng
from dwiml_func.data.shards import cut_batch
from dwiml_func.distributed.sharding import sharded_value_and_grad
from dwiml_func.models.learn2track import Learn2Track, compute_batch_loss

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")


@pytest.mark.compiles
def test_on_shards_of_any_size_one_graph_gives_what_an_eager_step_gives() -> None:
    with torch_rng(Key(1)):
        model = Learn2Track(NUM_FEATURES, rnn_layer_sizes=(6,), nb_previous_dirs=1, dg_args={"dropout": 0.3})
    loss_fn = module_loss(model, compute_batch_loss)
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradient = JitGradient(loss_fn, dynamic=True, backend="eager")
    compiled, eager = sharded_value_and_grad(gradient_fn=gradient), sharded_value_and_grad()
    for number, size in enumerate((7, 3, 1, 12)):  # the third leaves two shards empty
        batch = cut_batch(some_batch(number, size), num_shards=3)
        (out, grads), (expected, expected_grads) = (
            function(loss_fn, params, {}, batch, key=Key(3, (number,))) for function in (compiled, eager)
        )
        torch.testing.assert_close((out.loss, out.weight), (expected.loss, expected.weight))
        torch.testing.assert_close(out.aux, expected.aux)
        torch.testing.assert_close(grads, expected_grads)
    assert (gradient.graph.eager_reason, gradient.graph.num_compilations) == (None, 1)


def test_a_loss_that_cannot_be_traced_is_evaluated_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(2, 1)
    loss_fn = module_loss(model, lambda model, x: (model(x).mean() * (2 if x.sum().item() > 0 else 1), len(x)))
    params, x = {name: parameter.detach() for name, parameter in model.named_parameters()}, torch.ones(3, 2)
    gradient = JitGradient(loss_fn, backend="eager")
    for _ in range(2):
        out, grads = gradient(loss_fn, params, {}, x, key=Key(0))
        expected, expected_grads = value_and_grad(loss_fn, params, {}, x, key=Key(0))
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(grads["weight"], expected_grads["weight"])
    assert len([record for record in caplog.records if record.name == "dwiml_func.compiled.function"]) == 1
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))
    loss_fn = module_loss(model, lambda model, x: (model(x).mean() * (2 if x.sum().item() > 0 else 1), len(x)))
    params |= {"unused": torch.ones(2)}
    gradient = JitGradient(loss_fn, backend="eager")
    assert gradient(loss_fn, params, {}, x, key=Key(0), backend="autograd")[1]["unused"] is None
    assert torch.equal(gradient(loss_fn, params, {}, x, key=Key(0), backend="func")[1]["unused"], torch.zeros(2))


@pytest.mark.compiles
def test_all_that_a_loss_returns_comes_back_with_its_own_random_numbers_and_means_of_any_weight() -> None:
    def loss(model: Any, x: torch.Tensor) -> Any:
        y = model(x)
        return y.square().mean(), len(x), {"plain": y.sum(), "of few": (y[:2].mean(), 2), "of one": (y[0, 0], x[0, 0])}

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
    loss_fn, x = module_loss(model, loss), torch.linspace(1, 2, 8).reshape(4, 2)
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradient = JitGradient(loss_fn, backend="eager")
    for seed in (1, 2):
        found, expected = (f(loss_fn, params, buffers, x, key=Key(seed)) for f in (gradient, value_and_grad))
        assert (float(found[0].weight), found[0].aux.keys()) == (4, expected[0].aux.keys())
        assert [*map(float, found[0].aux["of few"])][1] == 2  # type: ignore[arg-type]
        for name, mean in expected[0].aux.items():
            own = found[0].aux[name]
            pairs = zip(own, mean, strict=True) if isinstance(mean, tuple) and isinstance(own, tuple) else [(own, mean)]
            assert all(float(one) == pytest.approx(float(other)) for one, other in pairs)  # type: ignore[arg-type]
        torch.testing.assert_close((found[0].loss, found[0].buffers, found[1]), (*expected[0][::2], expected[1]))
    assert (gradient.graph.eager_reason, gradient.graph.num_compilations) == (None, 1)


@pytest.mark.compiles
def test_a_gradient_that_is_differentiated_again_keeps_the_graph_around_it() -> None:
    loss_fn = module_loss(torch.nn.Linear(1, 1, bias=False), lambda model, x: (model(x).square().mean(), len(x)))
    gradient, x = JitGradient(loss_fn, backend="eager"), torch.tensor([[1.0], [3.0]])

    def squared_gradient(weight: torch.Tensor) -> torch.Tensor:
        return gradient(loss_fn, {"weight": weight}, {}, x, key=Key(0))[1]["weight"].square().sum()

    weight = torch.tensor([[2.0]])
    assert squared_gradient(weight) == (2 * 2 * 5) ** 2  # the loss is 5 w^2
    assert torch.func.grad(squared_gradient)(weight) == 2 * (2 * 5) ** 2 * 2
    assert squared_gradient(weight) == 400
    assert (gradient.graph.eager_reason, gradient.graph.num_compilations) == (None, 1)


def test_another_loss_is_refused() -> None:
    losses = [module_loss(torch.nn.Linear(2, 1), lambda model, x: (model(x).mean(), len(x))) for _ in range(2)]
    with pytest.raises(ValueError, match="the loss that was compiled"):
        JitGradient(losses[0])(losses[1], {}, {}, torch.ones(3, 2), key=Key(0))


def test_a_loss_is_tried_before_it_is_compiled() -> None:
    forgotten = torch.nn.Parameter(torch.ones(()))
    loss_fn = module_loss(torch.nn.Linear(2, 1), lambda model, x: (model(x).mean() * forgotten, len(x)))
    params = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
    with pytest.raises(ValueError, match="are not in the state"):
        JitGradient(loss_fn, backend="eager")(loss_fn, params, {}, torch.ones(3, 2), key=Key(0))
