"""Claims about `ema` and `lookahead`: their closed forms in float64, what they evaluate with, memory of their own."""

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

from dwiml_func.optim import (
    accumulate,
    adam,
    by_name,
    chain,
    clip_by_global_norm,
    ema,
    lookahead,
    schedule_free_sgd,
    sgd,
    skip_not_finite,
)

F64 = torch.float64


@pytest.mark.parametrize("donate", [False, True])
def test_an_average_is_that_of_all_updates_without_the_start(donate):
    optimizer = ema(sgd(), 0.8)
    params, opt_state = run_updates(optimizer, num_steps=9, dtype=F64, donate=donate)
    iterates = [run_updates(sgd(), num_steps=count, dtype=F64)[0] for count in range(1, 10)]
    assert_same_bits(params, iterates[-1])
    weights = [0.8 ** (9 - i) * (1 - 0.8) / (1 - 0.8**9) for i in range(1, 10)]
    for name, average in evaluated(optimizer, opt_state, params).items():
        expected = sum(weight * iterate[name] for weight, iterate in zip(weights, iterates, strict=True))
        torch.testing.assert_close(average, expected)


def test_an_average_that_starts_late_starts_from_the_parameters():
    optimizer, params = ema(sgd(), 0.9), some_tensors(0, F64)
    new, state = optimizer.update(gradient(0, F64), optimizer.init(params), params, lr=0.1, step=10_000)
    expected = {name: 0.9 * params[name] + 0.1 * new[name] for name in params}
    torch.testing.assert_close(evaluated(optimizer, state, new), expected)


def test_a_decay_of_0_evaluates_with_the_parameters():
    optimizer = ema(adam(), 0.0)
    params, opt_state = run_updates(optimizer, num_steps=3)
    assert_same_bits(evaluated(optimizer, opt_state, params), params)


def test_an_average_is_of_what_its_optimizer_evaluates_with():
    inner = schedule_free_sgd()
    optimizer = ema(inner, 0.0)  # the latest of the averages
    params, opt_state = run_updates(optimizer, num_steps=3, dtype=F64)
    assert not torch.allclose(evaluated(inner, opt_state["optimizer"], params)["scale"], params["scale"])
    torch.testing.assert_close(
        evaluated(optimizer, opt_state, params), evaluated(inner, opt_state["optimizer"], params)
    )


def by_group(inner):
    """One group for all parameters, beside a default that they do not use."""
    return by_name(lambda own=None: sgd() if own is None else own, {"none|*": {"own": inner}})


@pytest.mark.parametrize("wrap", [ema, lookahead, by_group])
def test_what_wraps_an_accumulation_hands_it_the_weights_of_the_batches(wrap):
    optimizer, start = wrap(chain(accumulate(2), sgd())), some_tensors(0, F64)
    assert (optimizer.uses_weight, wrap(sgd()).uses_weight) == (True, False)
    params, state = start, optimizer.init(start)
    for step, weight in enumerate((1, 3)):
        params, state = optimizer.update(gradient(step, F64), state, params, lr=0.1, step=step, weight=weight)
    for name, first in gradient(0, F64).items():
        torch.testing.assert_close(params[name], start[name] - 0.1 * (first + 3 * gradient(1, F64)[name]) / 4)


def test_steps_that_are_tensors_restart_where_numbers_do_also_in_donated_memory():
    ends = []
    for kind in (int, torch.tensor):
        optimizer, params = lookahead(sgd(), num_steps=2, alpha=0.5), some_tensors(0, F64)
        state = optimizer.init(params)
        for step in range(5):
            options = {"lr": 0.1, "step": kind(step), "donate": True}
            params, state = optimizer.update(gradient(step, F64), state, params, **options)
        ends.append({**params, **{f"slow {name}": slow for name, slow in state["slow"].items()}})
    assert_same_bits(*ends)


