"""Claims about epochs composed by hand: steps, single epochs, what is monitored, and when it is validated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dwiml_func import (
    Best,
    Key,
    constant,
    end_epoch,
    epoch_fn,
    eval_step,
    init_state,
    module_loss,
    per_step,
    reduce_on_plateau,
    run_epoch,
    sgd,
    stack_states,
    train_and_validate,
    train_and_validate_ensemble,
    train_step,
    train_steps,
    update_best,
    warm_up,
)
from dwiml_func import ensemble_step as ensemble_step_of
from dwiml_func.checkpoint import state_digest
from dwiml_func.core.batch_source import checked_batches
from dwiml_func.core.rates import epoch_rates
from dwiml_func.core.report import Validation
from dwiml_func.types import Plateau

MODEL = torch.nn.Linear(4, 1)
BATCHES = [torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


def accuracy(model: Any, x: Tensor) -> tuple[Tensor, int, dict[str, Any]]:
    outputs = model(x)
    return (outputs - 1).square().mean(), len(x), {"accuracy": (outputs > 0).float().mean()}


LOSS = module_loss(MODEL, accuracy)
STEP = partial(train_step, loss_fn=LOSS, optimizer=sgd())
EVAL = partial(eval_step, loss_fn=LOSS)


def source(key: Key, epoch: int, start: int) -> list[Tensor]:
    return BATCHES[start:]


def start() -> Any:
    return init_state(MODEL, sgd(), seed=0)


def loop(state: Any = None, **options: Any) -> Any:
    values: dict[str, Any] = {"train": source, "step": STEP, "learning_rate": 0.1, "max_epochs": 3}
    return train_and_validate(start() if state is None else state, **values | options)


def test_steps_by_hand_are_an_epoch() -> None:
    bound = partial(STEP, lr=0.1)
    state, seen = start(), []
    for state, metrics in train_steps(state, BATCHES, step=bound):  # noqa: B020
        seen.append((state.batch, metrics["loss"].weight))
    assert seen == [(number, 8.0) for number in range(1, 6)]
    closed, sums = end_epoch(state)
    whole, expected = epoch_fn(start(), BATCHES, step=bound)
    assert state_digest(closed) == state_digest(whole)
    assert sums == expected


def test_the_loop_is_a_fold_of_single_epochs() -> None:
    state, reports = start(), []
    options: dict[str, Any] = {"train": source, "step": STEP, "valid": source, "eval_step": EVAL, "learning_rate": 0.1}
    for _ in range(3):
        state, report = run_epoch(state, **options, max_epochs=3, clock=lambda: 0.0)
        reports.append(report)
    folded = list(loop(valid=source, eval_step=EVAL, clock=lambda: 0.0))
    assert [report for _, report in folded] == reports
    assert state_digest(folded[-1][0]) == state_digest(state)


def test_a_state_that_is_sent_back_takes_effect() -> None:
    epochs = loop(max_epochs=2)
    state, _ = next(epochs)
    zeroed = state.replace(params={name: p * 0 for name, p in state.params.items()})
    continued, _ = epochs.send(zeroed)
    expected, _ = run_epoch(zeroed, train=source, step=STEP, learning_rate=0.1)
    assert state_digest(continued) == state_digest(expected)


def test_the_best_epoch_may_be_that_of_any_metric() -> None:
    values = iter([0.3, 0.9, 0.5])

    def evaluate(state: Any, batch: Any) -> Any:
        return {"loss": EVAL(state, batch)["loss"], "accuracy": EVAL(state, batch)["loss"]._replace(total=8 * value)}

    state, reports = start(), []
    for _ in range(3):
        value = next(values)
        state, report = run_epoch(
            state,
            train=source,
            step=STEP,
            valid=lambda *_: BATCHES[:1],
            eval_step=evaluate,
            learning_rate=0.1,
            monitor="accuracy",
            mode="max",
            patience=1,
        )
        reports.append(report)
    assert [report.is_best for report in reports] == [True, True, False]
    assert reports[-1].best == Best(0.9, 2, 1)
    assert reports[-1].stop == "patience"
    with pytest.raises(ValueError, match=r"metric to monitor among accuracy, .*loss.* Received: 'recall'"):
        next(loop(monitor="recall"))
    with pytest.raises(ValueError, match="mode: expected one of min, max, received"):
        loop(mode="maximum")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_with_mode_max_the_first_finite_value_is_a_best_and_a_tie_is_none(value: float) -> None:
    best = update_best(Best(), value, 1, mode="max")
    best = update_best(best, -5.0, 2, mode="max")
    assert best == Best(-5.0, 2, 0)
    assert update_best(best, -5.0, 3, mode="max") == Best(-5.0, 2, 1)
    assert update_best(best, -4.0, 3, mode="max") == Best(-4.0, 3, 0)


def test_validation_every_second_epoch_counts_validations_only() -> None:
    losses = {2: 1.0, 4: 0.9, 6: 0.95, 8: 0.97}

    def evaluate(state: Any, batch: Any) -> Any:
        return {"loss": EVAL(state, batch)["loss"]._replace(total=8 * losses[state.epoch])}

    reports = [
        report
        for _, report in loop(
            valid=lambda *_: BATCHES[:1], eval_step=evaluate, validate_every=2, max_epochs=9, patience=2
        )
    ]
    assert [bool(report.valid) for report in reports] == [False, True] * 4
    assert [report.best.epoch for report in reports] == [None, 2, 2, 4, 4, 4, 4, 4]
    assert reports[-1].stop == "patience"
    assert [report.stop for report in reports[:-1]] == [None] * 7
    with pytest.raises(ValueError, match="validate_every of at least 1"):
        loop(validate_every=0)


def _fails(state: Any, batch: Any) -> Any:
    raise MemoryError("in validation")


def test_an_error_in_validation_does_not_cost_the_epoch() -> None:
    epochs = loop(valid=source, eval_step=_fails)
    state, report = next(epochs)
    expected, _ = epoch_fn(start(), BATCHES, step=partial(STEP, lr=0.1))
    assert state_digest(state) == state_digest(expected)
    assert (report.epoch, report.valid, report.is_best) == (1, {}, False)
    with pytest.raises(MemoryError, match="in validation"):
        next(epochs)
    with pytest.raises(MemoryError, match="in validation"):
        next(loop(valid=source, eval_step=_fails, keep_unvalidated=False))

    def fails_later(key: Key, epoch: int, start: int) -> list[Tensor]:
        return BATCHES if epoch == 0 else _fails(None, None)

    epochs = loop(train=fails_later, valid=source, eval_step=EVAL)
    assert next(epochs)[1].valid
    with pytest.raises(MemoryError):  # in the training: the epoch before is not yielded again
        next(epochs)


def test_what_is_trained_is_handed_over_before_the_validation() -> None:
    trained = []
    options: dict[str, Any] = {"train": source, "step": STEP, "learning_rate": 0.1, "valid": source}
    with pytest.raises(MemoryError):
        run_epoch(start(), **options, eval_step=_fails, on_trained=lambda *pair: trained.append(pair))
    [(state, report)] = trained
    assert (state.epoch, state.step, report.epoch, report.valid) == (1, 5, 1, {})


def test_a_source_that_ignores_where_to_start_is_found_out() -> None:
    *_, (state, _) = train_steps(start(), BATCHES[:2], step=partial(STEP, lr=0.1))
    with pytest.raises(ValueError, match=r"Expected the last 3 of the 5 batches of epoch 1.*Received: 5 batches"):
        next(loop(state, train=lambda key, epoch, start: BATCHES))
    with pytest.raises(ValueError, match=r"Expected a state within the 1 batch of epoch 1. Received: one after 2"):
        next(loop(state, train=lambda key, epoch, start: BATCHES[:1]))
    resumed, _ = next(loop(state))
    assert resumed.step == 5


ALL = [torch.full((2,), float(number)) for number in range(4)]


class Unsized(list[Any]):
    def __len__(self) -> int:
        raise TypeError("of an IterableDataset")


def generated(values: Iterable[Any]) -> Iterator[Any]:
    yield from values


@pytest.mark.parametrize(
    ("made", "refused"),
    [
        (lambda start: ALL[start:], None),
        (lambda start: ALL, r"Expected the last 2 of the 4 batches of epoch 3, since 2 are done. Received: 4 batches"),
        (lambda start: ALL[start:3] if start else ALL, "Received: 1 batch"),
        (lambda start: ALL[:1], "Expected a state within the 1 batch of epoch 3. Received: one after 2"),
        (lambda start: ALL[:2][start:], None),  # none left
        (lambda start: Unsized(ALL), None),  # nothing is known of it
        (lambda start: iter(ALL), None),
        (lambda start: generated(ALL[start:]), None),
        (
            lambda start: generated(ALL),
            "from batch 3 on. Received: them from the first on",
        ),
        (lambda start: generated([{"x": x, "more": (x,)} for x in ALL]), "Received: them from the first on"),
        (lambda start: generated(ALL[:1] * 4), None),  # they are all alike
        (lambda start: generated([each.tolist() for each in ALL]), None),  # not tensors: cheap to compare, or not
        (lambda start: generated(ALL[:2][start:]), None),
        (lambda start: ALL[start:] if start else generated(ALL), None),
        (lambda start: generated(ALL[start:]) if start else ALL, None),
    ],
)
def test_what_a_source_gives_is_what_is_trained_unless_it_plainly_ignores_where_to_start(made, refused):
    def source(key: Key, epoch: int, start: int) -> Any:
        asked.append((key, epoch, start))
        return made(start)

    asked: list[Any] = []
    if refused is None:
        given, expected = checked_batches(source, Key(7), 2, 2), list(made(2))
        assert list(map(str, given)) == list(map(str, expected))
    else:
        with pytest.raises(ValueError, match=refused):
            checked_batches(source, Key(7), 2, 2)
    assert set(asked) <= {(Key(7), 2, 2), (Key(7), 2, 0)}
    asked.clear()
    assert len(list(checked_batches(source, Key(7), 2, 0))) == len(list(made(0)))
    assert asked == [(Key(7), 2, 0)]  # once: it may read the disk
    with pytest.raises(TypeError, match=r"Expected a source train that returns batches. Received: int"):
        checked_batches(lambda *_: 3, Key(7), 2, 0)  # type: ignore[arg-type,return-value]


def test_a_rate_by_steps_is_that_of_each_step() -> None:
    rates = []

    def step(state: Any, batch: Any, *, lr: float) -> Any:
        rates.append(lr)
        return STEP(state, batch, lr=lr)

    schedule = per_step(warm_up(constant(0.1), length=9))
    reports = [report for _, report in loop(step=step, learning_rate=schedule, max_epochs=2)]
    assert rates == pytest.approx([0.1 * min((number + 1) / 10, 1) for number in range(10)])
    assert [report.learning_rate for report in reports] == [rates[4], rates[9]]
    _, report = next(loop(learning_rate=per_step(lambda step: [0.2, 0.1, 0.4, 0.25, 0.3][step]), max_epochs=1))
    assert (report.learning_rate_min, report.learning_rate, report.learning_rate_max) == (0.1, 0.3, 0.4)


def test_a_rate_by_steps_resumes_exactly() -> None:
    options: dict[str, Any] = {"learning_rate": per_step(warm_up(constant(0.1), length=9)), "max_epochs": 2}
    states: list[Any] = []
    *_, (whole, _) = loop(on_batch=lambda state, _: states.append(state), **options)
    for state in states:
        ends = [final for final, _ in loop(state, **options)]
        assert state_digest(ends[-1]) == state_digest(whole)


def test_a_rate_by_steps_trains_an_ensemble() -> None:
    model = torch.nn.Linear(4, 1)
    loss_fn = module_loss(model, lambda model, x: ((model(x) - 1).square().mean(), len(x)))
    schedule = per_step(warm_up(constant(0.1), length=9))
    (ensemble, report), *_ = train_and_validate_ensemble(
        stack_states([init_state(model, sgd(), seed=0)] * 2),
        train=source,
        step=partial(ensemble_step_of, loss_fn=loss_fn, optimizer=sgd()),
        learning_rate=[schedule, 0.0],
        max_epochs=1,
    )
    state, own = run_epoch(
        init_state(model, sgd(), seed=0),
        train=source,
        step=partial(train_step, loss_fn=loss_fn, optimizer=sgd()),
        learning_rate=schedule,
    )
    torch.testing.assert_close(ensemble.params["weight"][0], state.params["weight"])
    assert torch.equal(ensemble.params["weight"][1], model.weight)
    assert [member.learning_rate for member in report.members.values()] == [own.learning_rate, 0.0]


@pytest.mark.parametrize(
    "learning_rate",
    [np.float32(0.25), torch.tensor(0.25), lambda _: np.float32(0.25), lambda _: torch.tensor(0.25)],
)
def test_a_rate_of_numpy_or_a_tensor_is_a_number(learning_rate: Any) -> None:
    _, report = next(loop(learning_rate=learning_rate))
    assert type(report.learning_rate) is float
    assert report.learning_rate == 0.25


@pytest.mark.parametrize(
    ("step", "named"),
    [
        (lambda state, batch, lr: state, r"Expected a step that returns \(state, metrics\)"),
        (lambda state, batch, lr: (state, {}, 1), r"Expected a step that returns .* Received: tuple"),
        (lambda state, batch, lr: (None, {}), r"Expected a step that returns \(state, metrics\)"),
        (lambda state, batch, lr: (state, None), r"Expected a step that returns \(state, metrics\)"),
        (
            lambda state, batch, lr: (state, {}),
            "the state after batch 1 of epoch 1",
        ),
    ],
)
def test_the_contract_of_a_step_is_checked(step: Any, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        next(loop(step=step))


def test_one_rate_is_reported_for_an_epoch_whose_rate_is_the_same_at_each_step() -> None:
    assert epoch_rates(0.1, first_step=5, step=9, epoch=1, plateau=Plateau()) == [0.1]
    by_step = epoch_rates(per_step(float), first_step=5, step=9, epoch=1, plateau=Plateau())
    assert by_step == [5.0, 6.0, 7.0, 8.0]
    validated = [Validation(1, {}, 0.5), Validation(2, {}, 0.25)]
    follows = reduce_on_plateau(per_step(float))
    position: dict[str, Any] = {"first_step": 5, "step": 9, "epoch": 0, "plateau": Plateau()}
    assert epoch_rates(follows, validations=validated, **position) == [0.5, 0.25, 7.0, 8.0]
