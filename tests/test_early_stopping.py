"""Claims about `dwiml_func.core.early_stopping`: what is the best epoch, and when patience runs out."""

import math
from functools import reduce
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwiml_func.core.early_stopping import Best, should_stop, update_best

LOSSES = st.one_of(st.sampled_from([math.nan, math.inf, -math.inf, 0.5]), st.floats(-2, 2))


def follow(values: list[float], best: Best | None = None, first_epoch: int = 1, **options: Any) -> Best:
    numbered = enumerate(values, first_epoch)
    return reduce(lambda best, item: update_best(best, item[1], item[0], **options), numbered, best or Best())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_the_best(value):
    assert follow([value]) == Best(math.inf, None, 1)
    assert follow([value, value, 3.0]) == Best(3.0, 3, 0)
    assert follow([3.0, value]) == Best(3.0, 1, 1)


@pytest.mark.parametrize("value", [1e308, 0.0, -5.0])
def test_the_first_finite_value_is_a_best_whatever_the_delta(value):
    assert follow([math.nan, value], patience_delta=1e300) == Best(value, 2, 0)


def test_a_tie_keeps_the_earlier_epoch():
    assert follow([0.5, 0.5, 0.5], patience_delta=0.0) == Best(0.5, 1, 2)


@pytest.mark.parametrize("best_value", [0.5, 0.1, 1.0 / 3, 1e-3, 7.0, -2.5, 1e6])
@pytest.mark.parametrize("delta", [1e-6, 0.25, 0.1, 1e-12])
def test_an_improvement_must_exceed_the_delta_by_one_bit_at_least(best_value, delta):
    edge = best_value - delta
    assert follow([best_value, edge], patience_delta=delta) == Best(best_value, 1, 1)
    assert follow([best_value, math.nextafter(edge, math.inf)], patience_delta=delta) == Best(best_value, 1, 1)
    below = math.nextafter(edge, -math.inf)
    assert follow([best_value, below], patience_delta=delta) == Best(below, 2, 0)
    assert follow([-best_value, -edge], patience_delta=delta, mode="max") == Best(-best_value, 1, 1)
    assert follow([-best_value, -below], patience_delta=delta, mode="max") == Best(-below, 2, 0)


def test_the_best_may_be_within_an_epoch():
    best = update_best(Best(0.5, 1, 2), 0.25, 3, batch=4)
    assert best == Best(0.25, 3, 0, batch=4)
    assert update_best(best, 1.0, 3) == Best(0.25, 3, 1, batch=4)
    assert update_best(best, 0.125, 3) == Best(0.125, 3, 0)


def test_the_default_delta_is_the_one_of_the_reference():
    assert follow([0.5, 0.5 - 1e-6]) == Best(0.5, 1, 1)
    assert follow([0.5, 0.5 - 1.1e-6]).epoch == 2


def test_a_zero_delta_takes_the_least_improvement():
    below = math.nextafter(0.5, 0)
    assert follow([0.5, below], patience_delta=0.0) == Best(below, 2, 0)


def test_many_small_steps_count_from_the_best_and_not_from_the_last_epoch():
    assert follow([1.0, 0.96, 0.92, 0.88], patience_delta=0.1) == Best(0.88, 4, 0)


@given(st.lists(LOSSES, max_size=20), st.floats(0, 0.5))
def test_it_agrees_with_looking_at_all_epochs_at_once(values, delta):
    expected, epoch = math.inf, None
    for index, value in enumerate(values):
        if math.isfinite(value) and (epoch is None or value < expected - delta):
            expected, epoch = value, index + 1
    assert follow(values, patience_delta=delta) == Best(expected, epoch, len(values) - (epoch or 0))


@given(st.lists(LOSSES, max_size=12), st.integers(0, 12))
def test_a_best_can_be_stopped_and_resumed_anywhere(values, cut):
    stored = follow(values[:cut])._asdict()  # as a checkpoint keeps it
    assert follow(values[cut:], Best(**stored), first_epoch=len(values[:cut]) + 1) == follow(values)


def test_patience_counts_bad_epochs_in_a_row():
    best = Best()
    stops = []
    for epoch, value in enumerate([1.0, 2.0, 0.5, 0.6, math.nan], 1):
        best = update_best(best, value, epoch)
        stops.append([should_stop(best, patience) for patience in (1, 2, 3, None)])
    assert stops == [
        [False, False, False, False],
        [True, False, False, False],
        [False, False, False, False],
        [True, False, False, False],
        [True, True, False, False],
    ]


def test_patience_runs_out_also_without_any_finite_value():
    assert should_stop(follow([math.nan, math.inf]), 2)
    assert not should_stop(Best(), 1)
