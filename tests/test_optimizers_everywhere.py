"""Claims about all optimizers and compositions: pure, donated, mapped, differentiated, compiled, None."""

from typing import Any

import pytest
import torch
from optimizer_cases import (
    SHAPES,
    addresses,
    assert_same_bits,
    evaluated,
    gradient,
    learning_rate,
    run_updates,
    some_tensors,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dwiml_func.optim import (
    Optimizer,
    accumulate,
    adam,
    adamw,
    add_decayed_weights,
    by_name,
    chain,
    clip_by_global_norm,
    clip_by_value,
    ema,
    lion,
    lookahead,
    muon,
    nadam,
    rmsprop,
    schedule_free_adamw,
    schedule_free_sgd,
    sgd,
    skip_not_finite,
)

F64 = torch.float64
OPTIMIZERS = {
    "rmsprop": lambda decay: rmsprop(weight_decay=decay),
    "rmsprop_centered": lambda decay: rmsprop(weight_decay=decay, momentum=0.9, centered=True, eps=1e-2),
    "nadam": lambda decay: nadam(weight_decay=decay),
    "nadam_decoupled": lambda decay: nadam(weight_decay=decay, decoupled_weight_decay=True),
    "lion": lambda decay: lion(weight_decay=decay),
    "muon": lambda decay: muon(weight_decay=decay, others=adamw(weight_decay=decay)),
    "schedule_free_sgd": lambda decay: schedule_free_sgd(weight_decay=decay),
    "schedule_free_adamw": lambda decay: schedule_free_adamw(weight_decay=decay),
    "ema": lambda decay: ema(sgd(momentum=0.9, weight_decay=decay), 0.9),
    "lookahead": lambda decay: lookahead(adam(weight_decay=decay), num_steps=3),
    "groups": lambda decay: by_name(adamw, {"*.bias|scale": {"lr": 0.1}, "b.*": None}, weight_decay=decay),
    "links": lambda decay: chain(
        clip_by_global_norm(2.0), clip_by_value(0.5), add_decayed_weights(decay, mask="*weight"), adam()
    ),
    "gates": lambda decay: chain(skip_not_finite(3), accumulate(2), adamw(weight_decay=decay)),
    "everything": lambda decay: chain(
        skip_not_finite(3),
        accumulate(2),
        clip_by_global_norm(0.5),
        ema(lookahead(by_name(adamw, {"*.bias": {"lr": 0.1}, "scale": None}, weight_decay=decay), num_steps=2), 0.9),
    ),
}
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)


def assert_close(kind: str, actual: Any, expected: Any) -> None:
    """Close in float64 or float32; the directions of muon have the precision of bfloat16."""
    if kind == "muon":
        torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)
    else:
        torch.testing.assert_close(actual, expected)


def weight_of(optimizer: Optimizer, step: int | Tensor) -> dict:
    return {"weight": step + 1} if optimizer.uses_weight else {}


def trained(kind: str, decay, lr, steps, scale: float | Tensor = 1.0, dtype: torch.dtype = F64) -> tuple:
    """(parameters, those to evaluate with) after updates with gradients that depend on the parameters."""
    optimizer = OPTIMIZERS[kind](decay)
    params = some_tensors(0, dtype, scale)
    opt_state = optimizer.init(params)
    for number, step in enumerate(steps):
        grads = {name: params[name] * tensor for name, tensor in some_tensors(number + 1, dtype).items()}
        params, opt_state = optimizer.update(grads, opt_state, params, lr=lr, step=step, **weight_of(optimizer, step))
    return params, evaluated(optimizer, opt_state, params)


