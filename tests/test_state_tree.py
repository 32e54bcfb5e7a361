"""Claims about states as trees, for tree functions, vmap and grad, and about nested states in ensembles and graphs."""

from typing import Any

import pytest
import torch
from test_composed_steps import COMPOSED, LOSS, NAN, SIZES, TwoHeads, batch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from dwiml_func.checkpoint.digest import state_digest, state_leaves
from dwiml_func.compiled.step import jit_step
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.loss import LossOut
from dwiml_func.core.report import Validation
from dwiml_func.core.rng import Key
from dwiml_func.core.state import TrainState, init_state
from dwiml_func.core.step import train_step
from dwiml_func.ensemble import EnsembleState, ensemble_eval_step, ensemble_step, member, stack_states
from dwiml_func.optim import adam, chain, ema, sgd, skip_not_finite
from dwiml_func.types import Params, Plateau, Sum

every_composed = pytest.mark.parametrize("name", COMPOSED)


def loss_of(name: str) -> Any:
    """The loss; for `accumulate`, which must not be left without a gradient under a transform, one of both heads."""

    def of_both(params: Params, *rest: Any, **options: Any) -> LossOut:
        out = LOSS(params, *rest, **options)
        return out._replace(loss=out.loss + 0 * sum(param.sum() for param in params.values()))

    return of_both if name == "chain" else LOSS


def start(name: str, seed: int = 0) -> TrainState:
    state = init_state(TwoHeads(), COMPOSED[name], seed=seed)
    return state.replace(params={key: tensor + 0.1 * seed for key, tensor in state.params.items()})


def test_a_state_is_a_tree_of_its_tensors():
    state = start("chain").replace(step=3, sums={"a": Sum(1.0, torch.ones(())), "b": Sum(2.0, 3.0)})
    leaves, structure = tree_flatten(state)
    assert len(leaves) == len(state_leaves(state)) + 1
    again = tree_unflatten(leaves, structure)
    assert state_digest(again) == state_digest(state)
    numbers = {"epoch": 1, "batch": 2, "best": Best(0.5, 1, 2), "plateau": Plateau(1), "key": Key(5, (1,))}
    numbers["validations"] = (Validation(2, {"loss": 0.5}, 0.1),)
    moved = tree_map(lambda tensor: tensor, state.replace(**numbers))
    assert {name: getattr(moved, name) for name in numbers} == numbers
    doubled = tree_map(lambda tensor: tensor * 2, state)
    assert (doubled.step, doubled.sums) == (3, {"a": (1.0, torch.tensor(2.0)), "b": (2.0, 3.0)})
    assert torch.equal(doubled.params["stem.bias"], state.params["stem.bias"] * 2)
    assert state_digest(state.to("cpu")) == state_digest(state)
    assert all(tensor is state.params[name] for name, tensor in state.to("cpu").params.items())
    assert {tensor.device.type for tensor in state_leaves(state.to("meta")).values()} == {"meta"}
    assert {leaf.device.type for leaf in tree_leaves(state.to("meta"))} == {"meta"}


def test_an_ensemble_is_a_tree_of_its_tensors():
    position = {"step": 9, "epoch": 1, "batch": 2}
    states = [start("chain", n).replace(best=Best(0.5, n), plateau=Plateau(n), **position) for n in range(3)]
    ensemble = stack_states(states)
    again = tree_map(torch.clone, ensemble)
    assert isinstance(again, EnsembleState)
    assert [state_digest(member(again, n)) for n in range(3)] == [state_digest(state) for state in states]
    assert {name: getattr(again, name) for name in position} == position
    assert {leaf.device.type for leaf in tree_leaves(ensemble.to("meta"))} == {"meta"}


