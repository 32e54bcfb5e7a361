"""Claims about `dwiml_func.ensemble.rng`: under vmap a member's numbers are bitwise identical to its own alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.ensemble.rng import MemberGenerators, per_member_rng

KEYS = [Key(1), Key(2, (7,)), Key(3)]

DRAWS = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "two draws": lambda x: F.dropout(F.dropout(x, 0.3), 0.5) + F.dropout(torch.ones(4), 0.5).sum(),
    "in place": lambda x: F.dropout(x + F.dropout(torch.zeros(4), 0.3), 0.3, inplace=True),
    "channels": lambda x: F.dropout1d(x, 0.5) + F.dropout2d(x[None, :, :, None], 0.5)[0, :, :, 0],
    "module": nn.Sequential(nn.Dropout(0.5), nn.ReLU(), nn.Dropout1d(0.3)),
    "torch.dropout": lambda x: torch.dropout(x, 0.4, True),
    "not in place": lambda x: F.dropout3d(y := x[None, :, :, None, None] * 1.0) * 0 + y,
    "uniform": lambda x: x * torch.rand_like(x) + torch.rand(4),
    "normal": lambda x: x + torch.randn_like(x) + torch.randn((3, 4)),
    "integers": lambda x: x + torch.randint(0, 100, (3, 4)) + torch.randperm(4),
    "bernoulli": lambda x: x * torch.bernoulli(x.detach().sigmoid()),
    "none and all": lambda x: F.dropout(x, 0.3, training=False) + F.dropout(x, 0.0) + F.dropout(x, 1.0),
}


@pytest.mark.parametrize("is_shared", [False, True], ids=["inputs of its own", "shared inputs"])
@pytest.mark.parametrize("keys", [KEYS, [Key(5)] * 3], ids=["keys", "one key"])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_each_member_draws_what_it_would_draw_alone(draw, keys, is_shared):
    inputs = torch.linspace(-1, 1, 36).reshape(3, 3, 4)
    inputs = inputs[:1].expand(3, 3, 4) if is_shared else inputs

    def alone(x: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        with torch_rng(key):
            out = draw(x)
        return out.detach(), torch.autograd.grad(out.sum(), x)[0]

    def value(x: Tensor, index: Tensor) -> Tensor:
        with per_member_rng(MemberGenerators(keys), index):
            return draw(x)

    def mapped(x: Tensor) -> Tensor:
        return torch.func.vmap(value, (None if is_shared else 0, 0))(x, torch.arange(3))

    leaf = (inputs[0] if is_shared else inputs).clone().requires_grad_()
    out = mapped(leaf)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    expected = [alone(x, key) for x, key in zip(inputs, keys, strict=True)]
    assert torch.equal(out, torch.stack([value for value, _ in expected]).expand_as(out))
    if not is_shared:
        assert torch.equal(grad, torch.stack([grad for _, grad in expected]))


def test_it_works_with_the_gradients_of_torch_func():
    def loss(x: Tensor, index: Tensor) -> Tensor:
        with per_member_rng(MemberGenerators(KEYS), index):
            return F.dropout(x, 0.5).square().sum()

    x = torch.ones(3, 16)
    grads = torch.func.vmap(torch.func.grad(loss))(x, torch.arange(3))
    for grad, key in zip(grads, KEYS, strict=True):
        with torch_rng(key):
            assert torch.equal(grad, F.dropout(torch.ones(16), 0.5) * 4)


def _slope(x: Tensor) -> Tensor:
    return torch.func.grad(lambda y: F.dropout(y.exp(), 0.5).square().sum())(x)


def _curvature(x: Tensor) -> Tensor:
    return torch.func.jacrev(_slope)(x).sum(0) + torch.func.grad(lambda y: (2 * x).sum())(x)


@pytest.mark.parametrize("derivative", [_slope, _curvature])
def test_derivatives_of_torch_func_may_be_taken_in_the_model(derivative):
    x = torch.linspace(-1, 1, 36).reshape(3, 12)

    def value(x: Tensor, index: Tensor) -> Tensor:
        with per_member_rng(MemberGenerators(KEYS), index):
            return derivative(x).sin().sum()

    mapped = torch.func.vmap(torch.func.grad(value))(x, torch.arange(3))
    outside = torch.func.grad(lambda x: torch.func.vmap(value)(x, torch.arange(3)).sum())(x)
    for number, key in enumerate(KEYS):
        with torch_rng(key):
            expected = torch.func.grad(lambda x: derivative(x).sin().sum())(x[number])
        assert expected.any()
        torch.testing.assert_close([mapped[number], outside[number]], [expected] * 2, rtol=1e-5, atol=1e-5)


def test_draws_that_have_no_member_are_refused():
    def value(x: Tensor, index: Tensor) -> Tensor:
        with per_member_rng(MemberGenerators(KEYS), index):
            return x + torch.empty(3).normal_()

    with pytest.raises(RuntimeError, match="random"):
        torch.func.vmap(value)(torch.ones(3, 3), torch.arange(3))


def test_draws_from_a_generator_of_their_own_are_refused():
    own = torch.Generator()

    def value(x: Tensor, index: Tensor) -> Tensor:
        with per_member_rng(MemberGenerators(KEYS), index):
            return x + torch.rand(3, generator=own)

    with pytest.raises(RuntimeError, match="random"):
        torch.func.vmap(value)(torch.ones(3, 3), torch.arange(3))


def test_the_global_generators_stay_as_they_were():
    before = torch.get_rng_state()

    def value(index: Tensor) -> Tensor:
        with per_member_rng(MemberGenerators(KEYS), index):
            return F.dropout(torch.ones(3)) + torch.rand(3)

    torch.func.vmap(value)(torch.arange(3))
    assert torch.equal(torch.get_rng_state(), before)
