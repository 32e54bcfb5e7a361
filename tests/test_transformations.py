"""Claims about `chain` and its links: clipping, decay, accumulation, skipped steps, gates."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from optimizer_cases import (
    SHAPES,
    addresses,
    assert_same_bits,
    evaluated,
    gradient,
    run_torch,
    run_updates,
    some_tensors,
)
from torch.utils._pytree import tree_leaves

from dwiml_func.optim import (
    Gate,
    Transform,
    accumulate,
    adam,
    add_decayed_weights,
    by_name,
    chain,
    clip_by_global_norm,
    clip_by_value,
    ema,
    lookahead,
    muon,
    rmsprop,
    schedule_free_sgd,
    sgd,
    skip_not_finite,
    skipped_too_often,
)

F64 = torch.float64
NAN, INF = math.nan, math.inf


def with_some_none(step: int, dtype: torch.dtype) -> dict:
    return gradient(step, dtype) | {"a.bias": None}


@pytest.mark.parametrize("grads", [gradient, with_some_none])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex64])
def test_clip_by_global_norm_is_that_of_torch(dtype, grads):
    def make(params: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        return [torch.optim.RMSprop(params.values(), foreach=True)]

    clip = partial(torch.nn.utils.clip_grad_norm_, max_norm=2.0)
    expected = run_torch(make, dtype=dtype, before_step=clip, grads=grads)
    optimizer = chain(clip_by_global_norm(2.0), rmsprop())
    assert_same_bits(run_updates(optimizer, dtype=dtype, grads=grads)[0], expected)


@pytest.mark.parametrize("grads", [gradient, with_some_none])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_clip_by_value_is_that_of_torch(dtype, grads):
    clip = partial(torch.nn.utils.clip_grad_value_, clip_value=0.5)

    def make(params: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        return [torch.optim.RMSprop(params.values())]

    expected = run_torch(make, dtype=dtype, before_step=clip, grads=grads)
    assert_same_bits(run_updates(chain(clip_by_value(0.5), rmsprop()), dtype=dtype, grads=grads)[0], expected)


def test_clip_by_value_takes_a_tensor_too():
    number, tensor = (run_updates(chain(clip_by_value(limit), sgd()))[0] for limit in (0.5, torch.tensor(0.5).double()))
    assert_same_bits(tensor, number)


def test_decayed_weights_before_adam_are_its_own_weight_decay():
    expected, _ = run_updates(adam(weight_decay=0.1))
    assert_same_bits(run_updates(chain(add_decayed_weights(0.1), adam()))[0], expected)
    masked, _ = run_updates(chain(add_decayed_weights(0.1, mask="*.weight|scale"), adam()))
    own, _ = run_updates(by_name(adam, {"*.weight|scale": {"weight_decay": 0.1}}))
    assert_same_bits(masked, own)
    assert not torch.equal(masked["a.bias"], expected["a.bias"])


def test_a_mask_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"Received: '\*wieght'. The parameters are"):
        chain(add_decayed_weights(0.1, mask="*wieght"), sgd()).init(some_tensors(0))


def test_gradients_of_several_dtypes_keep_theirs():
    params = {"half": torch.ones((), dtype=torch.bfloat16), "double": torch.ones(2, dtype=F64)}
    optimizer = chain(skip_not_finite(1), accumulate(1), clip_by_global_norm(0.5), clip_by_value(0.1), sgd())
    new, _ = optimizer.update(params, optimizer.init(params), params, lr=1.0, step=0)
    assert {name: tensor.dtype for name, tensor in new.items()} == {"half": torch.bfloat16, "double": F64}


# accumulate


def mean_loss(params: dict, points: torch.Tensor) -> torch.Tensor:
    return ((points @ params["w"]).square() + params["b"] * points.sum(1)).mean()


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_micro_batches_of_unequal_size_give_the_mean_of_the_whole_batch(as_tensors, donate):
    points = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    start = {"w": torch.ones(3, dtype=F64), "b": torch.tensor(0.5, dtype=F64)}
    optimizer, whole = chain(accumulate(3), adam()), adam()
    params, expected = ({name: tensor.clone() for name, tensor in start.items()} for _ in range(2))
    opt_state, whole_state = optimizer.init(params), whole.init(expected)
    step = 0
    for update, sizes in enumerate([(1, 30, 29), (20, 20, 20), (57, 2, 1)]):
        for part in points.split(sizes):
            grads, weight = torch.func.grad(mean_loss)(params, part), len(part)
            numbers = (
                {"step": torch.tensor(step), "weight": torch.tensor(weight)}
                if as_tensors
                else {"step": step, "weight": weight}
            )
            params, opt_state = optimizer.update(grads, opt_state, params, lr=0.1, donate=donate, **numbers)
            step += 1
        grads = torch.func.grad(mean_loss)(expected, points)
        expected, whole_state = whole.update(grads, whole_state, expected, lr=0.1, step=update)
        torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(opt_state["optimizer"], whole_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "around",
    [
        chain,
        lambda inner: ema(inner, 0.0),
        lambda inner: lookahead(inner, num_steps=1, alpha=1.0),
        lambda inner: by_name(lambda: inner, {}),
        lambda inner: muon(others=inner),
    ],
    ids=["chain", "ema", "lookahead", "by_name", "muon"],
)
def test_what_is_around_an_accumulation_hands_on_the_number_of_points(around):
    optimizer, params = around(chain(accumulate(2), sgd())), {"w": torch.zeros(1)}
    assert optimizer.uses_weight
    state = optimizer.init(params)
    for step, (grad, num_points) in enumerate([(1.0, 30), (5.0, 10)]):
        grads = {"w": torch.tensor([grad])}
        params, state = optimizer.update(grads, state, params, lr=1.0, step=step, weight=num_points)
    assert params["w"].tolist() == [-2.0]  # (30 + 50) / 40


def test_accumulating_one_micro_batch_changes_nothing():
    assert_same_bits(run_updates(chain(accumulate(1), adam()))[0], run_updates(adam())[0])


def test_before_the_last_micro_batch_all_that_follows_stays_as_it_is():
    optimizer, params = chain(accumulate(2), ema(adam(), 0.9)), some_tensors(0)
    opt_state = optimizer.init(params)
    new, state = optimizer.update(gradient(0), opt_state, params, lr=0.1, step=0, donate=True)
    assert all(new[name] is params[name] for name in SHAPES)
    assert state["optimizer"] is opt_state["optimizer"]
    newer, _ = optimizer.update(gradient(1), state, new, lr=0.1, step=1, donate=True)
    assert addresses(newer) == addresses(params)


def test_accumulation_leaves_gradients_alone_and_has_memory_of_its_own():
    optimizer, params = chain(accumulate(3), sgd()), some_tensors(0)
    grads = gradient(0)
    before = {name: grad.clone() for name, grad in grads.items()}
    opt_state = optimizer.init(params)
    for step in range(7):
        params, opt_state = optimizer.update(grads, opt_state, params, lr=0.1, step=step, donate=True)
        assert not addresses(grads) & addresses(opt_state, params)
    assert_same_bits(grads, before)


def test_a_micro_batch_without_points_changes_no_mean():
    optimizer, params = chain(accumulate(3), sgd()), {"w": torch.zeros(1, dtype=F64)}
    for weights in ((0, 2, 2), (2, 0, 2), (2, 2, 0)):
        opt_state, new = optimizer.init(params), params
        for step, weight in enumerate(weights):
            grads = {"w": torch.tensor([1000.0 if weight == 0 else 3.0 + step], dtype=F64)}
            new, opt_state = optimizer.update(grads, opt_state, new, lr=1.0, step=step, weight=weight)
        expected = sum(3.0 + step for step, weight in enumerate(weights) if weight) / 2
        assert float(new["w"]) == -expected


def test_a_parameter_that_no_micro_batch_uses_is_left_alone():
    params = {"a": torch.ones(1), "b": torch.ones(1)}
    one, none = {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1), "b": None}
    seen = []
    recorder = Transform(
        lambda params: {}, lambda grads, state, params, **_: (seen.append(grads["b"]), (grads, state))[1]
    )
    optimizer = chain(accumulate(2), recorder, rmsprop())
    opt_state = optimizer.init(params)
    for step, grads in enumerate([one, none, none, none, none, one]):
        params, opt_state = optimizer.update(grads, opt_state, params, lr=0.1, step=step)
    assert [grad if grad is None else float(grad) for grad in seen] == [0.5, None, 0.5]


def test_accumulations_can_be_nested():
    optimizer = chain(accumulate(2), chain(accumulate(3), sgd()))
    params = {"w": torch.zeros(1, dtype=F64)}
    opt_state = optimizer.init(params)
    weights = [3, 1, 4, 1, 5, 9]
    for step, weight in enumerate(weights):
        assert float(params["w"]) == 0
        grads = {"w": torch.tensor([float(step)], dtype=F64)}
        params, opt_state = optimizer.update(grads, opt_state, params, lr=1.0, step=step, weight=weight)
    mean = sum(step * weight for step, weight in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(params["w"], torch.tensor([-mean], dtype=F64))


def test_members_of_an_ensemble_weight_their_own_points():
    optimizer = chain(accumulate(2), sgd())

    def run(first: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        params = {"w": torch.zeros_like(first)}
        opt_state = optimizer.init(params)
        for step, (grad, points) in enumerate(((first, weight), (first + 1, 10 - weight))):
            params, opt_state = optimizer.update({"w": grad}, opt_state, params, lr=1.0, step=step, weight=points)
        return params["w"]

    weights = torch.tensor([1, 5, 9])
    result = torch.func.vmap(run)(torch.zeros(3, 2), weights)
    torch.testing.assert_close(result, -(10 - weights)[:, None].expand(3, 2) / 10)


# skip_not_finite


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_not_counted(bad, as_tensors):
    optimizer = chain(skip_not_finite(2), adam())
    params, expected = some_tensors(0, F64), some_tensors(0, F64)
    opt_state, plain_state = optimizer.init(params), adam().init(expected)
    counts = []
    taken = 0
    for step in range(8):
        grads = gradient(step, F64)
        if step in (0, 3, 4, 5):
            grads["b.weight"] = grads["b.weight"].clone()
            grads["b.weight"][4, 1] = bad
        else:
            expected, plain_state = adam().update(grads, plain_state, expected, lr=0.1, step=taken)
            taken += 1
        number = torch.tensor(step) if as_tensors else step
        params, opt_state = optimizer.update(grads, opt_state, params, lr=0.1, step=number)
        torch.testing.assert_close(params, expected)
        counts.append((int(opt_state["0"]["skipped"]), int(opt_state["0"]["in_a_row"]), skipped_too_often(opt_state)))
    skipped, in_a_row, too_often = zip(*counts, strict=True)
    assert skipped == (1, 1, 1, 2, 3, 4, 4, 4)
    assert in_a_row == (1, 0, 0, 1, 2, 3, 0, 0)
    assert too_often == (False, False, False, False, False, True, False, False)


def test_a_skipped_step_keeps_the_very_tensors():
    optimizer, params = chain(skip_not_finite(2), adam()), some_tensors(0)
    opt_state = optimizer.init(params)
    grads = gradient(0) | {"scale": torch.tensor(NAN)}
    new, state = optimizer.update(grads, opt_state, params, lr=0.1, step=0, donate=True)
    assert all(new[name] is params[name] for name in SHAPES)
    assert state["optimizer"] is opt_state["optimizer"]


def test_a_member_skips_its_own_steps_only():
    optimizer = chain(skip_not_finite(2), accumulate(1), adam())

    def run(grad: torch.Tensor) -> tuple:
        params = {"w": torch.ones_like(grad)}
        opt_state = optimizer.init(params)
        for step in range(3):
            factor = grad if step == 1 else torch.ones_like(grad)
            params, opt_state = optimizer.update({"w": factor}, opt_state, params, lr=0.1, step=step)
        return params["w"], opt_state

    grads = torch.tensor([[1.0, 2.0], [NAN, 1.0], [INF, 1.0]])
    params, opt_state = torch.func.vmap(run)(grads)
    for number, grad in enumerate(grads):
        torch.testing.assert_close(params[number], run(grad)[0])
    assert opt_state["0"]["skipped"].tolist() == [0, 1, 1]


def test_gradients_whose_norm_overflows_are_finite():
    optimizer, params = chain(skip_not_finite(1), sgd()), {"w": torch.zeros(4)}
    new, _ = optimizer.update({"w": torch.full((4,), 3e38)}, optimizer.init(params), params, lr=1e-38, step=0)
    torch.testing.assert_close(new["w"], torch.full((4,), -3.0))


def test_accumulation_after_a_skipped_micro_batch_waits_for_one_more():
    optimizer, params = chain(skip_not_finite(2), accumulate(2), sgd()), {"w": torch.zeros(1)}
    opt_state, moves = optimizer.init(params), []
    for step, grad in enumerate([1.0, NAN, 3.0, 5.0, 7.0]):
        params, opt_state = optimizer.update({"w": torch.tensor([grad])}, opt_state, params, lr=1.0, step=step)
        moves.append(float(params["w"]))
    assert moves == [0, 0, -2, -2, -8]


# chain


@pytest.mark.parametrize("is_open", [True, False])
def test_a_gate_that_the_host_cannot_read_gives_no_memory_away(is_open):
    gate = Transform(lambda params: {}, lambda grads, state, params, **at: (grads, state, Gate(
        torch.tensor(is_open), at["step"], at["weight"])))  # fmt: skip
    optimizer, params = chain(gate, adam()), {name: p.clone() for name, p in some_tensors(0).items()}
    state = optimizer.init(params)
    new, new_state = optimizer.update(gradient(0), state, params, lr=0.1, step=0, donate=True)
    expected, expected_state = some_tensors(0), adam().init(some_tensors(0))
    if is_open:
        expected, expected_state = adam().update(gradient(0), expected_state, expected, lr=0.1, step=0)
    assert_same_bits(new, dict(expected))
    assert_same_bits(new_state["optimizer"]["exp_avg"], dict(expected_state["exp_avg"]))


def test_a_link_of_a_user_and_its_gate():
    every_other = Transform(
        lambda params: {},
        lambda grads, state, params, *, step, weight, **_: (grads, state, Gate(step % 2 == 1, step // 2, weight)),
    )
    params, _ = run_updates(chain(every_other, adam()), num_steps=6)

    def odd(step: int, dtype: torch.dtype) -> dict:
        return gradient(2 * step + 1, dtype)

    expected, state = some_tensors(0), adam().init(some_tensors(0))
    for step in range(3):
        lr = 0.05 / (1 + (2 * step + 1) % 7)
        expected, state = adam().update(odd(step, torch.float32), state, expected, lr=lr, step=step)
    assert_same_bits(params, expected)


def test_the_state_holds_links_with_a_state_only():
    params = some_tensors(0)
    assert chain(clip_by_value(1.0), sgd()).init(params) == {}
    state = chain(clip_by_value(1.0), skip_not_finite(1), chain(accumulate(2), adam())).init(params)
    assert state.keys() == {"1", "optimizer"}
    assert state["optimizer"].keys() == {"0", "optimizer"}


def test_a_chain_evaluates_with_what_its_optimizer_does():
    assert chain(clip_by_value(1.0), adam()).eval_params is None
    optimizer = chain(clip_by_value(1.0), schedule_free_sgd())
    params, opt_state = run_updates(optimizer, num_steps=3)
    inner = evaluated(schedule_free_sgd(), opt_state["optimizer"], params)
    assert_same_bits(evaluated(optimizer, opt_state, params), inner)


def test_a_chain_changes_nothing_that_came_in():
    optimizer = chain(skip_not_finite(1), accumulate(2), clip_by_global_norm(0.1), ema(by_name(adam, {"a.*": {}}), 0.9))
    params, state = run_updates(optimizer, num_steps=3)
    trees = [params, state, gradient(3)]
    leaves = tree_leaves(trees)
    before = [(leaf._version, leaf.clone()) for leaf in leaves]
    first, second = (optimizer.update(trees[2], state, params, lr=0.1, step=3) for _ in range(2))
    assert all(
        leaf._version == version and torch.equal(leaf, old) for leaf, (version, old) in zip(leaves, before, strict=True)
    )
    for one, other in zip(*map(tree_leaves, (first, second)), strict=True):
        assert torch.equal(one, other)


def test_links_in_the_wrong_place_are_refused():
    with pytest.raises(TypeError, match=r"Expected an optimizer as the last link of a chain. Received: no links"):
        chain()
    wrong: list[Any] = [(chain, (sgd(), clip_by_value(1.0))), (chain, (sgd,)), (ema, (0.9,)), (lookahead, (adam,))]
    for make, links in wrong:
        with pytest.raises(TypeError, match=r"Expected an optimizer .*, such as adam\(\)\. Received: .*call them"):
            make(*links)
    with pytest.raises(TypeError, match=r"options by pattern, as in by_name\(adamw, .* Received: Optimizer"):
        by_name(adam(), {"*": {"lr": 0.1}})  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"Received: Optimizer.* as link 1 of 2. An optimizer can only be the last link"
    ):
        chain(sgd(), adam())


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (clip_by_global_norm, 0.0, "Expected max_norm above 0. Received: max_norm=0.0"),
        (clip_by_value, -1.0, "Expected max_value above 0. Received: max_value=-1.0"),
        (clip_by_value, NAN, "Expected max_value above 0. Received: max_value=nan"),
        (add_decayed_weights, -0.1, "Expected weight_decay with .*Received: weight_decay=-0.1"),
        (accumulate, 0, "Expected num_steps of at least 1. Received: 0"),
        (accumulate, 1.5, "Expected num_steps of at least 1. Received: 1.5"),
        (skip_not_finite, "2", "Expected max_in_a_row of at least 1. Received: '2'"),
        (skip_not_finite, 0, "Expected max_in_a_row of at least 1. Received: 0"),
    ],
)
def test_values_out_of_range_are_named(make, value, message):
    with pytest.raises(ValueError, match=message):
        make(value)


def test_complex_gradients_cannot_be_clipped_by_value():
    optimizer, params = chain(clip_by_value(1.0), sgd()), some_tensors(0, torch.complex64)
    with pytest.raises(TypeError, match=r"Received: a complex gradient of a.weight. Use clip_by_global_norm"):
        optimizer.update(params, {}, params, lr=0.1, step=0)
