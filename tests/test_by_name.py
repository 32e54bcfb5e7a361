"""Claims about `by_name`: the param groups of torch.optim, bitwise; frozen parameters; patterns that must match."""

from functools import partial
from typing import Any

import pytest
import torch
from optimizer_cases import addresses, assert_same_bits, evaluated, gradient, run_torch, run_updates, some_tensors

from dwiml_func.optim import (
    accumulate,
    adam,
    adamw,
    by_name,
    chain,
    clip_by_global_norm,
    ema,
    muon,
    nadam,
    rmsprop,
    schedule_free_sgd,
    sgd,
)
from dwiml_func.optim.name_patterns import first_matches

FACTORIES = {
    "sgd": (partial(sgd, momentum=0.9), partial(torch.optim.SGD, momentum=0.9)),
    "adam": (adam, torch.optim.Adam),
    "adamw": (adamw, torch.optim.AdamW),
    "rmsprop": (rmsprop, torch.optim.RMSprop),
    "nadam": (nadam, torch.optim.NAdam),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("kind", FACTORIES)
def test_groups_are_those_of_torch_optim(kind, donate):
    ours, theirs = FACTORIES[kind]

    def make(params: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        groups = [
            {"params": [params["a.bias"], params["scale"]], "weight_decay": 0.0},
            {"params": [params["b.weight"]], "lr_factor": 0.1, "weight_decay": 0.5},
            {"params": [params["a.weight"], params["empty"]]},
        ]
        return [theirs(groups, weight_decay=0.2)]

    options = {"*.bias|sc?le": {"weight_decay": 0.0}, "b.*": {"lr": 0.1, "weight_decay": 0.5}}
    optimizer = by_name(ours, options, weight_decay=0.2)
    assert_same_bits(run_updates(optimizer, donate=donate)[0], run_torch(make))


@pytest.mark.parametrize("donate", [False, True])
def test_a_clip_groups_and_an_average_are_those_of_torch(donate):
    averages = {}

    def make(params: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        averages.update({name: param.detach().clone() for name, param in params.items()})
        groups = [{"params": [params["a.bias"]], "weight_decay": 0.0}]
        groups += [{"params": [param for name, param in params.items() if name != "a.bias"]}]
        return [torch.optim.AdamW(groups, weight_decay=0.2)]

    clip = partial(torch.nn.utils.clip_grad_norm_, max_norm=0.5)
    expected = run_torch(make, before_step=clip)
    groups = by_name(adamw, {"*.bias": {"weight_decay": 0.0}}, weight_decay=0.2)
    optimizer = chain(clip_by_global_norm(0.5), ema(groups, 0.9))
    params, opt_state = run_updates(optimizer, donate=donate)
    assert_same_bits(params, expected)
    assert opt_state["optimizer"].keys() == {"average", "optimizer"}


def test_without_patterns_it_is_the_optimizer_itself():
    assert_same_bits(run_updates(by_name(adam, {}, beta1=0.5))[0], run_updates(adam(beta1=0.5))[0])


def test_the_first_pattern_that_matches_counts():
    params, grads = (
        {"a.bias": torch.ones(1), "a.weight": torch.ones(1)},
        {"a.bias": torch.ones(1), "a.weight": torch.ones(1)},
    )
    for options, expected in (
        ({"*.bias": {"lr": 0.5}, "a.*": {"lr": 0.25}}, (0.5, 0.75)),
        ({"a.*": {"lr": 0.25}, "*.bias": {"lr": 0.5}}, (0.75, 0.75)),
    ):
        optimizer = by_name(sgd, options)
        new, _ = optimizer.update(grads, optimizer.init(params), params, lr=1.0, step=0)
        assert (float(new["a.bias"]), float(new["a.weight"])) == expected


def test_the_names_of_one_model_are_not_taken_for_those_of_another():
    assert first_matches(("x*",), ("x1", "y1")) == (0, None)
    assert first_matches(("x*",), ("y1", "x1")) == (None, 0)
    assert first_matches(("y*", "*"), ("x1", "y1")) == (1, 0)


def test_case_counts_in_patterns():
    with pytest.raises(ValueError, match=r"A.bias"):
        by_name(sgd, {"A.bias": {}}).init(some_tensors(0))


@pytest.mark.parametrize("donate", [False, True])
def test_frozen_parameters_stay_the_very_tensors_and_have_no_state(donate):
    optimizer, params = by_name(adam, {"a.*|scale": None}), some_tensors(0)
    opt_state = optimizer.init(params)
    assert list(opt_state["defaults"]["exp_avg"]) == ["empty", "b.weight"]
    assert list(opt_state) == ["defaults"]
    before = {name: tensor.clone() for name, tensor in params.items()}
    grads = gradient(0) | {"a.bias": None}
    new, new_state = optimizer.update(grads, opt_state, params, lr=0.1, step=0, donate=donate)
    for name in ("a.weight", "a.bias", "scale"):
        assert new[name] is params[name]
        assert torch.equal(new[name], before[name])
    assert list(new_state) == ["defaults"]
    assert not torch.equal(new["b.weight"], before["b.weight"])


def test_a_donated_update_reuses_the_memory_of_all_groups():
    optimizer, params = by_name(adamw, {"a.*": {"lr": 0.1}, "b.*": None}), some_tensors(0)
    opt_state = optimizer.init(params)
    old = addresses(params, opt_state)
    assert addresses(optimizer.update(gradient(0), opt_state, params, lr=0.1, step=0, donate=True)) == old


def test_groups_of_averages_evaluate_with_their_averages():
    optimizer = by_name(lambda **options: ema(sgd(), **options), {"a.*": {"decay": 0.0}}, decay=0.9)
    params, opt_state = run_updates(optimizer, num_steps=3)
    averages = evaluated(optimizer, opt_state, params)
    assert list(averages) == list(params)
    assert torch.equal(averages["a.weight"], params["a.weight"])
    assert torch.equal(averages["b.weight"], opt_state["defaults"]["average"]["b.weight"])
    assert by_name(sgd, {}).eval_params is None


def test_it_can_be_the_other_optimizer_of_muon():
    optimizer = muon(others=by_name(adamw, {"*bias": None}))
    new, _ = optimizer.update(gradient(0), optimizer.init(some_tensors(0)), some_tensors(0), lr=0.1, step=0)
    assert torch.equal(new["a.bias"], some_tensors(0)["a.bias"])


def test_one_group_alone_may_have_an_average_and_use_the_weight():
    def make(averaged=False):
        return ema(chain(accumulate(1), sgd()), 0.0) if averaged else sgd()

    optimizer, params = by_name(make, {"a": {"averaged": True}}), {"a": torch.ones(1), "b": torch.ones(1)}
    assert optimizer.uses_weight
    assert optimizer.eval_params is not None
    grads = {"a": torch.ones(1), "b": torch.ones(1)}
    new, state = optimizer.update(grads, optimizer.init(params), params, lr=0.5, step=0, weight=3)
    later = {name: p + 1 for name, p in new.items()}
    assert {name: float(p) for name, p in optimizer.eval_params(state, later).items()} == {"a": 0.5, "b": 1.5}


def test_muon_keeps_a_state_of_what_there_is_only():
    matrix, vector = {"w": torch.ones(2, 2)}, {"b": torch.ones(2)}
    for others in (None, adamw(), schedule_free_sgd()):
        assert list(muon(others=others).init(matrix)) == ["momentum_buffer"]
    assert list(muon(others=adamw()).init(vector)) == ["others"]
    assert list(muon(others=sgd()).init(matrix | vector)) == ["momentum_buffer"]


def test_patterns_that_freeze_everything_are_an_error():
    with pytest.raises(ValueError, match="patterns that freeze all of them"):
        by_name(adam, {"*weight": None, "*bias": None}).init({"weight": torch.ones(1), "bias": torch.ones(1)})


def test_a_pattern_that_matches_nothing_is_an_error_with_similar_names():
    params = {"rnn.weight_hh": torch.ones(1), "rnn.weight_ih": torch.ones(1), "head.bias": torch.ones(1)}
    message = r"Received: 'rnn.wieght\*'. The parameters are rnn.weight_[ih]h, rnn.weight_[ih]h and 1 more"
    with pytest.raises(ValueError, match=message):
        by_name(sgd, {"*.bias": {}, "rnn.wieght*": {}}).init(params)
    with pytest.raises(ValueError, match=r"Received: 'xyz'. The parameters are a0, a1, a2 and 1 more\."):
        by_name(sgd, {"xyz": {}}).init({f"a{number}": torch.ones(1) for number in range(4)})


def test_options_that_the_optimizer_does_not_know_are_refused_at_once():
    no_options: Any = {"*.bias": 0}
    with pytest.raises(TypeError, match=r"momentum"):
        by_name(adam, {"*.bias": {"momentum": 0.9}})
    with pytest.raises(ValueError, match=r"Expected lr with a finite value of at least 0. Received: lr=-1"):
        by_name(adam, {"*.bias": {"lr": -1}})
    with pytest.raises(
        TypeError, match=r"Expected a dict of options for the pattern '\*.bias', or None .* Received: 0"
    ):
        by_name(adam, no_options)
