"""Claims about `dwiml_func.optim.schedules`: the notation reads what it should, and refuses the rest by name."""

import math
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dwiml_func.core.rates import counts_steps
from dwiml_func.experiment.learning_rate import parse_learning_rate, parse_rates
from dwiml_func.optim.schedules import (
    constant,
    cosine,
    one_cycle,
    per_epoch,
    per_step,
    reduce_on_plateau,
    value_at,
    warm_up,
    warmup_stable_decay,
)
from dwiml_func.types import OnPlateau, Plateau

RATES = st.floats(min_value=2.0**-126, max_value=1e10, exclude_min=True)
TERMS = st.lists(st.tuples(RATES, st.integers(1, 20)), max_size=5)


@given(TERMS, RATES, st.integers(0, 20))
def test_what_is_written_is_read_back(terms, last, last_count):
    text = " ".join(
        [f"{rate!r}*{count}" for rate, count in terms] + [f"{last!r}*{last_count}" if last_count else repr(last)]
    )
    expected = [rate for rate, count in terms for _ in range(count)] + [last] * max(last_count, 1)
    assert parse_rates(text.split(), "") == tuple(expected)
    schedule = parse_learning_rate(f"  {text.replace(' ', '   ')}\t\n")
    assert callable(schedule)
    assert [schedule(epoch) for epoch in range(len(expected) + 3)] == expected + [last] * 3


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("0.001", (0.001,)),
        ("1e-3", (0.001,)),
        ("0.001*3 0.0001", (0.001, 0.001, 0.001, 0.0001)),
        ("0.01*1 0.001*2 5", (0.01, 0.001, 0.001, 5.0)),
        ("0.001*2", (0.001, 0.001)),
    ],
)
def test_the_notation_of_the_reference_is_read(text, rates):
    assert parse_rates(text.split(), "") == rates


MALFORMED = [
    "fast",
    "0.1*",
    "*3",
    "*",
    "0.1**3",
    "0.1*3*2",
    "0.1*3.0",
    "0.1*three",
    "0.1 * 3",
    "0.1*3,0.01",
    "0.1,0.01",
    "0.1 0.01",
    "0.1*2 0.1 0.01",
    "0.1x3",
    "0.1*0",
    "0.1*-2 0.1",
    "0.1*99999999999",
    "0.1*99999999999999999999999999",
    "0",
    "-0.1",
    "-0.0",
    "0*3 0.1",
    "0.1*3 -0.01",
    "nan",
    "inf",
    "-inf*3 1",
    "1e400",
    "1e-400",
    "0x10",
    "[0.1]",
    "0.1;",
    "0.1*3 # slow",
]


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_text_is_refused_and_named(text):
    with pytest.raises(ValueError, match="Learning rate ") as error:
        parse_learning_rate(text)
    assert repr(text) in str(error.value)
    assert "xpected" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", " ", "\t\n"])
def test_empty_text_is_refused(text):
    with pytest.raises(ValueError, match=r"Learning rate is empty: no rate was given\. Expected RATE, RATE\*EPOCHS"):
        parse_learning_rate(text)


@given(st.text(alphabet="0123456789.*e-+ xn", max_size=12))
def test_any_text_gives_positive_finite_rates_or_a_value_error(text):
    try:
        schedule = parse_learning_rate(text)
    except ValueError:
        return
    assert callable(schedule)
    rates = [schedule(epoch) for epoch in range(25)]
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)


@given(RATES, st.integers(0, 10**6))
def test_a_constant_is_constant(rate, epoch):
    assert constant(rate)(epoch) == rate


@pytest.mark.parametrize("values", [[], [0.0], [-1.0], [math.nan], [0.1, math.inf]])
def test_per_epoch_needs_positive_finite_rates(values):
    with pytest.raises(ValueError, match=r"Expected .*learning rate.*Received") as error:
        per_epoch(values)
    if values:
        assert f"{values[-1]:g}" in str(error.value)


