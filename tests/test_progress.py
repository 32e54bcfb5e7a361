"""Claims about progress: bars on a terminal, one line per epoch everywhere, and the batches untouched."""

from __future__ import annotations

import logging
import os
import re
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from report_cases import report

from dwiml_func import TrainState, init_state, module_loss, sgd, train_and_validate, train_step
from dwiml_func.cli._messages import messages
from dwiml_func.types import Sum
from dwiml_func.writers.progress import Progress

THREE = report(
    3,
    train={"loss": 0.12345, "angular_error": 30.0},
    valid={"loss": 0.5, "angular_error": 12.34},
    train_minutes=0.5,
    valid_minutes=0.025,
)


BATCH = {"loss": Sum(0.75, 1.0)}


@pytest.fixture(scope="module")
def state() -> TrainState:
    return init_state(torch.nn.Linear(1, 1), sgd(), seed=0).replace(sums={"loss": Sum(1.5, 2.0)})


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """Make standard error a real pseudo-terminal; yields a function that returns the output since its last call."""
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


def test_the_batches_pass_through_unchanged(capsys):
    batches = [object(), object()]
    assert list(Progress(max_epochs=2).track(batches, "training", epoch=1, start_batch=5)) == batches
    assert capsys.readouterr() == ("", "")


def test_batches_without_a_length_have_a_bar_too():
    tracked = Progress(max_epochs=2).track(iter([1, 2, 3]), "training", epoch=0, start_batch=0)
    with terminal() as shown:
        assert list(tracked) == [1, 2, 3]
        assert "Epoch 1/2 training" in shown()


def test_a_terminal_shows_a_bar_with_the_loss_and_then_clears_it(state):
    progress = Progress(max_epochs=4)
    tracked = progress.track([6, 7], "training", epoch=2, start_batch=6)
    with terminal() as shown:
        for batch in tracked:
            progress.on_batch(state, BATCH)
            progress._batches.refresh()
            text = shown()
            assert "Epoch 3/4 training" in text
            assert f"{batch}/8" in text  # a resumed epoch continues where it was
            assert "loss 0.7500" in text
        rest = shown()
        assert rest.endswith(" \r")
        assert "Epochs:" not in rest  # that bar is for a `with` block


def test_the_speed_is_that_of_the_points_since_the_loss_was_last_read(state):
    """Also after a resume within the epoch, whose earlier batches count for the loss but not for the speed."""
    times = iter([0.0, 0.25, 0.5, 0.75])
    progress, shown = Progress(max_epochs=1, clock=lambda: next(times)), []
    points, loss = 1000.0, 0.5
    with terminal():
        for _ in progress.track([1, 2, 3], "training", epoch=0, start_batch=0):
            points, loss = points + 50.0, loss / 2
            now = state.replace(sums={"loss": Sum(loss * points, points)})
            progress.on_batch(now, {"loss": Sum(0.0, 50.0)})
            shown.append(progress._batches.postfix)
    # 50 points in the first quarter of a second; not read again; 100 points in half a second
    assert shown == ["loss 0.2500, 200 points/s", "loss 0.2500, 200 points/s", "loss 0.0625, 200 points/s"]


def test_a_validation_within_an_epoch_has_a_bar_below_and_its_time_is_not_that_of_the_training(state):
    now = 0.0
    progress = Progress(max_epochs=2, clock=lambda: now)

    def after(points: float, new: float) -> None:
        progress.on_batch(state.replace(sums={"loss": Sum(points / 2, points)}), {"loss": Sum(0.0, new)})

    with terminal():
        batches = progress.track([1, 2, 3], "training", epoch=0, start_batch=0)
        next(batches)
        bar = progress._batches
        after(10.0, 10.0)  # at once: no time has passed
        assert bar.postfix.startswith("loss 0.5000, ")
        now = 1.0
        after(30.0, 20.0)
        assert bar.postfix == "loss 0.5000, 20 points/s"
        for _ in progress.track(["one"], "validation", epoch=0, start_batch=0):
            assert abs(progress._batches.pos) == 1
            now = 100.0
        assert progress._batches is bar
        next(batches)
        now = 100.25  # the first batch after it is shown
        after(40.0, 10.0)
        assert bar.postfix == "loss 0.5000, 40 points/s"


