"""Claims about `dwiml_func.core.weights`: what was trained goes back into any module, whole or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dwiml_func import ema, init_state, load_into, module_loss, sgd, train_step
from dwiml_func.core.state import mark_donated


class Tied(nn.Module):
    """Tied weights, a frozen parameter, a buffer that is not persistent."""

    positions: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("positions", torch.arange(4.0), persistent=False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.norm(self.encode(x + self.positions))) * self.scale


def test_the_trained_weights_are_in_the_module_and_ties_hold() -> None:
    torch.manual_seed(0)
    model, batch = Tied(), torch.randn(8, 4)
    loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
    state = init_state(model, sgd(), seed=0)
    for _ in range(3):
        state, _ = train_step(state, batch, loss_fn=loss_fn, optimizer=sgd(), lr=0.1)
    shifted = dict(state.buffers)
    shifted["positions"] = shifted["positions"] + 1
    state = state.replace(buffers=shifted)
    weight = model.encode.weight
    model.eval()
    assert load_into(model, state) is None
    assert model.decode.weight is model.encode.weight is weight
    assert weight.requires_grad
    assert not model.scale.requires_grad
    assert not model.training
    tensors = {**state.params, **state.buffers}
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert own.keys() == tensors.keys()
    assert all(torch.equal(own[name], tensors[name]) for name in own)
    assert own["norm.num_batches_tracked"] == 3
    weight.data.zero_()  # the state keeps its own tensors
    assert state.params["encode.weight"].abs().sum() > 0


def test_other_parameters_may_be_written() -> None:
    model = nn.Linear(2, 1)
    state = init_state(model, sgd(), seed=0)
    load_into(model, state, params={name: torch.full_like(p, 7) for name, p in state.params.items()})
    assert float(model.weight.detach().sum()) == 14


def test_a_state_that_was_donated_is_refused_also_where_another_shares_its_tensors() -> None:
    state = init_state(nn.Linear(2, 1), sgd(), seed=0)
    shared = state.replace(epoch=1)
    mark_donated(state)
    for each in (state, shared):
        with pytest.raises(RuntimeError, match="donated to the update after step 0"):
            load_into(nn.Linear(2, 1), each)


def test_a_module_without_memory_and_an_optimizer_without_an_average_are_refused() -> None:
    state = init_state(nn.Linear(2, 1), sgd(), seed=0)
    with pytest.raises(ValueError, match="weight is on the meta device, where nothing can be written"):
        load_into(nn.Linear(2, 1).to("meta"), state)
    with pytest.raises(ValueError, match="made for another optimizer: of their trees, average is in only one"):
        load_into(nn.Linear(2, 1), state, optimizer=ema(sgd()))


def expanded() -> nn.Module:
    module = nn.Linear(2, 1)
    module.weight = nn.Parameter(torch.ones(1, 1).expand(1, 2))
    return module


def of_inference() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(2, 1)


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (expanded(), "weight is expanded: its elements share memory"),
        (of_inference(), "weight was made in torch.inference_mode"),
        (nn.Linear(3, 1), "weight has shape (1, 2) in the state and (1, 3) in the module"),
        (nn.Linear(2, 1, bias=False), "the module has no bias"),
        (nn.Linear(2, 1).double(), "weight is torch.float32 in the state and torch.float64 in the module"),
        (nn.Sequential(*(nn.Linear(2, 1) for _ in range(3))), "and 5 more"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_and_left_alone(module: nn.Module, named: str) -> None:
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(ValueError, match="does not fit the module") as error:
        load_into(module, init_state(nn.Linear(2, 1), sgd(), seed=0))
    assert named in str(error.value)
    assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
