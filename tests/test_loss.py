"""Claims about `dwiml_func.core.loss`: the model behaves like the module, and nothing of a call is left in either."""

import gc
import math
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from dwiml_func.core.attributes import is_same_loss
from dwiml_func.core.gradients import value_and_grad
from dwiml_func.core.loss import LossOut, _Views, module_loss
from dwiml_func.core.rng import Key, torch_rng


def squared_error(model, batch):
    x, y = batch
    return (model(x) - y).square().mean(), len(y)


def named(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    return params, {name: b.clone() for name, b in module.named_buffers()}


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)


def noisy_model() -> nn.Module:
    with torch_rng(Key(1)):
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


@pytest.mark.parametrize("train", [True, False])
def test_it_computes_what_the_module_computes_with_those_tensors(batch, train):
    structure, values = noisy_model(), noisy_model()
    with torch.no_grad():
        for tensor in values.parameters():
            tensor.mul_(1.5)
    params, buffers = named(values)
    out = module_loss(structure, squared_error)(params, buffers, batch, key=Key(7), train=train)

    values.train(train)
    with torch_rng(Key(7)):
        loss, weight = squared_error(values, batch)
    assert torch.equal(out.loss, loss)
    assert out.weight == weight == 8
    assert out.buffers.keys() == buffers.keys()
    for name, expected in values.named_buffers():
        assert torch.equal(out.buffers[name], expected)


def test_masks_follow_the_key_and_nothing_else(batch):
    model = noisy_model()
    loss_fn = module_loss(model, squared_error)
    losses = []
    for key in (Key(1), Key(1), Key(2), Key(1, (0,))):
        torch.rand(3)
        losses.append(loss_fn(*named(model), batch, key=key, train=True).loss.item())
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("stochastic", [True, False])
def test_only_a_stochastic_loss_seeds_the_generator(batch, stochastic):
    model = noisy_model()
    loss_fn = module_loss(model, squared_error, stochastic=stochastic)
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(loss_fn(*named(model), batch, key=Key(0), train=True).loss.item())
    assert (losses[0] == losses[1]) == stochastic


def test_the_module_keeps_its_tensors_and_flags(batch):
    model = noisy_model().eval()
    model[0].weight.requires_grad_(False)  # type: ignore[union-attr]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: (id(t), t._version, t.requires_grad, t.detach().clone()) for name, t in tensors.items()}
    loss_fn = module_loss(model, squared_error)
    for train in (True, False):
        loss_fn(*named(model), batch, key=Key(0), train=train)
    assert not any(submodule.training for submodule in model.modules())
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, (identity, version, requires_grad, value) in before.items():
        tensor = after[name]
        assert (id(tensor), tensor._version, tensor.requires_grad) == (identity, version, requires_grad)
        assert torch.equal(tensor, value)
        assert tensor.grad is None


def test_later_changes_to_the_module_do_not_reach_the_loss(batch):
    model = noisy_model()
    params, buffers = named(model)
    loss_fn = module_loss(model, squared_error)
    before = loss_fn(params, buffers, batch, key=Key(0), train=True).loss
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    model.eval()
    assert torch.equal(loss_fn(params, buffers, batch, key=Key(0), train=True).loss, before)


class AssignsABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.count: Tensor
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.linear(x) * self.count


def test_a_buffer_that_the_model_assigns_is_returned_and_not_kept(batch):
    model = AssignsABuffer()
    params, buffers = named(model)
    loss_fn = module_loss(model, squared_error)
    outs = [loss_fn(params, buffers, batch, key=Key(0), train=True) for _ in range(2)]
    assert [out.buffers["count"].item() for out in outs] == [1, 1]
    assert loss_fn(params, outs[0].buffers, batch, key=Key(0), train=True).buffers["count"].item() == 2
    assert buffers["count"].item() == model.count.item() == 0


@pytest.mark.parametrize(
    ("old", "new", "is_same"),
    [(1.0, 1.0, True), (1, 1 + 1e-12, False), (0.0, 1e-12, False), (math.nan, math.nan, True), (1.0, math.nan, False)],
)
def test_losses_are_the_same_if_bitwise_equal_or_both_nan(old, new, is_same):
    assert is_same_loss(*(torch.tensor(loss, dtype=torch.float64) for loss in (old, new))) == is_same


def test_returned_buffers_carry_no_graph(batch):
    class KeepsItsOutput(AssignsABuffer):
        def forward(self, x: Tensor) -> Tensor:
            self.count = self.linear(x).mean()
            return self.linear(x)

    model = KeepsItsOutput()
    params, buffers = named(model)
    params = {name: tensor.requires_grad_() for name, tensor in params.items()}
    out = module_loss(model, squared_error)(params, buffers, batch, key=Key(0), train=True)
    assert out.loss.requires_grad
    assert not out.buffers["count"].requires_grad