class Unreadable:
    """Placeholder for a tensor on a GPU; reading it would make the step wait."""

    def __float__(self) -> float:
        raise AssertionError("was read")


def test_between_readings_no_sum_is_read(state):
    times = iter([0.0, 1.0, 1.4])
    progress = Progress(max_epochs=1, clock=lambda: next(times))
    unreadable: Any = state.replace(sums={"loss": Sum(Unreadable(), Unreadable())})  # type: ignore[arg-type]
    with terminal():
        for one in progress.track([state, unreadable], "training", epoch=0, start_batch=0):
            progress.on_batch(one, BATCH)


def test_off_a_terminal_no_sum_is_read(state):
    progress = Progress(max_epochs=1)
    unreadable: Any = state.replace(sums={"loss": Sum(Unreadable(), Unreadable())})  # type: ignore[arg-type]
    for _ in progress.track([1], "training", epoch=0, start_batch=0):
        progress.on_batch(unreadable, {})


def test_a_validation_within_an_epoch_does_not_move_the_bar_of_epochs(capsys):
    with terminal(), Progress(max_epochs=4) as progress:
        assert list(progress.track([1], "training", epoch=0, start_batch=0)) == [1]
        places = []
        for each in (report(1, batch=1), report(1), report(2, batch=1), report(2)):
            progress(each)
            places.append(progress._epochs.n)
    assert places == [0, 1, 1, 2]
    assert "Epoch 1/4, batch 1  training loss" in capsys.readouterr().out


def test_the_bar_of_epochs_is_above_that_of_batches_and_shows_the_remaining_time(state):
    with terminal() as shown:
        with Progress(max_epochs=4) as progress:
            for _ in progress.track([1, 2], "training", epoch=2, start_batch=0):
                screen = shown()
                if screen:
                    assert re.search(r"Epochs:  50%.* 2/4 \[00:00<", screen)
                    assert screen.index("Epochs:") < screen.index("\n") < screen.index("Epoch 3/4 training")
            progress(THREE)
            assert re.search(r"Epochs:  75%.*3/4 \[00:\d\d<00:\d\d, .*epoch.*, best loss 0\.6667\]", shown())
        assert shown().endswith(" \r")  # nothing is left of it


def test_in_a_script_the_loop_takes_both_callbacks(capfd):
    model = torch.nn.Linear(2, 1)
    loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
    with terminal() as shown, Progress(max_epochs=2) as progress:
        for _, one in train_and_validate(
            init_state(model, sgd(), seed=0),
            train=lambda key, epoch, start_batch: [torch.ones(4, 2)] * (3 - start_batch),
            step=partial(train_step, loss_fn=loss_fn, optimizer=sgd()),
            learning_rate=0.1,
            max_epochs=2,
            track=progress.track,
            on_batch=progress.on_batch,
        ):
            progress(one)
        screen = shown()
    assert "Epochs:" in screen
    assert "Epoch 1/2 training" in screen
    assert "Epoch 2/2 training" in screen
    assert [line.split("  ")[0] for line in capfd.readouterr().out.splitlines()] == ["Epoch 1/2", "Epoch 2/2"]


def test_a_pipe_gets_the_epochs_lines_only(capfd, state):
    progress = Progress(max_epochs=4)
    for _ in progress.track([1, 2], "training", epoch=0, start_batch=0):
        progress.on_batch(state, BATCH)
    progress(THREE)
    out, err = capfd.readouterr()
    assert out == "Epoch 3/4  training loss 0.1235  validation loss 0.5000  angular error 12.3 deg  31.5 s  best\n"
    assert err == ""


