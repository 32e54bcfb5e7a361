"""Claims about progress: a bar on a terminal, a line an epoch everywhere, and the batches untouched."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import pytest

from dwiml_func import EpochReport, Key, TrainState, init_state, sgd
from dwiml_func.best import Best
from dwiml_func.metrics import Sum
from dwiml_func.writers.progress import Progress


def report(**changes: Any) -> EpochReport:
    values: dict[str, Any] = {
        "epoch": 3,
        "learning_rate": 0.1,
        "train": {"loss": 0.12345, "angular_error": 30.0},
        "valid": {"loss": 0.5, "angular_error": 12.34},
        "num_batches": 3,
        "num_points": 30.0,
        "best": Best(0.5, 3, 0),
        "is_best": True,
        "stop": None,
        "train_minutes": 0.5,
        "valid_minutes": 0.025,
    }
    return EpochReport(**values | changes)


@pytest.fixture(scope="module")
def state() -> TrainState:
    import torch

    return init_state(torch.nn.Linear(1, 1), sgd(), seed=0).replace(sums={"loss": Sum(1.5, 2.0)})


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """Make standard error a real pseudo-terminal; gives a function that says what came since it was last called."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 100))  # tqdm shows nothing in 0 columns
    os.set_blocking(master, False)

    def shown() -> str:
        sys.stderr.flush()
        text = b""
        while True:
            try:
                text += os.read(master, 65536)
            except BlockingIOError:
                return text.decode()

    with os.fdopen(slave, "w") as stderr, redirect_stderr(stderr):
        yield shown
    os.close(master)


def test_the_batches_and_the_arguments_pass_through_unchanged(capsys):
    batches, asked = [object(), object()], []

    def source(*place: Any) -> list[object]:
        asked.append(place)
        return batches

    tracked = Progress(max_epochs=2).track(source, "training")
    assert list(tracked(Key(7), 1, 5)) == batches
    assert asked == [(Key(7), 1, 5)]
    assert capsys.readouterr() == ("", "")


def test_a_source_that_does_not_know_its_length_will_do():
    tracked = Progress(max_epochs=2).track(lambda key, epoch, start: iter([1, 2, 3]), "training")
    with terminal() as shown:
        assert list(tracked(Key(0), 0, 0)) == [1, 2, 3]
        assert "Epoch 1/2 training" in shown()


def test_a_terminal_shows_a_bar_with_the_loss_and_then_clears_it(state):
    progress = Progress(max_epochs=4)
    tracked = progress.track(lambda key, epoch, start: list(range(start, 8)), "validation")
    with terminal() as shown:
        for batch in tracked(Key(0), 2, 6):
            progress.on_batch(state, {})
            progress._bar.refresh()
            text = shown()
            assert "Epoch 3/4 validation" in text
            assert f"{batch}/8" in text  # a resumed epoch goes on where it was
            assert "loss 0.7500" in text
        assert shown().endswith(" \r")


def test_a_pipe_gets_the_epochs_lines_only(capfd, state):
    progress = Progress(max_epochs=4)
    for _ in progress.track(lambda key, epoch, start: [1, 2], "training")(Key(0), 0, 0):
        progress.on_batch(state, {})
    progress.report(report())
    out, err = capfd.readouterr()
    assert out == "Epoch 3/4  training loss 0.1235  validation loss 0.5000  angular error 12.3 deg  31.5 s  best\n"
    assert err == ""


def test_an_epoch_that_is_not_the_best_or_has_no_validation_says_no_such_thing(capsys):
    progress = Progress(max_epochs=4)
    progress.report(report(is_best=False))
    progress.report(report(valid={}, valid_minutes=0.0))
    lines = capsys.readouterr().out.splitlines()
    assert "best" not in lines[0]
    assert lines[1] == "Epoch 3/4  training loss 0.1235  30.0 s  best"


def test_a_line_is_there_at_once_also_in_a_pipe(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stdout, os.fdopen(reading, "rb", buffering=0) as reader:
        os.set_blocking(reading, False)
        monkeypatch.setattr(sys, "stdout", stdout)
        Progress(max_epochs=4).report(report())
        assert (reader.read(1000) or b"").startswith(b"Epoch 3/4")
        monkeypatch.undo()


def test_callbacks_before_the_first_batch_do_nothing(state):
    Progress(max_epochs=1).on_batch(state, {})
