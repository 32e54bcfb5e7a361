"""Claims about `dwiml_func.core.non_finite`: which policy a step has, and what each does with its numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dwiml_func import adam, init_state, sgd
from dwiml_func.core.non_finite import (
    NON_FINITE,
    SKIPPED,
    NonFiniteError,
    can_skip,
    check_finite,
    check_not_skipped_too_often,
    check_policy,
    choose_policy,
    defer_check,
    is_bad_step,
    raise_if_not_finite,
    skip_metrics,
    spoil,
)
from dwiml_func.optim import accumulate, chain, skip_not_finite
from dwiml_func.types import Sum

MODEL = torch.nn.Linear(1, 1)
PLAIN = init_state(MODEL, adam(), seed=0).replace(epoch=2, batch=4, step=10)
SKIPPING = init_state(MODEL, chain(accumulate(2), skip_not_finite(2), sgd()), seed=0)
ONE = torch.ones(())


@pytest.mark.parametrize(
    ("given", "state", "loss", "chosen"),
    [
        *((policy, PLAIN, ONE, policy) for policy in ("raise", "defer")),
        *((policy, SKIPPING, ONE.to("meta"), policy) for policy in ("raise", "defer", "skip")),
        (None, PLAIN, ONE, "raise"),
        (None, PLAIN, ONE.to("meta"), "defer"),
        (None, SKIPPING, ONE, "skip"),
    ],
)
def test_a_policy_is_the_one_asked_for_or_that_of_optimizer_and_device(given, state, loss, chosen):
    assert choose_policy(given, state.opt_state, loss) == chosen


def test_a_step_that_is_mapped_is_checked_later_and_policies_that_cannot_be_are_refused():
    found: list[str] = []
    torch.func.vmap(lambda x: found.append(choose_policy(None, PLAIN.opt_state, x)) or x)(torch.ones(2))
    assert found == ["defer"]
    assert (can_skip(PLAIN.opt_state), can_skip(SKIPPING.opt_state)) == (False, True)
    with pytest.raises(ValueError, match="Expected an optimizer with skip_not_finite"):
        choose_policy("skip", PLAIN.opt_state, ONE)
    unknown: Any = "ignore"
    for check in (check_policy, lambda policy: choose_policy(policy, PLAIN.opt_state, ONE)):
        with pytest.raises(ValueError, match=r"Expected non_finite .*Received: 'ignore'"):
            check(unknown)
    check_policy(None)


@pytest.mark.parametrize("loss", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("norm", [0.0, -math.inf, math.nan])
def test_a_step_is_bad_where_loss_or_gradient_is_not_finite_and_the_loss_is_named_first(loss, norm):
    is_bad = not (math.isfinite(loss) and math.isfinite(norm))
    assert bool(is_bad_step(torch.tensor(loss), torch.tensor(norm))) == is_bad
    if not is_bad:
        raise_if_not_finite(PLAIN, None, loss, norm)
        return
    name = f"gradient norm is {norm}" if loss == 1.0 else f"loss is {loss}"
    with pytest.raises(
        NonFiniteError, match=rf"The {name} in epoch 3, batch 5 \(step 11\)\. The step was not"
    ) as error:
        raise_if_not_finite(PLAIN, None, loss, norm)
    assert error.value.at == (3, 5)


@pytest.mark.parametrize(
    ("num", "told"), [(0, ", ids ."), (1, ", ids 0."), (8, ", 6, 7."), (9, r", 6, 7, \.\.\. \(9 in all\)\.")]
)
def test_the_ids_of_a_batch_are_told_up_to_eight(num, told):
    with pytest.raises(NonFiniteError, match=rf"\(step 11\).*{told} The batch has no points\."):
        raise_if_not_finite(PLAIN, SimpleNamespace(ids=torch.arange(num)), math.nan, 1.0, weight=torch.tensor(0))


@pytest.mark.parametrize("as_tensors", [False, True])
def test_a_deferred_check_notes_the_first_step_only_and_keeps_all_after_it(as_tensors):
    earlier = {None: {}, 0.0: {NON_FINITE: Sum(0.0, 0.0)}, 1.0: {NON_FINITE: Sum(7.0, 1.0)}}
    for weight, sums in earlier.items():
        own = {name: Sum(*map(torch.tensor, each)) if as_tensors else each for name, each in sums.items()}
        for loss in (1.0, math.nan):
            keeps, metrics = defer_check(PLAIN.replace(sums=own), torch.tensor(loss), ONE, {"loss": Sum(2.0, 1.0)})
            is_first = loss != 1.0 and not weight
            assert bool(keeps) == (loss != 1.0 or bool(weight))
            assert [*map(float, metrics[NON_FINITE])] == [10.0 * is_first, float(is_first)]
            assert metrics["loss"] == Sum(2.0, 1.0)


def test_what_was_noted_is_told_at_its_place_in_the_epoch():
    check_finite(PLAIN)
    check_finite(PLAIN.replace(sums={NON_FINITE: Sum(0.0, 0.0)}))
    with pytest.raises(NonFiniteError, match=r"not finite in epoch 3, batch 3 \(step 9\)\.") as error:
        check_finite(PLAIN.replace(sums={NON_FINITE: Sum(torch.tensor(8.0), torch.tensor(1.0))}))
    assert error.value.at == (3, 3)


def test_a_bad_step_has_gradients_that_are_not_numbers_and_sums_of_nothing():
    grads: Any = {"a": torch.ones(2), "b": None}
    assert spoil(grads, is_bad=False) is grads
    for is_bad in (True, torch.tensor(True)):
        spoiled: Any = spoil(grads, is_bad)
        assert spoiled["a"].isnan().all()
        assert spoiled["b"] is None
    kept: Any = spoil(grads, torch.tensor(False))
    assert torch.equal(kept["a"], grads["a"])
    metrics = {"loss": Sum(3.0, 2.0)}
    for as_given in (bool, torch.tensor):
        own = (
            {name: Sum(*map(torch.tensor, each)) for name, each in metrics.items()} if as_given is not bool else metrics
        )
        for is_bad in (False, True):
            found = skip_metrics(as_given(is_bad), own)
            assert [*map(float, found["loss"])] == ([0.0, 0.0] if is_bad else [3.0, 2.0])
            assert [*map(float, found[SKIPPED])] == [float(is_bad), 1.0]
            assert all(isinstance(part, Tensor) == (as_given is not bool) for part in found[SKIPPED])
            if as_given is torch.tensor:
                kinds: list[Any] = list(found[SKIPPED])
                assert [part.dtype for part in kinds] == [torch.float64] * 2


def test_too_many_skipped_in_a_row_end_an_epoch_only_where_batches_were_skipped():
    optimizer = chain(skip_not_finite(2), sgd())
    state = init_state(MODEL, optimizer, seed=0).replace(epoch=1, batch=5, step=9, sums={SKIPPED: Sum(3.0, 5.0)})
    opt_state, bad = state.opt_state, {name: p * math.nan for name, p in state.params.items()}
    for number in range(1, 5):
        _, opt_state = optimizer.update(bad, opt_state, state.params, lr=0.1, step=number, weight=1)
        late = state.replace(opt_state=opt_state)
        check_not_skipped_too_often(late.replace(sums={}))
        if number <= 2:
            check_not_skipped_too_often(late)
        else:
            with pytest.raises(NonFiniteError, match=r"too many steps in a row, up to epoch 2, batch 5 \(step 9\)\."):
                check_not_skipped_too_often(late)