def test_behind_accumulation_an_average_counts_updates_and_not_micro_batches():
    optimizer = chain(accumulate(2), ema(sgd(), 0.8))
    params, opt_state = run_updates(optimizer, num_steps=8, dtype=F64)

    def pairs(step: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        first, second = gradient(2 * step, dtype), gradient(2 * step + 1, dtype)
        return {
            name: (first[name] + second[name]) / 2 * learning_rate(2 * step + 1) / learning_rate(step) for name in first
        }

    plain = ema(sgd(), 0.8)
    expected, expected_state = run_updates(plain, num_steps=4, dtype=F64, grads=pairs)
    torch.testing.assert_close(params, expected)
    torch.testing.assert_close(evaluated(optimizer, opt_state, params), evaluated(plain, expected_state, expected))


@pytest.mark.parametrize("kind", [int, torch.tensor])
@pytest.mark.parametrize("wrap", [lambda inner: ema(inner, 0.8), lambda inner: lookahead(inner, num_steps=3)])
def test_steps_that_links_leave_out_do_not_count_in_whatever_order(wrap, kind):
    links, ends = [skip_not_finite(3), accumulate(2)], []
    for num_outside in range(3):  # with 2, the links decide whether the average sees a step
        inner = chain(*links[num_outside:], sgd()) if num_outside < 2 else sgd()
        optimizer = chain(*links[:num_outside], wrap(inner)) if num_outside else wrap(inner)
        params = some_tensors(0, F64)
        state = optimizer.init(params)
        for step in range(15):
            grads = {name: grad * (torch.nan if step in (4, 5, 9) else 1) for name, grad in gradient(step, F64).items()}
            options = {"lr": 0.1, "step": kind(step), "weight": 1 + step % 3, "donate": True}
            params, state = optimizer.update(grads, state, params, **options)
        averages = {f"mean {name}": mean for name, mean in evaluated(optimizer, state, params).items()}
        ends.append({**params, **averages})
    assert_same_bits(ends[0], ends[2])
    assert_same_bits(ends[1], ends[2])


def test_an_update_that_a_user_puts_in_the_place_of_a_chains_is_used_within_an_average_too():
    plain = chain(clip_by_global_norm(1.0), sgd())
    halved = plain._replace(update=lambda *trees, lr, **options: plain.update(*trees, lr=lr / 2, **options))
    assert_same_bits(run_updates(ema(halved, 0.5), num_steps=3)[0], run_updates(halved, num_steps=3)[0])


def test_an_average_of_groups_counts_the_steps_that_all_take_or_is_refused():
    def groups(*num_steps: int):
        numbers = iter((*num_steps, 1))  # the last one is of the names that no pattern matches
        return ema(by_name(lambda: chain(accumulate(next(numbers)), sgd()), {"scale": {}, "*": {}}), 0.5)

    params, state = run_updates(groups(2, 2), num_steps=4, dtype=F64)
    alone, alone_state = run_updates(chain(accumulate(2), ema(sgd(), 0.5)), num_steps=4, dtype=F64)
    assert_same_bits(state["average"], alone_state["optimizer"]["average"])
    assert_same_bits(params, alone)
    with pytest.raises(ValueError, match=r"Expected groups that take the same steps.*chain\(accumulate\(4\), ema"):
        run_updates(groups(2, 3), num_steps=2)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(("num_steps", "alpha"), [(3, 0.5), (1, 0.25), (4, 1.0)])
def test_lookahead(num_steps, alpha, donate):
    optimizer = lookahead(adam(), num_steps=num_steps, alpha=alpha)
    params, opt_state = run_updates(optimizer, num_steps=10, dtype=F64, donate=donate)
    fast = slow = some_tensors(0, F64)
    inner_state = adam().init(fast)
    for step in range(10):  # algorithm 1 of the paper
        fast, inner_state = adam().update(gradient(step, F64), inner_state, fast, lr=learning_rate(step), step=step)
        if (step + 1) % num_steps == 0:
            slow = fast = {name: slow[name] + alpha * (fast[name] - slow[name]) for name in SHAPES}
    torch.testing.assert_close(params, fast)
    torch.testing.assert_close(evaluated(optimizer, opt_state, params), slow)


@pytest.mark.parametrize("make", [lambda inner: ema(inner, 0.9), lambda inner: lookahead(inner, num_steps=2)])
def test_a_donated_update_reuses_memory_and_shares_none(make):
    optimizer, params = make(adam()), some_tensors(0)
    opt_state = optimizer.init(params)
    for step in range(3):
        tensors = [*params.values(), *next(iter(opt_state.values())).values()]
        lying = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
        assert len(set(lying)) == len(lying)
        params, opt_state = optimizer.update(gradient(step), opt_state, params, lr=0.1, step=step, donate=step == 0)
        if step == 0:
            assert addresses(params, opt_state) == {*lying} | addresses(opt_state["optimizer"])


def test_values_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"Expected decay with 0 <= value < 1. Received: decay=1.0"):
        ema(sgd(), 1.0)
    with pytest.raises(ValueError, match=r"Expected num_steps of at least 1. Received: 0"):
        lookahead(sgd(), num_steps=0)
    with pytest.raises(ValueError, match=r"Expected alpha with 0 < alpha <= 1. Received: alpha=0"):
        lookahead(sgd(), alpha=0)


def test_lookahead_refuses_an_optimizer_with_an_average():
    with pytest.raises(ValueError, match=r"one that has an average of its own. Use ema\(lookahead\(...\)\) for both"):
        lookahead(ema(sgd(), 0.9))
    assert ema(lookahead(sgd()), 0.9).eval_params is not None