def test_a_list_changed_afterwards_changes_no_schedule():
    values = [0.1, 0.2]
    schedule = per_epoch(values)
    values[0] = 7.0
    assert schedule(0) == 0.1


@given(st.floats(1e-6, 10), st.integers(1, 100), st.floats(0, 1e-7))
def test_a_cosine_falls_from_initial_to_final_and_stays(initial, num_epochs, final):
    schedule = cosine(initial, length=num_epochs, final=final)
    rates = [schedule(epoch) for epoch in range(num_epochs + 3)]
    assert rates[0] == pytest.approx(initial, rel=1e-12)
    assert rates[num_epochs:] == [final] * 3
    assert all(before > after for before, after in pairwise(rates[: num_epochs + 1]))
    for epoch in range(num_epochs + 1):  # the two halves mirror each other
        total = rates[epoch] + rates[num_epochs - epoch]
        assert total == pytest.approx(initial + final, rel=1e-9)


@pytest.mark.parametrize(
    ("initial", "options", "received"),
    [
        (0.1, {"length": 0}, "0"),
        (0.1, {"length": -3}, "-3"),
        (math.nan, {"length": 3}, "nan"),
        (-0.1, {"length": 3}, "-0.1"),
        (0.1, {"length": 3, "final": math.inf}, "inf"),
    ],
)
def test_a_cosine_out_of_range_is_refused(initial, options, received):
    with pytest.raises(ValueError, match=f"Expected .*Received: {received}$"):
        cosine(initial, **options)


@given(st.floats(1e-6, 10), st.integers(0, 50))
def test_a_warm_up_grows_in_equal_steps_and_then_follows(rate, num_epochs):
    schedule = warm_up(constant(rate), length=num_epochs)
    for epoch in range(num_epochs):
        assert schedule(epoch) == pytest.approx(rate * (epoch + 1) / (num_epochs + 1), rel=1e-12)
    assert [schedule(num_epochs + epoch) for epoch in range(3)] == [rate] * 3


def test_a_warm_up_follows_a_number_and_is_within_what_counts_steps() -> None:
    assert [warm_up(0.3, length=2)(epoch) for epoch in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.3])
    assert per_step(0.3).rate(7) == 0.3
    assert [per_step(lambda step: step, every=4).rate(step) for step in (3, 4, 8)] == [0, 1, 2]  # behind accumulate(4)
    for made in (per_step(constant(0.1)), reduce_on_plateau(0.1)):
        with pytest.raises(TypeError, match=r"Expected warm_up of a number or a function.* which belongs outside"):
            warm_up(made, length=2)  # type: ignore[arg-type]


def test_a_warm_up_wraps_any_schedule():
    schedule = warm_up(per_epoch([0.4, 0.2, 0.1]), length=1)
    assert [schedule(epoch) for epoch in range(4)] == [0.2, 0.2, 0.1, 0.1]
    with pytest.raises(ValueError, match=r"length of at least 0\. Received: -1"):
        warm_up(constant(0.1), length=-1)


def test_warmup_stable_decay_has_its_three_parts():
    schedule = warmup_stable_decay(0.8, warmup=3, stable=4, decay=5, final=0.1)
    rates = [schedule(count) for count in range(15)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert rates[3:8] == [0.8] * 5  # the decay begins at the peak
    assert rates[8:12] == pytest.approx([0.66, 0.52, 0.38, 0.24])
    assert rates[12:] == [0.1] * 3
    assert [warmup_stable_decay(1.0, warmup=0, stable=2, decay=0)(count) for count in range(3)] == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match=r"stable of at least 0\. Received: -1"):
        warmup_stable_decay(1.0, warmup=1, stable=-1, decay=1)