def test_a_step_is_mapped_and_differentiated_over_states():
    optimizer = ema(adam(), 0.9)
    states = [init_state(TwoHeads(), optimizer, seed=0)] * 2
    states = [tree_map(lambda t, n=n: t * (1 + n), state) for n, state in enumerate(states)]

    first, second = batch(0, 5), batch(1, 5)

    def step(state: TrainState, lr: torch.Tensor) -> TrainState:
        return train_step(state, first, loss_fn=LOSS, optimizer=optimizer, lr=lr)[0].replace(sums={})

    rates = torch.tensor([0.1, 0.2], dtype=torch.float64)
    mapped = torch.func.vmap(step)(tree_map(lambda *leaves: torch.stack(leaves), *states), rates)
    for number, state in enumerate(states):
        torch.testing.assert_close(
            tree_map(lambda t, n=number: t[n], mapped).params, dict(step(state, rates[number]).params)
        )

    def loss(state: TrainState) -> torch.Tensor:
        plain = sgd()
        own = state.replace(opt_state=plain.init(state.params))
        after, _ = train_step(own, first, loss_fn=LOSS, optimizer=plain, lr=0.1)
        return LOSS(after.params, after.buffers, second, key=after.key, train=False).loss

    slopes = torch.func.grad(loss)(states[0].replace(opt_state={}))
    assert isinstance(slopes, TrainState)
    assert slopes.params["stem.weight"].abs().sum() > 0


def assert_same(actual: TrainState, expected: TrainState, name: str, tolerance: float) -> None:
    leaves, others = state_leaves(actual), state_leaves(expected)
    assert leaves.keys() == others.keys()
    if name == "muon":  # its directions have the precision of bfloat16
        tolerance = 3e-2
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf, others[key], rtol=tolerance, atol=tolerance, msg=lambda text, k=key: k + text)


@every_composed
def test_members_of_an_ensemble_are_separate_runs(name):
    optimizer = COMPOSED[name]
    alone = [start(name, seed) for seed in range(2)]
    ensemble = stack_states(alone)
    for number, size in enumerate(SIZES):
        options = {"loss_fn": loss_of(name), "optimizer": optimizer, "clip_grad": 1.0}
        ensemble, _ = ensemble_step(ensemble, batch(number, size), lr=torch.tensor([0.1, 0.05]), **options)
        alone = [
            train_step(state, batch(number, size), lr=lr, **options)[0]
            for state, lr in zip(alone, (0.1, 0.05), strict=True)
        ]
    for number, state in enumerate(alone):
        assert_same(member(ensemble, number), state, name, 1e-6)
    sums = ensemble_eval_step(ensemble, batch(0, 5), loss_fn=LOSS, optimizer=optimizer)
    own = ensemble_eval_step(ensemble, batch(0, 5), loss_fn=LOSS)
    assert torch.equal(sums["loss"].total, own["loss"].total) == (optimizer.eval_params is None)  # type: ignore


def test_a_member_skips_a_step_alone_and_stops_after_too_many():
    optimizer = chain(skip_not_finite(1), adam())
    states = [init_state(TwoHeads(), optimizer, seed=seed) for seed in range(2)]
    broken = states[1].replace(params=tree_map(lambda t: t * torch.nan, states[1].params))
    ensemble = stack_states([states[0], broken])
    step = {"loss_fn": LOSS, "optimizer": optimizer, "lr": 0.1}
    ensemble, sums = ensemble_step(ensemble, batch(0, 5), **step)
    assert ensemble.active.tolist() == [True, True]
    assert sums["skipped"].total.tolist() == [0, 1]  # type: ignore
    ensemble, _ = ensemble_step(ensemble, batch(1, 5), **step)
    assert ensemble.active.tolist() == [True, False]
    ensemble, _ = ensemble_step(ensemble, NAN, **step)
    assert ensemble.active.tolist() == [True, False]
    assert ensemble.done[:, 0].tolist() == [3, 2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.compiles
@every_composed
def test_compiled_steps_are_those_of_train_step(name):
    options: dict[str, Any] = {"loss_fn": loss_of(name), "optimizer": COMPOSED[name]}
    compiled = jit_step(**options, donate=name in ("chain", "nadam"), backend="eager", max_compilations=20)
    actual, expected = start(name), start(name)
    inputs = [batch(number, SIZES[0]) for number in range(4 if name == "chain" else 3)]
    if name == "chain":
        inputs[1] = NAN
    for x in inputs:
        actual, sums = compiled(actual, x, lr=0.05)
        expected, expected_sums = train_step(expected, x, **options, lr=0.05)
        assert sums.keys() == expected_sums.keys()
        for key, pair in sums.items():
            assert tuple(pair) == pytest.approx(tuple(expected_sums[key]), rel=1e-5)
    assert compiled.eager_reason is None
    assert_same(actual, expected, name, 1e-6)