@every_optimizer
def test_an_update_changes_nothing_that_came_in_and_is_repeatable(kind):
    optimizer = OPTIMIZERS[kind](0.1)
    params, opt_state = run_updates(optimizer, num_steps=3)
    inputs = (gradient(3), opt_state, params)
    before = [(leaf._version, leaf.clone()) for leaf in tree_leaves(inputs)]
    results = [optimizer.update(*inputs, lr=0.1, step=3) for _ in range(2)]
    for leaf, (version, value) in zip(tree_leaves(inputs), before, strict=True):
        assert leaf._version == version
        assert torch.equal(leaf, value)
    for first, second in zip(*map(tree_leaves, results), strict=True):
        assert torch.equal(first, second)


@every_optimizer
def test_donation_changes_no_bit_and_reuses_the_memory_of_parameters(kind):
    optimizer = OPTIMIZERS[kind](0.1)
    plain, plain_state = run_updates(optimizer, num_steps=20)
    donated, donated_state = run_updates(optimizer, num_steps=20, donate=True)
    assert_same_bits(donated, plain)
    for first, second in zip(tree_leaves(plain_state), tree_leaves(donated_state), strict=True):
        assert torch.equal(first, second)
    grads = gradient(20)
    before = {name: grad.clone() for name, grad in grads.items()}
    new, _ = optimizer.update(grads, donated_state, donated, lr=0.1, step=20, donate=True)
    if kind != "lookahead":  # its restart from the slow weights is a copy
        assert addresses(new) == addresses(donated)
    assert_same_bits(grads, before)


@every_optimizer
@pytest.mark.parametrize("steps", [range(8), torch.arange(8)], ids=["numbers", "tensors"])
def test_members_of_an_ensemble_are_updated_as_each_alone(kind, steps):
    trained(kind, 0.1, 0.05, range(8))  # vmap would refuse to make the tensors
    values = (0.05, 0.01), (0.1, 0.0), (1.0, 2.0)

    def member(lr: Tensor, decay: Tensor, scale: Tensor) -> tuple:
        return trained(kind, decay, lr, steps, scale)

    mapped = torch.func.vmap(member)(*(torch.tensor(each, dtype=F64) for each in values))
    for number, (lr, decay, scale) in enumerate(zip(*values, strict=True)):
        alone = trained(kind, decay, lr, range(8), scale)
        assert_close(kind, tree_map(lambda t, n=number: t[n], mapped), alone)


@every_optimizer
def test_tensors_for_numbers_change_rounding_only(kind):
    for dtype in (torch.float32, F64):
        numbers = trained(kind, 0.1, 0.05, range(8), dtype=dtype)
        decay, lr = torch.tensor(0.1, dtype=F64), torch.tensor(0.05, dtype=F64)
        tensors = trained(kind, decay, lr, torch.arange(8), dtype=dtype)
        assert {tensor.dtype for tensor in tree_leaves(tensors)} == {dtype}
        assert_close(kind, tensors, numbers)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode uses it
@every_optimizer
def test_learning_rate_and_weight_decay_have_gradients(kind):
    def flat(lr: Tensor, decay: Tensor) -> Tensor:
        return torch.cat([leaf.flatten() for leaf in tree_leaves(trained(kind, decay, lr, range(5)))])

    numbers = [torch.tensor(value, dtype=F64, requires_grad=True) for value in (0.05, 0.1)]
    backwards = torch.func.jacrev(flat, argnums=(0, 1))(*numbers)  # all at once
    if kind == "muon":  # rounding to bfloat16 makes steps of finite differences
        assert all(slope.isfinite().all() for slope in backwards)
        return
    assert torch.autograd.gradcheck(flat, numbers)
    forwards = torch.func.jacfwd(flat, argnums=(0, 1), randomness="same")(*numbers)
    torch.testing.assert_close(forwards, backwards)


