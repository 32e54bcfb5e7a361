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
    add_decayed_weights,
    by_name,
    chain,
    clip_by_global_norm,
    clip_by_value,
    ema,
    in_place,
    lion,
    lookahead,
    muon,
    nadam,
    radam,
    rmsprop,
    schedule_free_adamw,
    schedule_free_sgd,
    skip_not_finite,
)

SIZES = (40, 3, 5)


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(*pair) for pair in zip((4, *SIZES), (*SIZES, 1), strict=True)]
    model = torch.nn.Sequential(*layers[:1], torch.nn.Tanh(), *layers[1:])
    layers[1].weight = torch.nn.Parameter(layers[1].weight.detach().t().contiguous().t())
    model.register_parameter("weight", torch.nn.Parameter(torch.tensor(0.5)))  # as a number of `accumulate`
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(8)))
    return model


def loss(model, batch):
    return (model(batch) * getattr(model, "weight", 1) - 1).square().mean(), len(batch)


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


OURS = {
    "adam": adam(),
    "adamw": adamw(weight_decay=0.1),
    "sgd": sgd(),
    "momentum": sgd(momentum=0.9, nesterov=True, weight_decay=0.1),
    "nadam": nadam(),
    "radam": radam(),
    "lion": lion(weight_decay=0.1),
    "rmsprop": rmsprop(momentum=0.9, centered=True),
    "muon": muon(others=adamw()),
    "schedule free": schedule_free_adamw(weight_decay=0.1),
    "schedule free sgd": schedule_free_sgd(),
    "clip": chain(clip_by_global_norm(0.1), adam()),
    "links": chain(clip_by_value(0.1), add_decayed_weights(0.1), clip_by_global_norm(0.1), adam()),
    "accumulate": chain(skip_not_finite(3), accumulate(2), clip_by_global_norm(0.1), sgd(momentum=0.9)),
    "ema": ema(nadam()),
    "lookahead": ema(lookahead(adam(), 2)),
    "average of a chain": ema(chain(accumulate(2), clip_by_global_norm(0.1), adam())),
    "groups": ema(by_name(adamw, {"*bias": {"weight_decay": 0}, "0.*": None}, weight_decay=0.1)),
}
OTHERS = {  # a user's, and such as write all values once all are known
    "counting": counting(),
    "remembering": remembering(),
    "chain of another": chain(accumulate(2), clip_by_global_norm(0.1), remembering()),
    "groups of chains": by_name(lambda: chain(clip_by_global_norm(0.1), adam()), {"*bias": {"lr": 0.1}}),
    "lookahead of a chain": lookahead(chain(clip_by_value(0.1), adam()), 2),
    "muon with a chain": muon(others=chain(clip_by_global_norm(0.1), adam())),
}


@pytest.mark.parametrize("optimizer", [*OURS.values(), *OTHERS.values()], ids=[*OURS, *OTHERS])
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
    if optimizer not in (OTHERS["remembering"], OTHERS["chain of another"]):
        found = {name: tensor.data_ptr() for name, tensor in state_leaves(donated).items() if _is_written(tensor)}
        assert {name: places[name] for name in found} == found
    assert pure.sums["non_finite"] == donated.sums["non_finite"] == (2, 1)
    expected, actual = state_leaves(pure), state_leaves(donated)
    assert expected.keys() == actual.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)] == []