@pytest.mark.parametrize("options", [{}, {"warmup_share": 0.5, "initial_divisor": 0.5, "final_divisor": 0.5}])
def test_one_cycle_is_that_of_torch(options):
    names = {"warmup_share": "pct_start", "initial_divisor": "div_factor", "final_divisor": "final_div_factor"}
    theirs = {names[name]: value for name, value in options.items()}
    optimizer = torch.optim.SGD([torch.ones(1)], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=40, cycle_momentum=False, **theirs)
    schedule = one_cycle(0.3, length=40, **options)
    for count in range(40):
        assert schedule(count) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        if count < 39:
            reference.step()
    assert schedule(1000) == schedule(39)


@pytest.mark.parametrize(("length", "share"), [(10, 0.1), (20, 0.05)])
def test_one_cycle_whose_first_count_is_the_top_begins_there(length, share):
    schedule = one_cycle(0.3, length=length, warmup_share=share)  # torch's divides by zero
    assert schedule(0) == pytest.approx(0.3, rel=1e-12)
    middle = 0.3 * (1 + 4e-6) / 2
    assert (schedule(3) + schedule(length - 4)) / 2 == pytest.approx(middle, rel=1e-12)
    assert schedule(length - 1) == pytest.approx(0.3 / 25 / 1e4, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (warmup_stable_decay, {"warmup": -1}, "warmup of at least 0. Received: -1"),
        (warmup_stable_decay, {"decay": -2}, "decay of at least 0. Received: -2"),
        (warmup_stable_decay, {"peak": -0.1}, "finite and at least 0. Received: -0.1"),
        (warmup_stable_decay, {"final": math.nan}, "finite and at least 0. Received: nan"),
        (one_cycle, {"length": 1}, "length of at least 2. Received: 1"),
        (one_cycle, {"peak": math.inf}, "finite and at least 0. Received: inf"),
        (one_cycle, {"warmup_share": 0.0}, "0 < warmup_share < 1 and divisors above 0. Received: 0.0, 25.0 and"),
        (one_cycle, {"warmup_share": 1.0}, "0 < warmup_share < 1 and divisors above 0. Received: 1.0, 25.0 and"),
        (one_cycle, {"initial_divisor": 0.0}, "divisors above 0. Received: 0.3, 0.0 and"),
        (one_cycle, {"final_divisor": -1.0}, "divisors above 0. Received: 0.3, 25.0 and -1.0"),
    ],
)
def test_other_schedules_out_of_range_are_refused(make, options, named):
    valid = {"length": 9} if make is one_cycle else {"warmup": 1, "stable": 1, "decay": 1}
    with pytest.raises(ValueError, match=re.escape(named)):
        make(**{"peak": 0.1} | valid | options)
    assert make(**{"peak": 0.0} | valid)(0) == 0.0