@every_optimizer
def test_an_update_can_be_differentiated_through_its_gradients(kind):
    if kind in ("muon", "lion"):
        pytest.skip("the direction has no useful derivative")

    def after_two_updates(params: Tensor, first: Tensor, second: Tensor) -> Tensor:
        optimizer, values = OPTIMIZERS[kind](0.1), {name: params * (i + 1) for i, name in enumerate(SHAPES)}
        opt_state = optimizer.init(values)
        for step, grad in enumerate((first, second)):
            grads = dict.fromkeys(SHAPES, grad)
            values, opt_state = optimizer.update(
                grads, opt_state, values, lr=0.1, step=step, **weight_of(optimizer, step)
            )
        return torch.cat([leaf.flatten() for leaf in tree_leaves(evaluated(optimizer, opt_state, values))])

    inputs = [some_tensors(seed, F64)["a.bias"].requires_grad_() for seed in (3, 4, 5)]
    assert torch.autograd.gradcheck(after_two_updates, inputs)


@every_optimizer
def test_an_update_compiles_once_for_all_steps_and_learning_rates(kind):
    optimizer = OPTIMIZERS[kind](0.1)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(optimizer.update, fullgraph=True, backend=count)
    params = some_tensors(0, F64)
    opt_state = optimizer.init(params)
    for step in range(6):
        inputs = gradient(step, F64), opt_state, params
        expected = optimizer.update(*inputs, lr=learning_rate(step), step=step, **weight_of(optimizer, step))
        number = torch.tensor(step)
        lr = torch.tensor(learning_rate(step), dtype=F64)
        actual = compiled(*inputs, lr=lr, step=number, **weight_of(optimizer, number))
        assert_close(kind, actual, expected)
        params, opt_state = expected
    assert len(graphs) == 1
    torch.compiler.reset()  # all optimizers share one function, and torch compiles a function 8 times at most


@every_optimizer
def test_names_decide_and_not_the_order_of_a_dict(kind):
    optimizer, params = OPTIMIZERS[kind](0.1), some_tensors(0)
    backwards = dict(reversed(gradient(0).items()))
    first, _ = optimizer.update(gradient(0), optimizer.init(params), params, lr=0.1, step=0)
    second, _ = optimizer.update(backwards, optimizer.init(params), params, lr=0.1, step=0)
    assert_same_bits(second, first)


@pytest.mark.parametrize("kind", ["lion", "schedule_free_sgd", "schedule_free_adamw"])
def test_complex_parameters_are_pairs_of_real_ones(kind):
    optimizer = OPTIMIZERS[kind](0.1)
    params = some_tensors(0, torch.complex128)
    reals = {name: torch.view_as_real(tensor).clone() for name, tensor in params.items()}
    opt_state, real_state = optimizer.init(params), optimizer.init(reals)
    for step in range(4):
        grads = gradient(step, torch.complex128)
        real_grads = {name: torch.view_as_real(tensor) for name, tensor in grads.items()}
        params, opt_state = optimizer.update(grads, opt_state, params, lr=0.1, step=step, donate=True)
        reals, real_state = optimizer.update(real_grads, real_state, reals, lr=0.1, step=step)
        assert_same_bits({name: torch.view_as_real(tensor) for name, tensor in params.items()}, reals)


@pytest.mark.parametrize("kind", ["rmsprop", "nadam", "lion", "schedule_free_adamw", "ema"])
def test_complex_parameters_beside_real_ones_change_neither(kind):
    optimizer = OPTIMIZERS[kind](0.1)
    makes = {name: torch.complex64 if name.startswith("a.") else torch.float32 for name in SHAPES}

    def update(names):
        params = {name: some_tensors(0, makes[name])[name] for name in names}
        opt_state = optimizer.init(params)
        for step in range(3):
            grads = {name: gradient(step, makes[name])[name] for name in names}
            params, opt_state = optimizer.update(grads, opt_state, params, lr=0.1, step=step)
        return params

    alone = [update([name for name in SHAPES if name.startswith("a.") == is_complex]) for is_complex in (True, False)]
    assert_same_bits(update(list(SHAPES)), {name: (alone[0] | alone[1])[name] for name in SHAPES})