def test_the_line_of_an_epoch_tells_the_window_lag(capsys):
    Progress(max_epochs=4)(replace(THREE, valid={**THREE.valid, "tracking_window_lag": 3.456}))
    assert "angular error 12.3 deg  window lag 3.46 mm  31.5 s" in capsys.readouterr().out


def test_the_line_of_an_epoch_tells_only_what_there_is(capsys):
    progress = Progress(max_epochs=4)
    progress(replace(THREE, is_best=False, monitor="angular_error"))
    progress(replace(THREE, valid={}, valid_minutes=0.0))
    lines = capsys.readouterr().out.splitlines()
    assert "best" not in lines[0]
    assert lines[0].count("angular") == 1
    assert lines[1] == "Epoch 3/4  training loss 0.1235  30.0 s  best"
    more = {"reconstruction_error": 1.234, "accuracy": 0.98765}
    progress(replace(THREE, valid={**THREE.valid, **more}, monitor="accuracy"))
    progress(replace(THREE, valid={}, train={**THREE.train, **more}, monitor="accuracy"))
    lines = capsys.readouterr().out.splitlines()
    assert "12.3 deg  reconstruction error 1.23 voxels  accuracy 0.9877  31.5 s" in lines[0]
    assert "training loss 0.1235  accuracy 0.9877  31.5 s" in lines[1]
    progress()
    assert capsys.readouterr().out == ""


def test_a_line_is_written_at_once_also_into_a_pipe(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stdout, os.fdopen(reading, "rb", buffering=0) as reader:
        os.set_blocking(reading, False)
        monkeypatch.setattr(sys, "stdout", stdout)
        Progress(max_epochs=4)(THREE)
        assert (reader.read(1000) or b"").startswith(b"Epoch 3/4")
        monkeypatch.undo()


def test_on_batch_before_the_first_batch_does_nothing(state):
    Progress(max_epochs=1).on_batch(state, {})


def test_a_log_line_does_not_tear_the_bars(state):
    with terminal() as shown, messages("dwiml-func train"), Progress(max_epochs=4) as progress:
        for batch in progress.track([1, 2], "training", epoch=2, start_batch=0):
            progress.on_batch(state, BATCH)
            logging.getLogger("dwiml_func").warning("line %d", batch)
            screen = shown()
            # the bars are wiped, the line has a row of its own, and the bars stand below it again
            assert re.search(rf"\r[ \x1b\[A\r]*dwiml-func train: warning: line {batch}\r\n", screen), repr(screen)
            after = screen[screen.index(f"line {batch}") :]
            # tqdm draws them in any order, and goes up a row for what stands above
            rows = [
                (before := after[: after.index(bar)]).count("\n") - before.count("\x1b[A")
                for bar in ("Epochs:", "Epoch 3/4 training")
            ]
            assert rows == [1, 2]


@pytest.mark.parametrize("kind", ["closed", "none", "gone", "descriptor"])
def test_a_bar_whose_terminal_is_gone_ends_no_training(monkeypatch, state, kind):
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    stderr = os.fdopen(slave, "w")
    monkeypatch.setattr(sys, "stderr", stderr)
    with Progress(max_epochs=4) as progress:
        seen = []
        for batch in progress.track([1, 2, 3], "training", epoch=2, start_batch=0):
            if batch == 2:
                if kind == "closed":
                    stderr.close()
                elif kind == "none":
                    monkeypatch.setattr(sys, "stderr", None)
                elif kind == "descriptor":
                    os.close(slave)
                else:
                    os.close(master)
            seen.append(batch)
            progress.on_batch(state, BATCH)
            progress._batches.refresh()
        assert list(progress.track([4], "validation", epoch=2, start_batch=0)) == [4]
    assert seen == [1, 2, 3]
    with suppress(OSError):
        stderr.close()
    for descriptor in (master, slave):
        with suppress(OSError):
            os.close(descriptor)