def test_a_schedule_by_steps_counts_steps():
    schedule = per_step(warm_up(constant(1.0), length=4))
    assert [schedule.rate(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


REDUCED = Plateau(num_reductions=2)
IN_WORDS = [
    ("0.1*3 0.01", per_epoch([0.1, 0.1, 0.1, 0.01])),
    ("0.1 epochs", constant(0.1)),
    ("0.1*3 0.01 steps", per_step(per_epoch([0.1, 0.1, 0.1, 0.01]))),
    ("warmup 4 0.1", warm_up(constant(0.1), length=4)),
    ("warmup 2 0.1*3 0.01 steps", per_step(warm_up(per_epoch([0.1, 0.1, 0.1, 0.01]), length=2))),
    ("cosine 0.1 20 epochs", cosine(0.1, length=20)),
    ("cosine 1e-1 20 0.001 epoch", cosine(0.1, length=20, final=0.001)),
    ("warmup 5 cosine 0.1 20 steps", per_step(warm_up(cosine(0.1, length=20), length=5))),
    ("wsd 0.1 2 5 4", warmup_stable_decay(0.1, warmup=2, stable=5, decay=4)),
    ("wsd 0.1 0 5 4 0.01 steps", per_step(warmup_stable_decay(0.1, warmup=0, stable=5, decay=4, final=0.01))),
    ("onecycle 0.1 30 step", per_step(one_cycle(0.1, length=30))),
    ("plateau 0.1 0.5 3", reduce_on_plateau(0.1, factor=0.5, patience=3)),
    ("warmup 4 plateau 0.1 0.5 3", reduce_on_plateau(warm_up(constant(0.1), length=4), factor=0.5, patience=3)),
    (
        "warmup 4 plateau 0.1 0.5 3 steps",
        reduce_on_plateau(per_step(warm_up(constant(0.1), length=4)), factor=0.5, patience=3),
    ),
]


@pytest.mark.parametrize(("text", "expected"), IN_WORDS, ids=[text for text, _ in IN_WORDS])
def test_words_name_the_schedules_of_scripts(text, expected):
    schedule = parse_learning_rate(text)
    assert counts_steps(schedule) == counts_steps(expected)
    for plateau in (Plateau(), REDUCED):
        for step in range(40):
            position = {"epoch": step // 3, "step": step, "plateau": plateau}
            assert value_at(schedule, **position) == value_at(expected, **position)


def test_the_patience_in_words_is_that_of_the_plateau():
    schedule, plateau = parse_learning_rate("plateau 0.1 0.5 2"), Plateau()
    assert isinstance(schedule, OnPlateau)
    seen = []
    for _ in range(7):
        plateau = schedule.update(plateau, 1.0, mode="min")
        seen.append(plateau.num_reductions)
    assert seen == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("cosin 0.1 20", "cannot read 'cosin'. Expected RATE, .* words warmup, cosine, wsd, onecycle, plateau"),
        ("steps", "no rate was given"),
        ("warmup", "expected warmup LENGTH. Received after warmup: nothing"),
        ("warmup 5", "no rate was given"),
        ("warmup 0 0.1", "LENGTH being a whole number of at least 1. Received: '0'"),
        ("warmup 5 warmup 5 0.1", "expected no warmup before warmup"),
        ("warmup 5 wsd 0.1 1 2 3", "expected no warmup before wsd, which has its own"),
        ("cosine 0.1", r"expected cosine RATE LENGTH \[FINAL_RATE\]. Received after cosine: 0.1."),
        ("cosine 0.1 10 0.01 0.001", "Received after cosine: 0.1 10 0.01 0.001"),
        ("cosine 0.1 10.5", "LENGTH being a whole number of at least 1. Received: '10.5'"),
        ("cosine 0 10", "RATE being a number above 0. Received: '0'"),
        ("cosine nan 10", "RATE being a number above 0. Received: 'nan'"),
        ("cosine 0.1 10 -1", "FINAL_RATE being a number of at least 0. Received: '-1'"),
        ("cosine 0.1 10 inf", "FINAL_RATE being a number of at least 0. Received: 'inf'"),
        ("cosine 0.1 10 minutes", "FINAL_RATE being a number of at least 0. Received: 'minutes'"),
        ("wsd 0.1 1 2", "expected wsd PEAK WARMUP STABLE DECAY"),
        ("wsd 0.1 1 -2 3", "STABLE being a whole number of at least 0. Received: '-2'"),
        ("onecycle 0.1 1", "length of at least 2. Received: 1"),
        ("plateau 0.1 1 3", "factor between 0 and 1. Received: 1"),
        ("plateau 0.1 0.5 3 steps", "expected no unit. Received: one for plateau"),
        ("plateau 0.1 0.5 two", "PATIENCE being a whole number of at least 0. Received: 'two'"),
    ],
)
def test_a_schedule_in_words_that_is_wrong_is_refused_with_what_was_expected(text, named):
    with pytest.raises(ValueError, match=named) as error:
        parse_learning_rate(text)
    assert str(error.value).startswith(f"Learning rate {text!r}")
    assert "\n" not in str(error.value)