def test_muon_evaluates_with_what_the_other_optimizer_evaluates_with():
    optimizer, other = muon(others=schedule_free_adamw()), schedule_free_adamw()
    params, opt_state = run_updates(optimizer, num_steps=5)
    rest = {name: tensor for name, tensor in some_tensors(0).items() if len(SHAPES[name]) != 2}
    state = other.init(rest)
    for step in range(5):
        rest, state = other.update(
            {name: gradient(step)[name] for name in rest}, state, rest, lr=learning_rate(step), step=step
        )
    matrices = {name: params[name] for name in SHAPES if len(SHAPES[name]) == 2}
    found = evaluated(optimizer, opt_state, params)
    assert_same_bits({name: found[name] for name in SHAPES}, {**params, **evaluated(other, state, rest), **matrices})


@pytest.mark.parametrize("kind", ["rmsprop_centered", "nadam", "lion", "schedule_free_sgd", "schedule_free_adamw"])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_a_parameter_without_a_gradient_keeps_its_value_and_its_state(kind, as_tensors):
    optimizer = OPTIMIZERS[kind](0.1)
    params, opt_state = run_updates(optimizer, num_steps=3, dtype=F64)
    grads = gradient(3, F64) | {"a.bias": None, "scale": None}
    step = torch.tensor(3) if as_tensors else 3
    new, new_state = optimizer.update(grads, opt_state, params, lr=0.1, step=step)
    for name in ("a.bias", "scale"):
        assert new[name] is params[name]
        for part, old in opt_state.items():
            if isinstance(old, dict):
                assert new_state[part][name] is old[name]
    assert not torch.equal(new["a.weight"], params["a.weight"])


@pytest.mark.parametrize("as_tensors", [False, True])
def test_each_parameter_counts_its_own_updates(as_tensors):
    optimizer = nadam()
    params = some_tensors(0, F64)
    opt_state = optimizer.init(params)
    expected = {"scale": params["scale"]}
    expected_state = optimizer.init(expected)
    updates = 0
    for step in range(9):
        grads: dict[str, Any] = dict(gradient(step, F64))
        if step % 3 == 0:
            grads["scale"] = None
        else:
            alone = {"scale": grads["scale"]}
            expected, expected_state = optimizer.update(alone, expected_state, expected, lr=0.1, step=updates)
            updates += 1
        number = torch.tensor(step) if as_tensors else step
        params, opt_state = optimizer.update(grads, opt_state, params, lr=0.1, step=number)
    torch.testing.assert_close(params["scale"], expected["scale"])
    assert opt_state["missed"].keys() == {"scale"}
    assert int(opt_state["missed"]["scale"]) == 3


def test_without_any_gradient_nothing_moves():
    for kind, make in OPTIMIZERS.items():
        if kind in ("rmsprop", "nadam", "lion", "schedule_free_sgd"):
            optimizer, params = make(0.1), some_tensors(0)
            none = dict.fromkeys(SHAPES)
            new, _ = optimizer.update(none, optimizer.init(params), params, lr=0.1, step=0)
            assert all(new[name] is params[name] for name in SHAPES)


def test_donation_changes_no_bit_where_only_some_parameters_have_half_precision():
    halves = {name: torch.bfloat16 if name.startswith("a.") else torch.float32 for name in SHAPES}

    def updated(donate):
        params = {name: some_tensors(0, dtype)[name] for name, dtype in halves.items()}
        opt_state = adam().init(params)
        for step in range(20):
            grads = {name: gradient(step, dtype)[name] for name, dtype in halves.items()}
            params, opt_state = adam().update(grads, opt_state, params, lr=0.05, step=step, donate=donate)
        return params

    assert_same_bits(updated(donate=True), updated(donate=False))


@every_optimizer
def test_donation_changes_no_bit_in_half_precision_either(kind):
    # On the CPU, torch._foreach_mul_ rounds its factor to bfloat16: a beta2 of 0.999 becomes 1.
    optimizer = OPTIMIZERS[kind](0.1)
    plain, donated = (run_updates(optimizer, num_steps=20, dtype=torch.bfloat16, donate=d)[0] for d in (False, True))
    assert_same_bits(donated, plain)
