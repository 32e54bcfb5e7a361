"""Claims about `dwiml_func.core.gradients`: right by closed forms and finite differences, and torch's own bits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dwiml_func.core.gradients import value_and_grad
from dwiml_func.core.loss import LossOut, module_loss
from dwiml_func.core.loss_check import check_loss_fn
from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.optim import clip_grad_norm
from dwiml_func.optim.transformations import global_norm

BACKENDS = ["autograd", "func"]


def model_and_batch(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    with torch_rng(Key(5)):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
        return model, (torch.randn(6, 4, dtype=dtype), torch.randn(6, 2, dtype=dtype))


def squared_error(model, batch):
    return (model(batch[0]) - batch[1]).square().mean(), len(batch[0])


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_differences_agree_in_float64(backend):
    model, batch = model_and_batch(torch.float64)
    loss_fn = module_loss(model, squared_error)
    names = list(detached(model))

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *values):
            out, grads = value_and_grad(
                loss_fn, dict(zip(names, values, strict=True)), {}, batch, key=Key(0), backend=backend
            )
            ctx.save_for_backward(*(grads[name] for name in names))
            return out.loss.clone()

        @staticmethod
        def backward(ctx, *grad_outputs):
            return tuple(grad_outputs[0] * grad for grad in ctx.saved_tensors)

    assert torch.autograd.gradcheck(Loss.apply, [p.requires_grad_() for p in detached(model).values()])


def test_clipping_keeps_the_dtype_of_each_of_several():
    grads = {"scale": torch.tensor(3.0), "weight": torch.tensor([4.0], dtype=torch.float64)}
    clipped, norm, _ = clip_grad_norm(grads, 1.0)
    assert norm == 5.0
    assert {name: grad.dtype for name, grad in clipped.items()} == {"scale": torch.float32, "weight": torch.float64}
    assert [grad.item() for grad in clipped.values()] == pytest.approx([0.6, 0.8], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_least_squares_has_its_closed_form(backend):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 3, generator=generator).double(), torch.randn(9, generator=generator).double()
    w = torch.randn(3, generator=generator).double()

    def loss_fn(params, buffers, batch, *, key, train):
        return LossOut((x @ params["w"] - y).square().mean(), 9, buffers, {})

    out, grads = value_and_grad(loss_fn, {"w": w}, {}, None, key=Key(0), backend=backend)
    torch.testing.assert_close(grads["w"], 2 / 9 * x.T @ (x @ w - y))
    torch.testing.assert_close(out.loss, (x @ w - y).square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_engine_gives_the_bits_of_backward(dtype):
    model, batch = model_and_batch(dtype)
    out, grads = value_and_grad(module_loss(model, squared_error), detached(model), {}, batch, key=Key(0))
    loss, _ = squared_error(model, batch)
    loss.backward()
    assert torch.equal(out.loss, loss.detach())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(grads[name], parameter.grad)


def test_a_gradient_can_be_differentiated_again_for_one_parameter_of_several():
    def loss_fn(params, buffers, batch, *, key, train):
        return LossOut((params["a"] * params["b"]).square(), 1, buffers, {})

    params = {"a": torch.tensor(2.0), "b": torch.tensor(3.0, requires_grad=True)}
    _, grads = value_and_grad(loss_fn, params, {}, None, key=Key(0))
    (second,) = torch.autograd.grad(grads["a"], params["b"])
    assert (grads["a"].item(), second.item()) == (36.0, 24.0)  # 2 a b^2 and 4 a b


def test_the_engines_agree():
    model, batch = model_and_batch()
    loss_fn = module_loss(model, squared_error)
    first, second = (
        value_and_grad(loss_fn, detached(model), {}, batch, key=Key(0), backend=backend)
        for backend in ("autograd", "func")
    )
    torch.testing.assert_close(first[1], second[1])
    torch.testing.assert_close(first[0].loss, second[0].loss)
    assert first[0].weight == second[0].weight == 6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", [3, 3.0, torch.tensor(3), torch.tensor(3.0)])
def test_everything_the_loss_returns_comes_back_detached(backend, weight):
    def loss_fn(params, buffers, batch, *, key, train):
        assert train
        total = params["w"].sum()
        return LossOut(total * 2, weight, {"b": buffers["b"] + total}, {"total": total})

    out, grads = value_and_grad(loss_fn, {"w": torch.ones(2)}, {"b": torch.ones(())}, None, key=Key(0), backend=backend)
    total = out.aux["total"]
    assert isinstance(total, torch.Tensor)
    assert (float(out.loss), float(out.buffers["b"]), float(total)) == (4.0, 3.0, 2.0)
    assert type(out.weight) is type(weight)
    assert out.weight == weight
    for tensor in (out.loss, out.buffers["b"], total, grads["w"]):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_that_the_loss_ignores_has_no_gradient_or_under_func_a_zero_one(backend):
    def loss_fn(params, buffers, batch, *, key, train):
        return LossOut(params["used"].sum(), 1, buffers, {})

    params = {"used": torch.ones(2), "unused": torch.ones(2, 3, dtype=torch.float64)}
    _, grads = value_and_grad(loss_fn, params, {}, None, key=Key(0), backend=backend)
    assert torch.equal(grads["used"], torch.ones(2))
    if backend == "autograd":
        assert grads["unused"] is None
    else:
        assert torch.equal(grads["unused"], torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_is_computed_also_where_gradients_are_off(backend):
    model, batch = model_and_batch()
    loss_fn = module_loss(model, squared_error)
    _, expected = value_and_grad(loss_fn, detached(model), {}, batch, key=Key(0), backend=backend)
    with torch.no_grad():
        _, grads = value_and_grad(loss_fn, detached(model), {}, batch, key=Key(0), backend=backend)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_is_no_scalar_is_refused(backend):
    def loss_fn(params, buffers, batch, *, key, train):
        return LossOut(params["w"], 1, buffers, {})

    with pytest.raises(ValueError, match=r"Expected a scalar loss.*shape \(2,\)"):
        value_and_grad(loss_fn, {"w": torch.ones(2)}, {}, None, key=Key(0), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_without_the_parameters_is_refused(backend):
    def loss_fn(params, buffers, batch, *, key, train):
        return LossOut(torch.ones(()), 1, buffers, {})

    with pytest.raises(ValueError, match="Expected a loss that depends on the parameters"):
        value_and_grad(loss_fn, {"w": torch.ones(2)}, {}, None, key=Key(0), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_may_be_a_parameter_itself(backend):
    def loss_fn(params, buffers, batch, *, key, train):
        return LossOut(params["w"], 1, buffers, {})

    params = {"w": torch.tensor(2.0)}
    check_loss_fn(loss_fn, params, {}, None, key=Key(0), train=True)
    assert value_and_grad(loss_fn, params, {}, None, key=Key(0), backend=backend)[1] == {"w": 1.0}


def test_an_unknown_engine_is_refused():
    model, batch = model_and_batch()
    with pytest.raises(ValueError, match=r"Expected backend .*Received: 'jax'"):
        value_and_grad(module_loss(model, squared_error), detached(model), {}, batch, key=Key(0), backend="jax")  # type: ignore[arg-type]


FLOATS = st.floats(-1e6, 1e6, width=32)
GRADIENTS = st.lists(st.lists(FLOATS, min_size=1, max_size=5), min_size=1, max_size=4)


@given(GRADIENTS, st.floats(1e-3, 1e3), st.sampled_from([torch.float32, torch.float64]))
def test_clipping_has_the_bits_of_clip_grad_norm(values, max_norm, dtype):
    grads = {str(i): torch.tensor(v, dtype=dtype) for i, v in enumerate(values)}
    parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in grads.values()]
    for parameter, grad in zip(parameters, grads.values(), strict=True):
        parameter.grad = grad.clone()
    expected_norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    versions = {name: (grad._version, grad.clone()) for name, grad in grads.items()}

    scaled, before, after = clip_grad_norm(grads, max_norm)
    assert torch.equal(before, expected_norm)
    assert torch.equal(before, nn.utils.get_total_norm(list(grads.values())))
    for parameter, new in zip(parameters, scaled.values(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(new, parameter.grad)
    for name, (version, value) in versions.items():
        assert grads[name]._version == version
        assert torch.equal(grads[name], value)
        assert scaled[name].data_ptr() != grads[name].data_ptr()
    rounding = 1e-5
    assert float(global_norm(scaled)) <= max_norm * (1 + rounding)
    torch.testing.assert_close(after, global_norm(scaled), rtol=rounding, atol=1e-30)


@given(GRADIENTS)
def test_the_global_norm_is_that_of_one_long_vector(values):
    grads = {str(i): torch.tensor(v, dtype=torch.float64) for i, v in enumerate(values)}
    expected = math.sqrt(math.fsum(x * x for v in values for x in v))
    assert float(global_norm(grads)) == pytest.approx(expected, rel=1e-12)


def test_gradients_of_several_dtypes_keep_them_when_clipped_also_scalars():
    values = {"scalar": torch.tensor(3.0), "wide": torch.tensor([4.0], dtype=torch.float64)}
    parameters = [nn.Parameter(torch.zeros_like(value)) for value in values.values()]
    for parameter, value in zip(parameters, values.values(), strict=True):
        parameter.grad = value.clone()
    nn.utils.clip_grad_norm_(parameters, 0.1)
    for parameter, clipped in zip(parameters, clip_grad_norm(values, 0.1)[0].values(), strict=True):
        assert parameter.grad is not None
        assert (clipped.dtype, clipped.item()) == (parameter.dtype, parameter.grad.item())


def test_a_small_gradient_is_not_scaled_up():
    grads, before, after = clip_grad_norm({"w": torch.tensor([0.03, 0.04])}, 1.0)
    assert torch.equal(grads["w"], torch.tensor([0.03, 0.04]))
    assert torch.equal(before, after)


@pytest.mark.parametrize("max_norm", [0, 0.0, -1.0, math.nan])
def test_a_norm_to_clip_at_is_above_zero(max_norm):
    with pytest.raises(ValueError, match=f"clipping norm above 0.*Received: {max_norm}"):
        clip_grad_norm({"w": torch.ones(2)}, max_norm)
