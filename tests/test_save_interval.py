"""Claims about how often checkpoints are saved."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dwiml_func import init_state
from dwiml_func.core.interval import Interval, parse_interval
from dwiml_func.experiment.run import train_and_save
from dwiml_func.experiment.signals import StopRequest
from dwiml_func.optim import sgd


@pytest.mark.parametrize(
    ("text", "save_interval"),
    [
        ("1epoch", Interval(1, "epoch")),
        ("3 epochs", Interval(3, "epoch")),
        ("50batches", Interval(50, "batch")),
        ("1 batch", Interval(1, "batch")),
        ("2.0batches", Interval(2, "batch")),
        ("10minutes", Interval(10, "minute")),
        ("0.5 minute", Interval(0.5, "minute")),
    ],
)
def test_number_and_unit_are_read(text, save_interval):
    assert parse_interval(text, name="checkpoint_every") == save_interval


@pytest.mark.parametrize(
    "text",
    [
        *("", "50", "batches", "0batches", "0.0minutes", "-1epoch", "+1epoch", "1.5batches", "0.5epoch", "1e3batches"),
        *("10 seconds", "1  epoch", " 1epoch", "1epoch ", "1epoch\n", "1Epoch", "epoch1", "٣epochs", "nan minutes"),
        *("inf epochs", "9" * 400 + "batches", ".5minutes", "1.minutes", "1epochs2", "1_0batches"),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_any_other_text_is_refused_and_shown(text):
    with pytest.raises(ValueError, match="checkpoint_every: expected a number and a unit, such as 50batches") as raised:
        parse_interval(text, name="checkpoint_every")
    assert repr(text)[:50] in str(raised.value)
    assert len(str(raised.value)) < 200


@given(every=st.integers(1, 60), num_batches=st.integers(1, 200), start=st.integers(0, 200))
def test_every_so_many_batches_counts_from_the_epochs_start_wherever_a_run_was_resumed(every, num_batches, start):
    save_interval = Interval(every, "batch")
    due = [
        batch for batch in range(start + 1, num_batches + 1) if save_interval.due_within_epoch(batch=batch, seconds=1e9)
    ]
    assert due == [every * k for k in range(1, num_batches // every + 1) if every * k > start]


@example(minutes=1.0, seconds=60.0, batch=1)
@given(minutes=st.floats(1e-3, 1e3), seconds=st.floats(0, 1e5), batch=st.integers(1, 100))
def test_minutes_count_from_the_last_save(minutes, seconds, batch):
    due = Interval(minutes, "minute").due_within_epoch(batch=batch, seconds=seconds)
    assert due == (seconds >= 60 * minutes)


def test_the_end_of_an_epoch_is_due_but_where_the_unit_is_epochs():
    assert all(Interval(7, unit).due_after_epoch(epoch) for unit in ("batch", "minute") for epoch in range(1, 20))
    assert [epoch for epoch in range(1, 13) if Interval(5, "epoch").due_after_epoch(epoch)] == [5, 10]
    assert not any(Interval(1, "epoch").due_within_epoch(batch=b, seconds=math.inf) for b in range(1, 9))


@pytest.mark.parametrize("place", ["validation", "save"])
def test_an_error_says_that_the_state_before_it_could_not_be_saved_unless_it_is_that_of_a_save(tmp_path, place):
    """Both errors are of one type, as on a disk that fails."""
    first = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)

    def loop(state, *, on_batch, interrupt):
        on_batch(state.replace(batch=1, step=1), {})
        raise OSError("validation: the disk")
        yield

    def save(state, reports):
        raise OSError("save: no space")

    save_interval = Interval(1 if place == "save" else 9, "batch")
    options = {"must_save": bool, "interval": save_interval, "stop": StopRequest(), "directory": tmp_path}
    with pytest.raises(OSError, match=place) as raised:
        list(train_and_save(loop, first, save=save, **options))
    notes = [] if place == "save" else ["The state before the error could not be saved: save: no space"]
    assert getattr(raised.value, "__notes__", []) == notes
