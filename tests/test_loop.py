"""Claims about `dwiml_func.core.loop`: right numbers, right ends, and resuming anywhere gives the same bytes."""

import math
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.loop import train_and_validate
from dwiml_func.core.loss import LossOut, module_loss
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.report import EpochReport
from dwiml_func.core.rng import Key, Stream, fold_in, numpy_rng, torch_rng
from dwiml_func.core.run_epoch import Interrupted
from dwiml_func.core.state import TrainState, init_state
from dwiml_func.core.step import eval_step, train_step
from dwiml_func.optim.optimizers import adam, sgd
from dwiml_func.optim.schedules import per_epoch, per_step, reduce_on_plateau

with torch_rng(Key(12)):
    DATA = torch.randn(23, 3)
    VALID_DATA = torch.randn(11, 3)
BATCH_SIZE = 7  # 4 batches an epoch, the last one of 2


def model() -> nn.Module:
    with torch_rng(Key(11)):
        return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3))


def reconstruction(model: nn.Module, x: Tensor):
    return (model(x) - x).square().mean(), len(x)


LOSS = module_loss(model(), reconstruction)
STEP = partial(train_step, loss_fn=LOSS, optimizer=adam(), clip_grad=1.0)
EVALUATE = partial(eval_step, loss_fn=LOSS)


def train_batches(key: Key, epoch: int, start_batch: int) -> Iterator[Tensor]:
    order = torch.from_numpy(numpy_rng(fold_in(key, Stream.TRAIN_PLAN, epoch)).permutation(len(DATA)))
    return iter(DATA[order].split(BATCH_SIZE)[start_batch:])


def valid_batches(key: Key, epoch: int, start_batch: int, size: int = 4) -> Iterator[Tensor]:
    order = torch.from_numpy(numpy_rng(fold_in(key, Stream.VALID_PLAN, epoch)).permutation(len(VALID_DATA)))
    return iter(VALID_DATA[order].split(size)[start_batch:])


def first_state() -> TrainState:
    return init_state(model(), adam(), seed=5)


def loop(state: TrainState, **changes: Any) -> Iterator[tuple[TrainState, EpochReport]]:
    options: dict[str, Any] = {
        "train": train_batches,
        "step": STEP,
        "valid": valid_batches,
        "eval_step": EVALUATE,
        "learning_rate": per_epoch([0.05, 0.02, 0.01]),
        "max_epochs": 4,
        "clock": lambda: 0.0,
    }
    return train_and_validate(state, **options | changes)


def scripted(losses: list[float], valid: list[float] | None = None) -> dict[str, Any]:
    """Options of a loop of one batch an epoch whose losses are the given ones."""

    def loss_fn(params, buffers, batch, *, key, train):
        zero = params["weight"].sum() - params["weight"].sum().detach()
        return LossOut(zero + batch, 1, buffers, {})

    def batches(values: list[float]):
        return lambda key, epoch, start: [torch.tensor(values[epoch], dtype=torch.float64)]

    return {
        "train": batches(losses),
        "valid": None if valid is None else batches(valid),
        "step": partial(train_step, loss_fn=loss_fn, optimizer=sgd()),
        "eval_step": None if valid is None else partial(eval_step, loss_fn=loss_fn),
        "learning_rate": 0.1,
        "max_epochs": len(losses),
    }


TWO_COUNTS: Any = math.pow  # a function of two numbers


def scripted_state() -> TrainState:
    return init_state(nn.Linear(1, 1, bias=False, dtype=torch.float64), sgd(), seed=0)


# Resuming


def copied(state: TrainState) -> TrainState:
    """A state in separate memory, as a restored checkpoint is."""
    opt_state = {kind: {name: t.clone() for name, t in tensors.items()} for kind, tensors in state.opt_state.items()}
    return state.replace(
        params={name: t.clone() for name, t in state.params.items()},
        buffers={name: t.clone() for name, t in state.buffers.items()},
        opt_state=opt_state,
        sums=dict(state.sums),
        best=Best(*state.best),
    )


