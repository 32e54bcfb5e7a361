"""Claims about `reduce_on_plateau`: torch's rates, held in the state, resumed exactly, unseen where unused."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dwiml_func import (
    Key,
    constant,
    eval_step,
    init_state,
    module_loss,
    per_step,
    reduce_on_plateau,
    restore,
    run_epoch,
    save,
    sgd,
    stack_states,
    train_and_validate,
    train_and_validate_ensemble,
    train_step,
    warm_up,
)
from dwiml_func import ensemble_step as ensemble_step_of
from dwiml_func.checkpoint.digest import numbers_to_fields, state_digest, state_numbers
from dwiml_func.ensemble.state import member
from dwiml_func.optim.schedules import value_at
from dwiml_func.types import Plateau, Sum

MODEL = torch.nn.Linear(4, 1)
BATCHES = [torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
METRICS = st.lists(st.sampled_from([0.0, 0.5, 0.9999, 0.99995, 1.0, 1.00005, 1.1, -1.0, 2.0, math.nan, math.inf]))


@settings(max_examples=300, deadline=None)
@given(
    METRICS, st.sampled_from(["min", "max"]), st.sampled_from(["rel", "abs"]), st.integers(0, 3), st.integers(0, 3),
    st.sampled_from([0.0, 1e-4, 0.1]), st.sampled_from([0.1, 0.5, 0.999]), st.sampled_from([0.0, 1e-3, 0.2]),
)  # fmt: skip
def test_the_rates_are_bitwise_those_of_torch(
    metrics: list[float], mode: Any, threshold_mode: Any, patience: int, cooldown: int, threshold: float,
    factor: float, least: float,
) -> None:  # fmt: skip
    options: dict[str, Any] = {"factor": factor, "patience": patience, "threshold": threshold, "cooldown": cooldown}
    optimizer = torch.optim.SGD([torch.ones(1)], lr=0.3)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode=mode, threshold_mode=threshold_mode, min_lr=least, **options
    )
    ours, plateau = reduce_on_plateau(0.3, threshold_mode=threshold_mode, min_rate=least, **options), Plateau()
    for value in metrics:
        theirs.step(value)
        plateau = ours.update(plateau, value, mode=mode)
        assert value_at(ours, epoch=0, step=0, plateau=plateau) == optimizer.param_groups[0]["lr"]


def test_a_reduction_that_torch_ignores_is_ignored() -> None:
    optimizer = torch.optim.SGD([torch.ones(1)], lr=1.5e-8)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    ours, plateau = reduce_on_plateau(1.5e-8, factor=0.5, patience=0), Plateau()
    for _ in range(4):
        theirs.step(1.0)
        plateau = ours.update(plateau, 1.0)
        assert value_at(ours, epoch=0, step=0, plateau=plateau) == optimizer.param_groups[0]["lr"] == 1.5e-8


def loss(model: Any, x: Tensor) -> tuple[Tensor, int, dict[str, Any]]:
    return (model(x) - 1).square().mean(), len(x), {"accuracy": (model(x) > 0).float().mean()}


LOSS = module_loss(MODEL, loss)


def source(key: Key, epoch: int, start: int) -> list[Tensor]:
    return BATCHES[start:]


def start() -> Any:
    return init_state(MODEL, sgd(), seed=0)


def loop(state: Any = None, **options: Any) -> Any:
    values: dict[str, Any] = {
        "train": source,
        "valid": source,
        "step": partial(train_step, loss_fn=LOSS, optimizer=sgd()),
        "eval_step": partial(eval_step, loss_fn=LOSS),
        "max_epochs": 4,
    }
    return train_and_validate(start() if state is None else state, **values | options)


NOTHING_IMPROVES: dict[str, Any] = {"factor": 0.5, "patience": 0, "threshold": 0.999}


def test_the_rate_follows_the_validations_of_the_run() -> None:
    reports = [report for _, report in loop(learning_rate=reduce_on_plateau(0.1, **NOTHING_IMPROVES))]
    assert [report.learning_rate for report in reports] == [0.1, 0.1, 0.05, 0.025]


def test_the_monitored_metric_and_its_mode_decide() -> None:
    accuracies = [0.2, 0.3, 0.25, 0.4, 0.1]  # the loss gets better all the time

    def evaluate(state: Any, batch: Any) -> Any:
        return {"loss": Sum(9.0 - state.epoch, 1.0), "accuracy": Sum(accuracies[state.epoch - 1], 1.0)}

    options: dict[str, Any] = {"valid": lambda *_: [0], "eval_step": evaluate, "monitor": "accuracy", "max_epochs": 5}
    for mode, rates in (("max", [0.1, 0.1, 0.1, 0.05, 0.05]), ("min", [0.1, 0.1, 0.05, 0.025, 0.0125])):
        schedule = reduce_on_plateau(0.1, factor=0.5, patience=0)
        assert [report.learning_rate for _, report in loop(learning_rate=schedule, mode=mode, **options)] == rates


def test_epochs_without_validation_do_not_count() -> None:
    reports = [r for _, r in loop(learning_rate=reduce_on_plateau(0.1, **NOTHING_IMPROVES), validate_every=2)]
    assert [report.learning_rate for report in reports] == [0.1] * 4
    state, _ = list(loop(learning_rate=reduce_on_plateau(0.1, **NOTHING_IMPROVES), validate_every=2))[-1]
    assert state.plateau.num_reductions == 1


def test_it_reduces_another_schedule_also_by_steps() -> None:
    inner = per_step(warm_up(constant(0.1), length=9))
    rates: list[float] = []

    def step(state: Any, batch: Any, *, lr: float) -> Any:
        rates.append(lr)
        return train_step(state, batch, loss_fn=LOSS, optimizer=sgd(), lr=lr)

    list(loop(step=step, learning_rate=reduce_on_plateau(inner, **NOTHING_IMPROVES), max_epochs=3))
    assert rates == [inner.rate(number) * (0.5 if number >= 6 else 1) for number in range(9)]


def test_a_run_resumed_at_any_batch_has_the_same_rates(tmp_path: Any) -> None:
    schedule = reduce_on_plateau(0.1, **NOTHING_IMPROVES)
    states: list[Any] = []
    *_, (whole, last) = loop(learning_rate=schedule, on_batch=lambda state, _: states.append(state))
    assert whole.plateau.num_reductions == 3
    for number, state in enumerate(states):
        save(tmp_path / str(number), state)
        restored = restore(tmp_path / str(number), start()).state
        assert restored.plateau == state.plateau
        *_, (end, report) = loop(restored, learning_rate=schedule)
        assert state_digest(end) == state_digest(whole)
        assert report.learning_rate == last.learning_rate == 0.025


def test_a_state_without_it_has_the_numbers_of_earlier_versions() -> None:
    numbers = state_numbers(start())
    assert "plateau" not in numbers
    assert numbers_to_fields(numbers)["plateau"] == Plateau()
    used = start().replace(plateau=Plateau(1, -math.inf, 2, 0))
    assert state_digest(used) != state_digest(start())
    read = json.loads(json.dumps(state_numbers(used)))
    assert numbers_to_fields(read)["plateau"] == used.plateau


def test_without_validation_the_training_decides() -> None:
    state = start()
    schedule = reduce_on_plateau(0.1, **NOTHING_IMPROVES)
    step = partial(train_step, loss_fn=LOSS, optimizer=sgd())
    losses = []
    for _ in range(2):
        state, report = run_epoch(state, train=source, step=step, learning_rate=schedule)
        losses.append(report.train["loss"])
    assert state.plateau == Plateau(1, losses[0], 0, 0)


@pytest.mark.parametrize(("monitor", "reduced"), [("loss", {"threshold": 0.999}), ("constant", {})])
def test_each_member_of_an_ensemble_has_its_own(monitor: str, reduced: Any) -> None:
    def compute(model: Any, x: torch.Tensor) -> Any:
        return (model(x) - 1).square().mean(), len(x), {"constant": 1.0}

    loss_fn = module_loss(MODEL, compute)
    *_, (ensemble, report) = train_and_validate_ensemble(
        stack_states([start(), start()]),
        train=source,
        step=partial(ensemble_step_of, loss_fn=loss_fn, optimizer=sgd()),
        learning_rate=[reduce_on_plateau(0.1, factor=0.5, patience=0, **reduced), reduce_on_plateau(0.1)],
        max_epochs=3,
        monitor=monitor,
    )
    assert [own.learning_rate for own in report.members.values()] == [0.05, 0.1]
    assert [member(ensemble, number).plateau.num_reductions for number in (0, 1)] == [2, 0]
    assert member(stack_states([member(ensemble, 0)]), 0).plateau == ensemble.plateau[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"factor": 1.0}, "factor between 0 and 1"),
        ({"factor": math.nan}, "factor between 0 and 1"),
        ({"patience": -1}, "patience of at least 0"),
        ({"cooldown": -1}, "cooldown of at least 0"),
        ({"threshold": math.inf}, "threshold that is finite"),
        ({"min_rate": -0.1}, "min_rate that is finite"),
        ({"threshold_mode": "relative"}, "expected one of rel, abs, received 'relative'"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        reduce_on_plateau(0.1, **options)
    with pytest.raises(ValueError, match="follows a plateau already"):
        reduce_on_plateau(cast("Any", reduce_on_plateau(0.1)))
    with pytest.raises(ValueError, match="positive and finite"):
        reduce_on_plateau(-0.1)
