"""Claims about `dwiml_func.core.state`: the state is an immutable value that shares no memory with the module."""

import json
from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dwiml_func.core.early_stopping import Best
from dwiml_func.core.rng import Key
from dwiml_func.core.state import TrainState, init_state, mark_donated
from dwiml_func.ensemble.state import stack_states
from dwiml_func.optim.optimizers import adam, sgd


@pytest.mark.parametrize("frozen", [(), ("0.bias", "1.weight")])
def test_a_first_state_holds_the_module_s_values_in_its_own_memory(frozen):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    state = init_state(model, adam(), seed=7)
    assert list(state.params) == [name for name, _ in model.named_parameters() if name not in frozen]
    assert sorted(state.buffers) == sorted([*frozen, *(name for name, _ in model.named_buffers())])
    theirs = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in {**state.params, **state.buffers}.items():
        assert torch.equal(tensor, theirs[name])
        assert tensor.dtype == theirs[name].dtype
        assert tensor.data_ptr() != theirs[name].data_ptr()
        assert not tensor.requires_grad
    assert (state.key, state.step, state.epoch, state.batch, state.sums, state.best) == (Key(7), 0, 0, 0, {}, Best())


def test_a_frozen_parameter_is_a_buffer():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    state = init_state(model, adam(), seed=0)
    assert list(state.params) == list(state.opt_state["exp_avg"]) == ["weight"]
    assert torch.equal(state.buffers["bias"], model.bias)
    assert not model.bias.requires_grad


def test_tied_weights_appear_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight  # type: ignore[union-attr]
    assert list(init_state(model, sgd(), seed=0).params) == ["0.weight", "0.bias", "1.bias"]


def tied_by_data(model: Any) -> None:
    model[1].weight.data = model[0].weight.data


def tied_by_a_view(model: Any) -> None:
    model[1].weight = nn.Parameter(model[0].weight.detach().T)


def made_sparse(model: Any) -> None:
    model[1].weight = nn.Parameter(torch.eye(2).to_sparse())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tied_by_data, "0.weight and 1.weight overlap"),
        (tied_by_a_view, "0.weight and 1.weight overlap"),
        (made_sparse, "1.weight is torch.sparse_coo"),
    ],
)
def test_weights_that_a_state_would_hold_apart_or_cannot_hold_are_refused(change, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    change(model)
    with pytest.raises(ValueError, match=message):
        init_state(model, sgd(), seed=0)


def test_columns_of_one_matrix_are_parameters_of_their_own():
    model, matrix = nn.Module(), torch.ones(4, 4)
    model.a, model.b = nn.Parameter(matrix[:, ::2]), nn.Parameter(matrix[:, 1::2])
    assert list(init_state(model, sgd(), seed=0).params) == ["a", "b"]


def test_an_optimizer_of_torch_is_refused_with_what_to_give():
    model = nn.Linear(1, 1)
    with pytest.raises(TypeError, match=r"such as adam\(\)\. Received: SGD \(.*Those of torch\.optim are functions"):
        init_state(model, torch.optim.SGD(model.parameters()), seed=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"such as adam\(\)\. Received: <function sgd.*call them"):
        init_state(model, sgd, seed=0)  # type: ignore[arg-type]


def test_a_module_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match=r"at least one parameter that requires a gradient.*Linear with 2 frozen"):
        init_state(nn.Linear(1, 1).requires_grad_(False), sgd(), seed=0)


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=f"Received: {seed}$"):
        init_state(nn.Linear(1, 1), sgd(), seed=seed)


def test_a_key_may_stand_for_the_seed():
    assert init_state(nn.Linear(1, 1), sgd(), seed=Key(3, (4,))).key == Key(3, (4,))


def test_a_seed_of_numpy_s_integers_is_the_same_seed_and_can_be_recorded():
    three: Any = np.int64(3)
    assert json.dumps(init_state(nn.Linear(1, 1), sgd(), seed=three).key) == json.dumps(Key(3))
    assert json.dumps(init_state(nn.Linear(1, 1), sgd(), seed=Key(three, (three,))).key) == json.dumps(Key(3, (3,)))


def test_a_state_cannot_be_changed_but_replaced():
    state = init_state(nn.Linear(1, 1), sgd(), seed=0)
    for field in fields(TrainState):
        with pytest.raises(FrozenInstanceError):
            setattr(state, field.name, None)
    later = state.replace(step=3, epoch=1)
    assert (later.step, later.epoch, state.step, state.epoch) == (3, 1, 0, 0)
    assert later.params is state.params


def test_a_repr_is_one_short_line():
    state = init_state(nn.Linear(2, 1), sgd(), seed=7)
    assert repr(state) == (
        "TrainState(step=0, epoch=0, batch=0, params=3 float32 on cpu, key=Key(seed=7, path=()), best=none)"
    )
    assert repr(state.replace(best=Best(0.123456789, 3, 0, batch=2))).endswith("best=0.123457 in epoch 3, batch 2)")
    assert repr(state.replace(best=Best(0.5, 3, 1))).endswith("best=0.5 in epoch 3)")
    mixed = {
        name: p.to(dtype) for (name, p), dtype in zip(state.params.items(), (torch.half, torch.double), strict=True)
    }
    largest = {
        "key": Key(2**64 - 1, (2**32 - 1,) * 50),
        "best": Best(-0.12345678901234567, 10**4, 10**4),
        **dict.fromkeys(("step", "epoch", "batch"), 10**7),
    }
    states = [state, state.replace(params=mixed), state.replace(params=mixed, **largest)]
    ensembles = [stack_states([each] * 20) for each in states]
    two = stack_states([state.replace(best=Best(value, 3, 0)) for value in (0.75, 0.5)])
    assert repr(two).endswith("best=0.5 in epoch 3)")
    shared = states[0].replace(epoch=1)
    mark_donated(state)
    assert repr(state) == "TrainState(step=0, epoch=0, batch=0, donated)"
    assert repr(shared) == "TrainState(step=0, epoch=1, batch=0, donated)"
    for value in (*states, shared, *ensembles):
        assert len(repr(value)) <= 200, repr(value)
        assert "\n" not in repr(value)