def trace(state: TrainState, **options: Any) -> tuple[list[tuple], list[TrainState]]:
    """All that can be seen of a run, in order, and the state before each of these elements."""
    elements: list[tuple] = []
    states = [copied(state)]

    def note(state: TrainState, *rest: object) -> None:
        elements.append((type(rest[0]).__name__, state_digest(state), *rest))
        states.append(copied(state))

    for after, report in loop(state, on_batch=note, **options):
        note(after, replace(report, timed_points=None))  # where a run was resumed is no matter of its numbers
    return elements, states


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("validates", [True, False])
def test_a_run_restored_before_any_element_goes_on_as_if_it_had_not_stopped(validates, donate):
    options: dict[str, Any] = {"step": partial(STEP, donate=donate)}
    if not validates:
        options |= {"valid": None, "eval_step": None}
    elements, states = trace(first_state(), **options)
    assert [kind for kind, *_ in elements] == (["dict"] * 4 + ["EpochReport"]) * 4  # 4 batches and a report an epoch
    for index, state in enumerate(states):
        suffix, _ = trace(state, **options)
        assert suffix == elements[index:], f"restored before element {index}"


def test_donation_does_not_change_a_run():
    assert trace(first_state(), step=partial(STEP, donate=True))[0] == trace(first_state())[0]


def test_a_run_resumed_with_more_epochs_is_the_longer_run():
    whole = [(state_digest(state), replace(report, stop=None)) for state, report in loop(first_state())]
    *_, (half, report) = loop(first_state(), max_epochs=2)
    assert report.stop == "max_epochs"
    rest = [(state_digest(state), replace(report, stop=None)) for state, report in loop(half)]
    assert rest == whole[2:]


def interrupting(number: int) -> Any:
    calls = iter(range(1, 1000))
    return lambda: next(calls) == number


def test_interrupt_is_asked_after_each_batch_and_the_state_is_that_of_the_last_training_batch():
    whole = [(state_digest(state), report) for state, report in loop(first_state(), max_epochs=2)]
    positions = []
    for number in range(1, 15):  # 4 training and 3 validation batches an epoch
        seen, noted = [], []
        options = {"interrupt": interrupting(number), "on_batch": lambda state, _, noted=noted: noted.append(state)}
        with pytest.raises(Interrupted) as raised:
            seen.extend(loop(first_state(), max_epochs=2, **options))
        state = raised.value.state
        assert noted[-1] is state
        assert str(raised.value) == f"after batch {state.batch} of epoch {state.epoch + 1}"
        positions.append((state.epoch, state.batch))
        taken = []
        rest = loop(
            state, max_epochs=2, on_batch=lambda state, _, taken=taken: taken.append((state.epoch, state.batch))
        )
        ends = [(state_digest(state), replace(report, timed_points=None)) for state, report in rest]
        assert ends == whole[len(seen) :]
        assert positions[-1] not in taken  # no batch is trained twice
    assert positions == [(epoch, batch) for epoch in (0, 1) for batch in (1, 2, 3, 4, 4, 4, 4)]
    assert len(list(loop(first_state(), max_epochs=2, interrupt=lambda: False))) == 2


def test_track_is_given_every_part_of_an_epoch_and_its_batches_are_those_that_are_used():
    parts: list[tuple] = []

    def track(batches, label, *, epoch, start_batch):
        parts.append((label, epoch, start_batch))
        return batches

    plain = [state_digest(state) for state, _ in loop(first_state(), max_epochs=2)]
    assert [state_digest(state) for state, _ in loop(first_state(), max_epochs=2, track=track)] == plain
    assert parts == [(label, epoch, 0) for epoch in (0, 1) for label in ("training", "validation")]
    nothing = loop(first_state(), track=lambda batches, label, **position: [])
    with pytest.raises(ValueError, match="has no batch"):
        next(nothing)


def test_a_generator_that_ignores_where_it_should_start_is_refused() -> None:
    middle = first_state().replace(batch=2)
    sources = {"all": lambda *_: (b for b in DATA.split(4)), "equal": lambda *_: (b * 0 for b in DATA.split(4))}
    with pytest.raises(ValueError, match=r"from batch 3 on. Received: them from the first on"):
        next(loop(middle, train=sources["all"]))
    next(loop(middle, train=sources["equal"]))  # cannot be told
    next(loop(middle, train=lambda key, epoch, start: (b for b in DATA.split(4)[start:])))


