"""Claims about `dwiml_func.compiled.step_graph`: as it is, without torch.compile, it gives what `train_step` gives."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from test_compiled_step import same_states, squared_error
from torch import Tensor

from dwiml_func import adam, adamw, init_state, module_loss, sgd, train_step
from dwiml_func.compiled import step_graph
from dwiml_func.compiled.step_graph import make_graph, merged
from dwiml_func.core.rng import without_seeds
from dwiml_func.optim import accumulate, chain, skip_not_finite

SKIPPING = chain(skip_not_finite(3), sgd(momentum=0.9))


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))


def batch_of(size: int, *, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, 3 * size).reshape(size, 3)
    return x, factor * x[:, :1]


def taken(state: Any, batch: Any, *, blocked: float = 0.0, is_reused: bool = False, **options: Any) -> Any:
    """The state after a step through the graph, the names of its metrics, and its values."""
    graph = make_graph(**{"clip_grad": 0.1, "donate": is_reused, **options})
    parts = dict(state.params), dict(state.buffers), dict(state.opt_state)
    numbers = torch.tensor([0.05, state.step, blocked], dtype=torch.float64)
    with without_seeds():
        params, buffers, opt_state, names, values = graph(batch, *parts, numbers)
    new = state.replace(params=params, buffers=buffers, opt_state=opt_state, step=state.step + 1)
    return new, names, values.tolist()


@pytest.mark.parametrize("is_reused", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "non_finite", "skips"),
    [
        *((adam(), policy, False) for policy in (None, "raise", "defer")),
        *((SKIPPING, policy, policy in (None, "skip")) for policy in (None, "skip", "raise", "defer")),
    ],
)
def test_a_step_is_taken_skipped_or_kept_out_as_its_policy_says(optimizer, non_finite, skips, is_reused):
    loss_fn = module_loss(make_model(), squared_error)
    options = {"loss_fn": loss_fn, "optimizer": optimizer, "clip_grad": 0.1}
    start = init_state(make_model(), optimizer, seed=0)
    start, _ = train_step(start, batch_of(4), **options, lr=0.1)
    start = start.replace(step=7, batch=7)
    options["non_finite"] = non_finite
    options["is_reused"] = is_reused
    names = ["grad_norm", "loss", "first_output", "unclipped_grad_norm", *(["skipped"] if skips else [])]

    state, found, values = taken(copy.deepcopy(start), batch_of(6), **options)
    eager = {name: option for name, option in options.items() if name != "is_reused"}
    expected, sums = train_step(start, batch_of(6), **eager, lr=0.05)
    assert sorted(found) == sorted(names)
    assert values[2:4] == [0, 0]
    assert values[4:] == pytest.approx([float(number) for name in found for number in sums[name]], rel=1e-5)
    torch.testing.assert_close(state.params, expected.params)
    torch.testing.assert_close((state.buffers, state.opt_state), (expected.buffers, expected.opt_state))

    bad = batch_of(6, factor=math.inf)
    state, found, values = taken(copy.deepcopy(start), bad, **options)
    assert sorted(found) == sorted(names)
    assert values[0] == math.inf
    assert values[2:4] == [7, 1]
    assert all(torch.equal(state.params[name], own) for name, own in start.params.items())
    assert all(torch.equal(state.buffers[name], own) for name, own in start.buffers.items())
    if skips:
        place = 4 + 2 * found.index("skipped")
        assert values[place : place + 2] == [1, 1]
        assert [number for number in values[4:] if number] == [1, 1]
        expected, _ = train_step(start, bad, **eager, lr=0.05)
        torch.testing.assert_close(state.opt_state, expected.opt_state)
    else:
        assert same_states(state, start)

    for batch in (batch_of(6), bad):  # after one that was noted
        state, _, values = taken(copy.deepcopy(start), batch, blocked=1.0, **options)
        assert same_states(state, start)
        assert values[2:4] == [0, 0]


@pytest.mark.parametrize("is_reused", [False, True])
def test_micro_batches_are_averaged_by_their_points_also_where_a_loss_counts_them_as_a_number(is_reused):
    optimizer = chain(accumulate(2), sgd())
    options = {"loss_fn": module_loss(make_model(), squared_error), "optimizer": optimizer, "non_finite": "raise"}
    state = expected = init_state(make_model(), optimizer, seed=0)
    for size in (8, 2):
        state, *_ = taken(copy.deepcopy(state), batch_of(size), clip_grad=None, is_reused=is_reused, **options)
        expected, _ = train_step(expected, batch_of(size), lr=0.05, **options)
        torch.testing.assert_close(state.params, expected.params)


def test_the_weight_decay_of_a_step_is_that_of_its_optimizer():
    loss_fn, numbers = module_loss(make_model(), squared_error), [0.05, 0.0, 0.0]
    state = init_state(make_model(), adamw(), seed=0)
    parts = dict(state.params), dict(state.buffers), dict(state.opt_state)
    options: dict[str, Any] = {"loss_fn": loss_fn, "clip_grad": None, "donate": False, "non_finite": None}
    with without_seeds():
        given = make_graph(optimizer=adamw, **options)(batch_of(4), *parts, torch.tensor([*numbers, 2.0]))
        fixed = make_graph(optimizer=adamw(weight_decay=2.0), **options)(batch_of(4), *parts, torch.tensor(numbers))
    torch.testing.assert_close(given[0], fixed[0])


@pytest.mark.parametrize(("optimizer", "is_elementwise"), [(adam(), True), (SKIPPING, False)])
def test_a_compiled_graph_writes_into_what_it_may_write_into(optimizer, is_elementwise, monkeypatch):
    options = {"loss_fn": module_loss(make_model(), squared_error), "optimizer": optimizer, "non_finite": "raise"}
    start = init_state(make_model(), optimizer, seed=0)
    expected, *_ = taken(start, batch_of(4), **options)
    monkeypatch.setattr(step_graph.torch.compiler, "is_compiling", lambda: True)
    for is_reused in (False, True):
        state = copy.deepcopy(start)
        own = dict(state.params)
        new, *_ = taken(state, batch_of(4), **options, is_reused=is_reused)
        is_written = is_reused and is_elementwise
        assert [tensor is None for tensor in new.params.values()] == [is_written] * len(own)
        if is_written:
            new = new.replace(params=merged(state.params, new.params), opt_state=merged(state.opt_state, new.opt_state))
        assert all((new.params[name] is own[name]) == is_written for name in own)
        torch.testing.assert_close((new.params, new.opt_state), (expected.params, expected.opt_state))


def test_what_is_written_is_found_again_and_numbers_and_new_leaves_are_given():
    old = {"a": torch.zeros(2), "n": {"b": torch.zeros(1), "count": torch.tensor(1)}, "gone": torch.ones(1)}
    new = {"a": torch.ones(2), "n": {"b": torch.ones(1), "count": torch.tensor(2), "later": torch.ones(3)}}
    new |= {"m": {"c": torch.ones(1)}, "d": torch.ones(1)}
    rest = step_graph._write(old, new)
    assert rest["a"] is rest["n"]["b"] is None
    assert rest["n"]["count"] is new["n"]["count"]
    assert rest["m"]["c"] is new["m"]["c"]
    whole = merged(old, rest)
    assert whole["a"] is old["a"]
    assert whole["n"]["b"] is old["n"]["b"]
    torch.testing.assert_close(whole, new)