def _is_written(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() > 0  # counts and numbers may be new


def test_large_parameters_are_cut_and_small_ones_go_together(monkeypatch):
    monkeypatch.setattr(in_place, "_MIN_PIECE", 4)
    params = {"a": torch.ones(10), "b": torch.ones(2, 3), "c": torch.ones(()), "d": torch.ones(3), "e": torch.ones(1)}
    like, turned = {name: torch.ones_like(p) for name, p in params.items()}, {"b": torch.ones(3, 2).T}
    cut = {
        "a": [(["a"], slice(0, 4)), (["a"], slice(4, 8)), (["a"], slice(8, 12))],
        "b": [(["b"], slice(0, 4)), (["b"], slice(4, 8))],
    }
    rest = [(["c", "d"], None), (["e"], None)]

    def pieces(grads=like, cuts=True, **state):
        return list(in_place._pieces(params, grads, state, cuts=cuts))

    assert pieces(m=like, numbers={"b": torch.ones(())}, step=torch.ones(2)) == [*cut["a"], *cut["b"], *rest]
    for whole in (
        pieces(grads=like | {"b": None}),
        pieces(grads=like | turned),  # flattened, it would be a copy
        pieces(m={"m": turned}),
        pieces(m=like | {"b": torch.ones(6)}),
    ):
        assert whole == [*cut["a"], (["b"], None), *rest]
    assert pieces(cuts=False) == [(["a"], None), (["b"], None), *rest]
    monkeypatch.setattr(in_place, "_PIECES", 2)  # of 21 elements
    assert pieces() == [(["a"], None), (["b", "c", "d"], None), (["e"], None)]


def test_a_new_tensor_that_is_a_part_of_an_old_one_is_not_written_over():
    old = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.zeros(2)}
    new = {"a": torch.full((3,), 7.0), "b": old["a"][1:]}
    found = in_place.commit(torch.tensor(False), old, new)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [7.0] * 3, "b": [2.0, 3.0]}


def test_a_state_that_is_no_flat_tree_is_not_updated_in_place():
    one = torch.zeros(2)
    for state, is_flat in (
        ({"m": {"a": one, "b": one}}, True),
        ({"m": {"a": one, "b": {}}}, False),
        ({"m": one}, False),
    ):
        assert in_place.can_update_in_place(counting(), state) == is_flat
    assert not in_place.can_update_in_place(counting()._replace(is_elementwise=False), {"m": {"a": one}})
    marked = counting()._replace(update=in_place.separable(lambda *_, **__: None), is_elementwise=False)
    assert in_place.can_update_in_place(marked, {"m": {"a": {"b": one}}})  # of any tree


def peak_bytes(function) -> int:
    """The most that a call has allocated at one time, in bytes, beside what was there before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    events, allocations = list(results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            allocations.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    sizes: dict[int, int] = {}
    most = 0
    for _, place, size in sorted(allocations, key=lambda each: each[0]):
        if size > 0:
            sizes[place] = size
        else:  # a block from before has no size here
            sizes.pop(place, None)
        most = max(most, sum(sizes.values()))
    return most


@pytest.fixture(scope="module")
def bare_peaks() -> dict[bool, int]:
    """Of a step of a plain loop with Adam, and of one with Muon."""
    peaks = {}
    for is_muon in (False, True):
        model = make_large_model()
        optimizer: Any = (
            torch.optim.Muon([p for p in model.parameters() if p.dim() == 2])
            if is_muon
            else torch.optim.Adam(model.parameters(), foreach=False)
        )

        def bare(model: Any = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            loss(model, torch.ones(2, 100))[0].backward()
            optimizer.step()

        bare()
        peaks[is_muon] = peak_bytes(bare)
    return peaks


def make_large_model() -> torch.nn.Module:
    return torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(12)))


@pytest.mark.parametrize(
    "name",
    ["adam", "muon", "schedule free", "clip_grad", "links", "accumulate", "lookahead", "average of a chain", "groups"],
)
def test_it_allocates_at_most_what_a_bare_loop_does_and_one_copy_of_the_gradients(name, bare_peaks, monkeypatch):
    monkeypatch.setattr(in_place, "_MIN_PIECE", 1)
    optimizer, model = OURS.get(name, adam()), make_large_model()
    options: dict[str, Any] = {"lr": 0.1, "donate": True, "clip_grad": 0.1 if name == "clip_grad" else None}
    options |= {"loss_fn": module_loss(model, loss), "optimizer": optimizer, "non_finite": "defer"}
    state = init_state(model, optimizer, seed=0)

    def two_steps() -> None:  # the links of `accumulate` and `lookahead` act in every second one
        nonlocal state
        for _ in range(2):
            state, _ = train_step(state, torch.ones(2, 100), **options)

    two_steps()  # the first checks the loss, too
    peak = peak_bytes(two_steps)
    gradients = sum(4 * param.numel() for param in model.parameters())
    assert gradients < peak <= bare_peaks[name == "muon"] + gradients