def test_a_buffer_that_starts_as_none_cannot_hide_a_state(batch):
    class Lazy(AssignsABuffer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", None)

        def forward(self, x: Tensor) -> Tensor:
            was_empty.append(self.cache is None)
            self.cache = torch.ones(()) if self.cache is None else self.cache + 1
            return self.linear(x) * self.cache

    was_empty: list[bool] = []
    model = Lazy()
    loss_fn = module_loss(model, squared_error)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"filled the buffers cache, which are None"):
            loss_fn(*named(model), batch, key=Key(0), train=True)
    assert was_empty == [True, True]
    assert model.cache is None


def test_tied_weights_are_one_tensor_with_one_gradient():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight  # type: ignore[union-attr]
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = torch.ones(2, 3)
    loss_fn = module_loss(model, lambda model, x: (model(x).sum(), len(x)))
    out = loss_fn({"0.weight": weight}, {}, x, key=Key(0), train=True)
    expected = (torch.tanh(x @ weight.T) @ weight.T).sum()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, weight)[0], torch.autograd.grad(expected, weight)[0], rtol=1e-6, atol=1e-6
    )


def test_further_means_come_back_detached(batch):
    model = nn.Linear(4, 3)
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    def compute_batch_loss(model, batch):
        loss, weight = squared_error(model, batch)
        return loss, weight, {"root": loss.sqrt()}

    out = module_loss(model, compute_batch_loss)(params, {}, batch, key=Key(0), train=True)
    assert isinstance(out, LossOut)
    root = out.aux["root"]
    assert isinstance(root, torch.Tensor)
    assert not root.requires_grad
    assert torch.equal(root, out.loss.detach().sqrt())


def test_no_tensor_of_a_call_is_kept_alive(batch):
    loss_fn = module_loss(noisy_model(), squared_error)
    params, buffers = named(noisy_model())
    params = {name: tensor.requires_grad_() for name, tensor in params.items()}
    out = loss_fn(params, buffers, batch, key=Key(0), train=True)
    alive = [weakref.ref(tensor) for tensor in [*params.values(), *out.buffers.values(), out.loss]]
    del params, buffers, out
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


def test_an_error_inside_leaves_no_trace(batch):
    model = noisy_model()

    def fails(model, batch):
        model(batch[0])
        if batch[1] is None:
            raise KeyError("inside")
        return squared_error(model, batch)

    loss_fn = module_loss(model, fails)
    before = loss_fn(*named(model), batch, key=Key(0), train=True).loss
    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="inside"):
        loss_fn(*named(model), (batch[0], None), key=Key(0), train=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loss_fn(*named(model), batch, key=Key(0), train=True).loss, before)


def test_further_means_may_be_numbers(batch):
    def with_numbers(model, batch):
        return *squared_error(model, batch)[:2], {"share": 0.1, "own": (0.5, 3)}

    out = module_loss(nn.Linear(4, 3), with_numbers)(*named(nn.Linear(4, 3)), batch, key=Key(0), train=True)
    share = torch.tensor(0.1, dtype=torch.float64)  # as exact as the number
    assert out.aux == {"share": share, "own": (torch.tensor(0.5), torch.tensor(3.0))}


@pytest.mark.parametrize("name", ["w", "count"])
def test_a_loss_that_writes_into_the_state_is_refused(name):
    def loss_fn(params, buffers, batch, *, key, train):
        with torch.no_grad():
            ({**params, **buffers}[name]).add_(1)
        return LossOut(params["w"].clone().sum(), 1, buffers, {})

    with pytest.raises(ValueError, match=f"writes into {name} of the state"):
        value_and_grad(loss_fn, {"w": torch.ones(1)}, {"count": torch.zeros(1)}, None, key=Key(0))


@pytest.mark.parametrize("result", [torch.zeros(()), (torch.zeros(()),), (1, 2, {}, 4), None, [1, 2]])
def test_another_result_is_refused(result):
    loss_fn = module_loss(nn.Linear(1, 1), lambda model, batch: result)
    params, buffers = named(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"return \(loss, weight\) or \(loss, weight, aux\)\. Received: ") as error:
        loss_fn(params, buffers, None, key=Key(0), train=True)
    assert type(result).__name__ in str(error.value)


def test_names_that_do_not_fit_are_listed(batch):
    loss_fn = module_loss(nn.Linear(4, 3), squared_error)
    with pytest.raises(ValueError, match=r"Missing: bias\. Unexpected: extra\."):
        loss_fn({"weight": torch.zeros(3, 4)}, {"extra": torch.zeros(1)}, batch, key=Key(0), train=True)


def test_each_thread_runs_a_model_of_its_own_and_a_graph_that_of_the_first(monkeypatch):
    views = _Views(nn.Linear(1, 1), None)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        own, *others = views.here(), one.submit(views.here).result(), other.submit(views.here).result()
        assert len({id(view) for view in (own, *others)}) == 3
        assert (views.here() is own, one.submit(views.here).result() is others[0]) == (True, True)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert [pool.submit(views.here).result() is own for pool in (one, other)] == [True, True]
