"""Claims about validations every so many batches: when they come, what they decide, and that a resume repeats none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dwiml_func import (
    Best,
    Interrupted,
    Key,
    NonFiniteError,
    eval_step,
    init_state,
    module_loss,
    radam,
    reduce_on_plateau,
    restore_or,
    run_epoch,
    save,
    train_and_validate,
    train_step,
)
from dwiml_func.checkpoint import list_checkpoints, restore, state_digest
from dwiml_func.checkpoint.history import history_from_json, history_to_json
from dwiml_func.types import Sum

MODEL = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.2), torch.nn.Linear(3, 1))
BATCHES = [torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(7)]
LOSS = module_loss(MODEL, lambda model, x: ((model(x) - 1).square().mean(), len(x), {"error": model(x).abs().mean()}))
OPTIMIZER = radam()
STEP = partial(train_step, loss_fn=LOSS, optimizer=OPTIMIZER)
EVAL = partial(eval_step, loss_fn=LOSS)


def source(key: Key, epoch: int, start: int) -> list[torch.Tensor]:
    return BATCHES[start:]


def start() -> Any:
    return init_state(MODEL, OPTIMIZER, seed=0)


def loop(state: Any = None, **options: Any) -> Any:
    values: dict[str, Any] = {
        "train": source,
        "step": STEP,
        "valid": lambda *_: BATCHES[:2],
        "eval_step": EVAL,
        "learning_rate": 0.05,
        "max_epochs": 2,
        "validate_every": "3batches",
        "clock": lambda: 0.0,
    }
    return train_and_validate(start() if state is None else state, **values | options)


def metric(values: dict[tuple[int, int], float], name: str = "loss") -> Any:
    """An evaluation whose values are given by (epoch, number of steps)."""

    def evaluate(state: Any, batch: Any) -> Any:
        return {"loss": Sum(8.0, 8.0), name: Sum(8 * values[state.epoch, state.step], 8.0)}

    return evaluate


def test_they_come_within_an_epoch_and_at_its_end_but_never_twice_for_one_state() -> None:
    seen = [(report.epoch, report.batch, report.num_batches) for _, report in loop()]
    assert seen == [(1, 3, 3), (1, 6, 6), (1, 0, 7), (2, 3, 3), (2, 6, 6), (2, 0, 7)]
    assert [report.stop for _, report in loop()] == [None] * 5 + ["max_epochs"]
    six = [(report.epoch, report.batch) for _, report in loop(train=lambda key, epoch, start: BATCHES[start:6])]
    assert six == [(1, 3), (1, 0), (2, 3), (2, 0)]  # the sixth batch is the epoch's last
    assert [report.batch for _, report in loop(validate_every="9 batches")] == [0, 0]
    assert [bool(report.valid) for _, report in loop(validate_every="2epochs")] == [False, True]
    assert [bool(report.valid) for _, report in loop(validate_every=np.int64(2))] == [False, True]
    assert [report.batch for _, report in loop(valid=None, eval_step=None)] == [0, 0]


def test_they_change_nothing_in_the_training() -> None:
    (*_, (often, report)), (*_, (seldom, other)) = loop(), loop(validate_every=1)
    assert all(torch.equal(tensor, seldom.params[name]) for name, tensor in often.params.items())
    assert (report.train, report.valid) == (other.train, other.valid)
    assert [validation.batch for validation in report.validations] == [3, 6]
    assert (often.validations, other.validations) == ((), ())


def test_a_validation_is_that_of_the_state_after_so_many_batches() -> None:
    (state, report), *_ = loop()
    alone, expected = run_epoch(
        start(),
        train=lambda *_: BATCHES[:3],
        step=STEP,
        valid=lambda *_: BATCHES[:2],
        eval_step=EVAL,
        learning_rate=0.05,
    )
    assert torch.equal(state.params["0.weight"], alone.params["0.weight"])
    assert (report.train, report.valid) == (expected.train, expected.valid)


def test_best_and_patience_count_validations() -> None:
    values = {(1, 3): 0.5, (1, 6): 0.9, (1, 7): 0.8, (2, 10): 0.7, (2, 13): 0.95, (2, 14): 0.1}
    options: dict[str, Any] = {"eval_step": metric(values, "accuracy"), "monitor": "accuracy", "mode": "max"}
    reports = [report for _, report in loop(**options)]
    assert [report.is_best for report in reports] == [True, True, False, False, True, False]
    assert reports[2].best == Best(0.9, 1, 1, batch=6)
    assert reports[2].best_means["accuracy"] == pytest.approx(0.9)
    assert reports[-1].best == Best(0.95, 2, 1, batch=6)
    assert {report.monitor for report in reports} == {"accuracy"}
    assert reports[1].monitored == pytest.approx(0.9)
    *_, (state, last) = loop(**options, patience=2)
    assert (last.epoch, last.batch, last.stop) == (2, 3, "patience")
    assert (state.epoch, state.batch, state.best) == (1, 3, Best(0.9, 1, 2, batch=6))
    assert list(loop(state, **options, patience=2)) == []
    assert [report.batch for _, report in loop(state, **options, patience=3)] == [6, 0]


def test_a_single_epoch_hands_over_its_validations() -> None:
    seen: list[Any] = []
    options: dict[str, Any] = {"train": source, "step": STEP, "valid": lambda *_: BATCHES[:2], "eval_step": EVAL}
    state, report = run_epoch(
        start(),
        **options,
        learning_rate=0.05,
        validate_every="3batches",
        on_validated=lambda state, report: seen.append((state.batch, report.batch)),
    )
    assert (seen, state.epoch, report.batch) == ([(3, 3), (6, 6)], 1, 0)


def test_a_state_that_is_sent_back_within_an_epoch_takes_effect() -> None:
    epochs = loop()
    state, _ = next(epochs)
    zeroed = state.replace(params={name: p * 0 for name, p in state.params.items()})
    sent, _ = epochs.send(zeroed)
    resumed, _ = next(loop(zeroed))
    assert state_digest(sent) == state_digest(resumed)


def run(directory: Path, *, saves_now: Callable[[], bool] = bool, **options: Any) -> tuple[Any, Any]:
    """A script with checkpoints, after batches too where it is told, and what it ends with."""
    state, history = restore_or(directory, start())

    def keep(state: Any, _: Any) -> None:
        if saves_now():
            save(directory, state, history, keep=None)

    options.setdefault("learning_rate", reduce_on_plateau(0.05, factor=0.5, patience=0, threshold=0.9))
    for state, report in loop(state, on_batch=keep, **options):  # noqa: B020
        history = (*history, report)
        save(directory, state, history, keep=None)
    return state, restore(directory, state).history


def test_killed_anywhere_a_run_ends_in_the_same_state_and_history(tmp_path: Path) -> None:
    """After each batch, before, within and after each validation, as the position in the calls of a run."""
    whole, history = run(tmp_path / "whole", saves_now=lambda: True)
    assert [(report.epoch, report.batch) for report in history] == [(1, 0), (2, 0)]
    rates = [each.learning_rate for report in history for each in report.validations]
    assert len({*rates, history[-1].learning_rate}) > 1  # the rate depends on the validations
    for report in history:
        own = [*(each.learning_rate for each in report.validations), report.learning_rate]
        assert len(own) == 3
        ends = (min(own), max(own)) if len(set(own)) > 1 else (None, None)
        assert (report.learning_rate_min, report.learning_rate_max) == ends

    class Killed(BaseException):
        pass

    for kill_at in (1, 15, *range(2, 26, 2)):  # a run takes 14 training and 12 validation steps
        calls = 0

        def count() -> None:
            nonlocal calls
            calls += 1
            if calls == kill_at:  # noqa: B023
                raise Killed

        def is_near() -> bool:
            """Of the first two kills nothing is left, or the first epoch; others come just after saves of batches."""
            return kill_at % 2 == 0 and calls >= kill_at - 3  # noqa: B023

        def step(state: Any, batch: Any, *, lr: float, count: Any = count) -> Any:
            count()
            return STEP(state, batch, lr=lr)

        def evaluate(state: Any, batch: Any, count: Any = count) -> Any:
            count()
            return EVAL(state, batch)

        directory = tmp_path / str(kill_at)
        with pytest.raises(Killed):
            run(directory, saves_now=is_near, step=step, eval_step=evaluate)
        state, resumed = run(directory)
        assert state_digest(state) == state_digest(whole), kill_at
        assert [repr(replace(r, timed_points=None)) for r in resumed] == [repr(r) for r in history]


def test_interrupted_in_a_validation_a_resume_repeats_it_and_no_batch() -> None:
    *_, (whole, expected) = loop()
    validated: list[int] = []

    def evaluate(state: Any, batch: Any) -> Any:
        validated.append(state.step)
        return EVAL(state, batch)

    with pytest.raises(Interrupted) as stopped:
        list(loop(eval_step=evaluate, interrupt=lambda: len(validated) == 3))  # in the second one, after batch 6
    state = stopped.value.state
    assert (state.epoch, state.batch, len(state.validations)) == (0, 6, 1)
    *_, (resumed, report) = loop(state)
    assert state_digest(resumed) == state_digest(whole)
    assert (report.valid, report.best, report.validations) == (expected.valid, expected.best, expected.validations)


def test_an_error_in_a_validation_within_an_epoch_hands_over_what_was_trained() -> None:
    def fails(state: Any, batch: Any) -> Any:
        raise MemoryError("in validation")

    epochs = loop(eval_step=fails)
    state, report = next(epochs)
    assert (state.batch, report.batch, report.valid, state.validations) == (3, 3, {}, ())
    with pytest.raises(MemoryError):
        next(epochs)
    *_, (whole, _) = loop()
    *_, (resumed, _) = loop(state)
    assert state_digest(resumed) == state_digest(whole)


def test_the_checkpoint_of_the_best_state_stays_also_within_an_epoch(tmp_path: Path) -> None:
    values = {(1, 3): 0.5, (1, 6): 0.1, (1, 7): 0.8, (2, 10): 0.7, (2, 13): 0.9, (2, 14): 0.6}
    state, history = start(), ()
    for state, report in loop(eval_step=metric(values)):
        history = (*history, report)
        save(tmp_path, state, history, keep=1)
    assert state.best == Best(0.1, 1, 4, batch=6)
    assert list_checkpoints(tmp_path) == ["0-6", "2"]
    best = restore(tmp_path, state, name="0-6")
    assert (best.state.best, best.state.step) == (Best(0.1, 1, 0, batch=6), 6)
    assert history_from_json(history_to_json(history)) == tuple(history)


def test_a_step_that_was_not_finite_is_found_before_a_validation() -> None:
    step = partial(train_step, loss_fn=LOSS, optimizer=OPTIMIZER, non_finite="defer")
    bad = [BATCHES[0], BATCHES[1] * torch.nan, *BATCHES[2:]]
    with pytest.raises(NonFiniteError, match="batch 2"):
        next(loop(step=step, train=lambda key, epoch, start: bad[start:]))


@pytest.mark.parametrize("every", ["500", "10minutes", "0batches", 0, 1.5, True, "batches"])
def test_another_interval_is_refused_at_the_call(every: Any) -> None:
    with pytest.raises(ValueError, match="validate_every"):
        loop(validate_every=every)