def test_a_loop_is_no_graph_of_all_its_epochs() -> None:
    state = first_state()
    state = state.replace(params={name: torch.nn.Parameter(p) for name, p in state.params.items()})
    with pytest.raises(ValueError, match="require no gradient: all epochs would be one graph"):
        next(loop(state))


# Validation


@pytest.mark.parametrize(
    "valid",
    [
        None,
        partial(valid_batches, size=1),
        partial(valid_batches, size=11),
        lambda key, epoch, start: list(valid_batches(key, epoch, start))[:1],
        lambda key, epoch, start: [],
        lambda key, epoch, start: (torch.rand(2, 3) for _ in range(3)),  # draws from the global generator
    ],
    ids=["left out", "size 1", "size 11", "capped", "empty", "drawing"],
)
def test_validation_cannot_touch_training(valid):
    def run(**options: Any):
        batches: list[tuple] = []

        def note(state, metrics):
            batches.append((tuple(tensor.sum().item() for tensor in state.params.values()), metrics))

        torch.manual_seed(0)
        *_, (state, _) = loop(first_state(), on_batch=note, **options)
        return batches, state_digest(state.replace(best=Best()))

    options = {"valid": valid, "eval_step": None if valid is None else EVALUATE}
    assert run(**options) == run()


def test_validation_and_training_are_asked_for_their_epochs_with_the_root_key():
    asked = []

    def train(key, epoch, start_batch):
        asked.append(("train", key, epoch, start_batch))
        return train_batches(key, epoch, start_batch)

    def valid(key, epoch, start_batch):
        asked.append(("valid", key, epoch, start_batch))
        return valid_batches(key, epoch, start_batch)

    captured: list[TrainState] = []
    list(loop(first_state(), train=train, valid=valid, max_epochs=2, on_batch=lambda s, _: captured.append(s)))
    expected = [(who, Key(5), epoch, 0) for epoch in range(2) for who in ("train", "valid")]
    assert asked == expected
    asked.clear()
    list(loop(captured[5], train=train, valid=valid, max_epochs=2))  # from the second epoch, after two batches
    assert asked == [("train", Key(5), 1, 2), ("valid", Key(5), 1, 0)]


def test_validation_sees_the_parameters_after_the_epoch_s_training():
    for state, report in loop(first_state(), max_epochs=2):
        net = model().eval()
        net.load_state_dict({**state.params, **state.buffers})
        with torch.no_grad():
            errors = (net(VALID_DATA) - VALID_DATA).double().square()
        assert report.valid["loss"] == pytest.approx(errors.mean().item(), rel=1e-6)


# Reports


def test_a_report_has_the_weighted_means_of_the_epoch():
    totals: list[dict] = []
    for _, report in loop(first_state(), on_batch=lambda _, metrics: totals.append(metrics)):
        weights = [metrics["loss"].weight for metrics in totals]
        assert weights == [7, 7, 7, 2]
        per_batch = [metrics["loss"].total / metrics["loss"].weight for metrics in totals]
        closed_form = float(np.average(np.array(per_batch, dtype=np.float64), weights=weights))
        assert report.train["loss"] == pytest.approx(closed_form, rel=1e-13)
        assert report.train["loss"] != pytest.approx(float(np.mean(per_batch)), rel=1e-6)
        norms = [metrics["unclipped_grad_norm"].total for metrics in totals]
        assert report.train["unclipped_grad_norm"] == pytest.approx(float(np.mean(norms)), rel=1e-13)
        assert report.train["grad_norm"] <= 1.0 + 1e-6
        assert (report.num_batches, report.num_points) == (4, 23)
        totals.clear()


def test_a_report_tells_epoch_learning_rate_best_and_stop():
    valid = [3.0, 1.0, 2.0, 0.5]
    rates = iter([0.1, 0.01, 0.01, 0.001])
    seen = []

    def schedule(epoch: int) -> float:
        seen.append(epoch)
        return next(rates)

    reports = [
        report for _, report in loop(scripted_state(), **scripted([9.0] * 4, valid) | {"learning_rate": schedule})
    ]
    assert seen == [0, 1, 2, 3]
    assert [report.epoch for report in reports] == [1, 2, 3, 4]
    assert [report.learning_rate for report in reports] == [0.1, 0.01, 0.01, 0.001]
    assert [report.train["loss"] for report in reports] == [9.0] * 4
    assert [report.valid for report in reports] == [{"loss": value} for value in valid]
    assert [report.monitored for report in reports] == valid
    assert [report.best for report in reports] == [Best(3.0, 1), Best(1.0, 2), Best(1.0, 2, 1), Best(0.5, 4)]
    assert [report.is_best for report in reports] == [True, True, False, True]
    assert [report.stop for report in reports] == [None, None, None, "max_epochs"]


