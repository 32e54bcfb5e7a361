"""Claims about donated steps with a deferred check: the values of pure ones, in place, with little memory."""

import math
from functools import partial
from typing import Any

import pytest
import torch

from dwiml_func import Optimizer, adam, adamw, init_state, module_loss, sgd, train_step
from dwiml_func.checkpoint.digest import state_leaves
from dwiml_func.optim import (
    accumulate,
    chain,
    clip_by_global_norm,
    ema,
    in_place,
    lookahead,
    nadam,
    schedule_free_adamw,
)

SIZES = (40, 3, 5)


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(*pair) for pair in zip((4, *SIZES), (*SIZES, 1), strict=True)]
    model = torch.nn.Sequential(*layers[:1], torch.nn.Tanh(), *layers[1:])
    layers[1].weight = torch.nn.Parameter(layers[1].weight.detach().t().contiguous().t())
    model.register_parameter("scale", torch.nn.Parameter(torch.tensor(0.5)))
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(8)))
    return model


def loss(model, batch):
    return (model(batch) * getattr(model, "scale", 1) - 1).square().mean(), len(batch)


def counting() -> Optimizer:
    """An optimizer of a user: elementwise, with a number beside."""

    def update(grads: Any, opt_state: Any, params: Any, **options: Any) -> Any:
        return sgd().update(grads, {}, params, **options)[0], {"count": opt_state["count"] + 1}

    return Optimizer(lambda params: {"count": torch.zeros(())}, update, is_elementwise=True)


def remembering() -> Optimizer:
    """An optimizer of a user, whose new state is the old parameters."""

    def update(grads: Any, opt_state: Any, params: Any, **options: Any) -> Any:
        return sgd().update(grads, {}, params, **options)[0], {"before": dict(params)}

    return Optimizer(lambda params: {"before": {name: p.clone() for name, p in params.items()}}, update)


OTHERS = {  # such as write all or a part of their values once all are known
    "nadam": nadam(),
    "chain": chain(clip_by_global_norm(0.1), adam()),
    "accumulate": chain(accumulate(2), sgd(momentum=0.9)),
    "ema": ema(nadam()),
    "lookahead": lookahead(adam(), 2),
    "schedule free": schedule_free_adamw(),
    "remembering": remembering(),
}
ELEMENTWISE = {
    "adam": adam(),
    "adamw": adamw(weight_decay=0.1),
    "sgd": sgd(),
    "momentum": sgd(momentum=0.9),
    "counting": counting(),
}


@pytest.mark.parametrize("optimizer", [*ELEMENTWISE.values(), *OTHERS.values()], ids=[*ELEMENTWISE, *OTHERS])
def test_a_donated_step_with_a_deferred_check_has_the_values_of_a_pure_one_in_the_old_memory(optimizer, monkeypatch):
    monkeypatch.setattr(in_place, "_MIN_PIECE", 6)  # pieces of one parameter, and of several
    loss_fn = module_loss(make_model(), loss)
    states = [init_state(make_model(), optimizer, seed=0) for _ in range(2)]
    places = {name: tensor.data_ptr() for name, tensor in state_leaves(states[1]).items()}
    good = torch.linspace(-1, 1, 20).reshape(5, 4)
    for number, batch in enumerate((good, good / 2, good * math.nan, good)):
        for which, donate in enumerate((False, True)):
            step = partial(train_step, loss_fn=loss_fn, optimizer=optimizer, donate=donate, non_finite="defer")
            states[which], _ = step(states[which], batch, lr=0.1 / (number + 1))
    pure, donated = states
    if optimizer.update.__module__ != __name__:
        found = {name: tensor.data_ptr() for name, tensor in state_leaves(donated).items() if _is_written(tensor)}
        assert {name: places[name] for name in found} == found
    assert pure.sums["non_finite"] == donated.sums["non_finite"] == (2, 1)
    expected, actual = state_leaves(pure), state_leaves(donated)
    assert expected.keys() == actual.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)] == []


def _is_written(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() > 0  # counts and numbers may be new


def test_a_state_that_is_no_flat_tree_is_not_updated_in_place():
    one = torch.zeros(2)
    for state, is_flat in (
        ({"m": {"a": one, "b": one}}, True),
        ({"m": {"a": one, "b": {}}}, False),
        ({"m": one}, False),
    ):
        assert in_place.can_update_in_place(adam(), state) == is_flat
    assert not in_place.can_update_in_place(adam()._replace(is_elementwise=False), {"m": {"a": one}})


def peak_bytes(function) -> int:
    """The most that a call has allocated at one time, in bytes."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    now = most = 0
    for _, size in events:
        now += size
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("optimizer", "num_copies"),
    [(adam(), 1), (OTHERS["nadam"], 1), (OTHERS["chain"], 2), (OTHERS["ema"], 2)],
    ids=["adam", "nadam", "chain", "ema"],
)
def test_it_allocates_at_most_what_a_bare_loop_does_and_few_copies_of_the_gradients(optimizer, num_copies):
    """One copy is the new values' on the way, another what a link or the average computes."""

    def make() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(1000, 1000), torch.nn.Linear(1000, 1000), torch.nn.Linear(1000, 1))

    model, batch = make(), torch.ones(2, 1000)
    bare_optimizer = torch.optim.Adam(model.parameters(), foreach=False)

    def bare() -> None:
        bare_optimizer.zero_grad()
        loss(model, batch)[0].backward()
        bare_optimizer.step()

    step = partial(
        train_step, loss_fn=module_loss(make(), loss), optimizer=optimizer, lr=0.1, donate=True, non_finite="defer"
    )
    state = init_state(make(), optimizer, seed=0)

    def ours() -> None:
        nonlocal state
        state, _ = step(state, batch)

    for run in (bare, ours):
        run()
    gradients = sum(4 * param.numel() for param in model.parameters())
    assert gradients < peak_bytes(bare)
    assert peak_bytes(ours) <= peak_bytes(bare) + num_copies * gradients