def test_the_learning_rate_of_an_epoch_reaches_its_steps():
    used = []

    def step(state, batch, *, lr):
        used.append(lr)
        return STEP(state, batch, lr=lr)

    list(loop(first_state(), step=step))
    assert used == [0.05] * 4 + [0.02] * 4 + [0.01] * 8


def test_the_clock_is_read_around_training_and_validation():
    ticks = iter([0.0, 60.0, 90.0, 100.0, 160.0, 280.0])
    reports = [report for _, report in loop(first_state(), max_epochs=2, clock=lambda: next(ticks))]
    assert [(report.train_minutes, report.valid_minutes) for report in reports] == [(1.0, 0.5), (1.0, 2.0)]
    assert next(ticks, None) is None


def test_a_validation_within_an_epoch_does_not_count_as_training_time():
    now = 0.0

    def takes(seconds, step):
        def timed(*args, **kwargs):
            nonlocal now
            now += seconds
            return step(*args, **kwargs)

        return timed

    options = {"step": takes(60, STEP), "eval_step": takes(30, EVALUATE), "validate_every": "2batches"}
    reports = [report for _, report in loop(first_state(), max_epochs=1, clock=lambda: now, **options)]
    minutes = [(report.batch, report.train_minutes, report.valid_minutes) for report in reports]
    assert minutes == [(2, 2.0, 1.5), (0, 4.0, 3.0)]

    now, calls = 0.0, iter(range(9))

    def fails_later(*args: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise MemoryError
        return EVALUATE(*args, **options)

    options |= {"eval_step": takes(30, fails_later), "step": takes(60, STEP)}
    epochs = loop(first_state(), max_epochs=1, clock=lambda: now, keep_unvalidated=True, **options)
    next(epochs)
    _, unvalidated = next(epochs)
    assert (unvalidated.train_minutes, unvalidated.valid_minutes, unvalidated.valid) == (4.0, 1.5, {})


def test_the_speed_of_an_epoch_counts_the_points_since_the_resume():
    states: list[TrainState] = []
    seconds = {"valid": None, "eval_step": None, "max_epochs": 2}

    def reports(state: TrainState, **options: Any) -> list[EpochReport]:
        clock = iter(range(0, 1000, 6)).__next__
        return [report for _, report in loop(state, clock=clock, **seconds, **options)]

    whole = reports(first_state(), on_batch=lambda state, _: states.append(copied(state)))
    assert [report.points_per_second for report in whole] == [report.num_points / 6 for report in whole]
    within = states[1]
    assert within.batch > 0
    resumed = reports(within)
    left = whole[0].num_points - float(within.sums["loss"].weight)
    assert (resumed[0].num_points, resumed[0].timed_points) == (whole[0].num_points, left)
    assert [report.points_per_second for report in resumed] == [left / 6, whole[1].num_points / 6]
    assert math.isnan(replace(whole[0], train_minutes=0.0).points_per_second)


def test_without_validation_the_training_loss_decides():
    reports = [
        report for _, report in loop(scripted_state(), **scripted([3.0, 1.0, 2.0]) | {"valid": None, "eval_step": None})
    ]
    assert [report.valid for report in reports] == [{}] * 3
    assert [report.monitored for report in reports] == [3.0, 1.0, 2.0]
    assert reports[-1].best == Best(1.0, 2, 1)


def test_a_validation_without_batches_judges_nothing():
    options = scripted([3.0, 1.0, 2.0]) | {"valid": lambda key, epoch, start: [], "eval_step": EVALUATE}
    reports = [report for _, report in loop(scripted_state(), **options, patience=1)]
    assert [report.best for report in reports] == [Best()] * 3
    assert [report.valid for report in reports] == [{}] * 3


def test_a_validation_that_is_not_finite_is_a_bad_epoch_and_no_end():
    valid = [math.nan, math.inf, 2.0, math.nan]
    reports = [report for _, report in loop(scripted_state(), **scripted([1.0] * 4, valid))]
    assert [report.best for report in reports] == [
        Best(math.inf, None, 1),
        Best(math.inf, None, 2),
        Best(2.0, 3),
        Best(2.0, 3, 1),
    ]
    assert [report.is_best for report in reports] == [False, False, True, False]


def test_each_state_holds_the_best_of_its_report():
    for state, report in loop(first_state()):
        assert state.best == report.best
        assert (state.epoch, state.batch, state.sums) == (report.epoch, 0, {})


# Ends


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 4), (3, 8), (4, 9), (None, 9)])
def test_patience_ends_a_run_after_that_many_bad_epochs_in_a_row(patience, epochs):
    valid = [3.0, 2.0, 2.0, 2.5, 1.0, 1.5, math.nan, 1.0, 0.1]
    reports = [report for _, report in loop(scripted_state(), patience=patience, **scripted([1.0] * 9, valid))]
    assert len(reports) == epochs
    assert [report.stop for report in reports[:-1]] == [None] * (epochs - 1)
    assert reports[-1].stop == ("max_epochs" if epochs == 9 else "patience")


def test_patience_is_the_reason_when_both_ends_come_at_once():
    reports = [report for _, report in loop(scripted_state(), patience=1, **scripted([1.0, 1.0]))]
    assert [report.stop for report in reports] == [None, "patience"]


def test_the_patience_delta_is_used():
    losses = [1.0, 0.95, 0.89, 0.5]
    reports = [r for _, r in loop(scripted_state(), patience=5, patience_delta=0.1, **scripted(losses))]
    assert [report.best.epoch for report in reports] == [1, 1, 3, 4]
    reports = [r for _, r in loop(scripted_state(), patience_delta=0.0, **scripted([1.0, 1.0, 0.99]))]
    assert [report.best.epoch for report in reports] == [1, 1, 3]


def test_patience_goes_on_counting_after_a_resume():
    options = scripted([1.0] * 9, [3.0, 4.0, 4.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    *_, (state, report) = loop(scripted_state(), **options | {"max_epochs": 3}, patience=3)
    assert (report.best, report.stop) == (Best(3.0, 1, 2), "max_epochs")
    reports = [report for _, report in loop(state, **options, patience=3)]
    assert [(report.epoch, report.stop) for report in reports] == [(4, "patience")]


def test_a_run_that_has_ended_yields_nothing():
    *_, (done, _) = loop(first_state())
    assert list(loop(done)) == []
    assert list(loop(first_state().replace(best=Best(1.0, 1, 3)), patience=3)) == []


def test_nothing_happens_until_the_loop_is_iterated():
    def train(key, epoch, start_batch):
        raise AssertionError("called too early")

    loop(first_state(), train=train)


def test_a_loop_left_early_has_done_no_more_than_it_yielded():
    epochs = []

    def train(key, epoch, start_batch):
        epochs.append(epoch)
        return train_batches(key, epoch, start_batch)

    for _, report in loop(first_state(), train=train):
        if report.epoch == 2:
            break
    assert epochs == [0, 1]


# Errors


def test_what_is_not_finite_ends_the_run_and_the_last_state_is_whole():
    seen = []
    with pytest.raises(NonFiniteError, match=r"The loss is nan in epoch 3, batch 1 \(step 3\)"):
        seen.extend(state for state, _ in loop(scripted_state(), **scripted([1.0, 0.5, math.nan, 0.1])))
    assert [state.epoch for state in seen] == [1, 2]
    assert all(torch.isfinite(tensor).all() for tensor in seen[-1].params.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 0}, "max_epochs of at least 1. Received: 0"),
        ({"max_epochs": -2}, "max_epochs of at least 1. Received: -2"),
        ({"patience": 0}, "patience of at least 1, or None. Received: 0"),
        ({"patience": -1}, "patience of at least 1, or None. Received: -1"),
        ({"patience_delta": -1e-3}, "patience_delta of at least 0. Received: -0.001"),
        ({"patience_delta": math.nan}, "patience_delta of at least 0. Received: nan"),
        ({"patience_delta": math.inf}, "patience_delta of at least 0. Received: inf"),
        ({"learning_rate": 0.0}, "Expected learning rates that are positive and finite. Received: 0"),
        (
            {"learning_rate": -0.1},
            "that is finite and at least 0. Received: -0.1",
        ),
        ({"learning_rate": math.nan}, "that is finite and at least 0. Received: nan"),
        ({"learning_rate": [0.1, 0.2]}, "Received: [0.1, 0.2]. For the rates of epochs, use per_epoch([...])."),
        ({"max_epochs": 2.5}, "max_epochs of at least 1. Received: 2.5"),
        ({"max_epochs": None}, "max_epochs of at least 1; math.inf trains until patience runs out. Received: None"),
        ({"patience": "3"}, "patience of at least 1, or None. Received: '3'"),
        (
            {"validate_every": None},
            "validate_every of at least 1, or a text such as '500batches'. Received: None",
        ),
        ({"eval_step": None}, "Expected valid and eval_step together. Received only one of them."),
        ({"valid": None}, "Expected valid and eval_step together. Received only one of them."),
    ],
)
def test_a_bad_argument_is_refused_at_the_call(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        loop(first_state(), **options)


@pytest.mark.parametrize(
    "changes", [{"key": 3}, {"best": None}, {"step": -1}, {"epoch": 0.5}, {"params": {"weight": np.ones(2)}}]
)
def test_a_state_that_a_script_has_spoilt_is_refused_at_the_call_and_when_it_is_sent(changes):
    spoilt, name = first_state().replace(**changes), next(iter(changes))
    with pytest.raises(ValueError, match=rf"Expected a state of tensors.* Received: one with another {name}"):
        loop(spoilt)
    epochs: Any = loop(first_state())
    next(epochs)
    with pytest.raises(ValueError, match=rf"Received: one with another {name}"):
        epochs.send(spoilt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": [torch.ones(2)]}, "such as from_loader(lambda: loader). Received: list."),
        ({"valid": [torch.ones(2)]}, "Expected valid: a function (key, epoch, start_batch)"),
        ({"step": train_step}, "Expected step: a function (state, batch, *, lr)"),
        ({"step": lambda state, batch: None}, "(got an unexpected keyword argument 'lr')"),
        ({"eval_step": 3}, "Expected eval_step: a function (state, batch)"),
        ({"on_batch": lambda state: None}, "Expected on_batch: a function (state, sums)"),
        ({"interrupt": True}, "Expected interrupt: a function (). Received: bool."),
        *[
            ({"learning_rate": each}, "Expected learning_rate: a function (count) of the epochs or steps done")
            for each in (TWO_COUNTS, per_step(TWO_COUNTS), reduce_on_plateau(TWO_COUNTS))
        ],
    ],
)
def test_a_function_that_the_loop_could_not_call_is_refused_at_the_call(options, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        loop(first_state(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_step": lambda state, batch: 0.5}, "such as {'loss': Sum(total, weight)}. Received: 0.5"),
        ({"eval_step": lambda state, batch: {"loss": 0.5}}, "Received: {'loss': 0.5}"),
        ({"step": lambda state, batch, lr: (state.replace(batch=state.batch + 1), {})}, "Received: one without"),
    ],
)
def test_a_step_without_sums_is_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        list(loop(first_state(), **options))


@pytest.mark.parametrize("rate", [math.nan, math.inf, -0.1])
def test_a_schedule_that_gives_no_rate_is_refused_before_a_step_is_taken(rate):
    state = first_state()
    before = state_digest(state)
    with pytest.raises(ValueError, match=f"Expected a learning rate .*Received: {rate}"):
        next(loop(state, learning_rate=lambda epoch: rate))
    assert state_digest(state) == before


def test_an_epoch_without_batches_is_refused():
    with pytest.raises(ValueError, match=r"Epoch 1 has no batch\."):
        next(loop(first_state(), train=lambda key, epoch, start: []))


def test_a_report_is_plain_data():
    [(_, report)] = loop(first_state(), max_epochs=1)
    for field in fields(EpochReport):
        value = getattr(report, field.name)
        numbers = value.values() if isinstance(value, dict) else [value]
        assert all(isinstance(number, int | float | str | bool | None | tuple) for number in numbers), field.name
