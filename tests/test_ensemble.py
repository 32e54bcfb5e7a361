"""Claims about ensembles: members equal separate runs, with the same random numbers; who stops stays as it is."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwiml_func.checkpoint.digest import leaf_digest, state_digest, state_leaves
from dwiml_func.core.checked_step import checked_step
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.loop import train_and_validate
from dwiml_func.core.loss import LossOut, module_loss
from dwiml_func.core.metrics import read_means
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.report import EpochReport
from dwiml_func.core.rng import Key, fold_in, numpy_rng, torch_rng
from dwiml_func.core.run_epoch import Interrupted
from dwiml_func.core.state import TrainState, init_state
from dwiml_func.core.step import eval_step, train_step
from dwiml_func.ensemble.loop import EnsembleReport, train_and_validate_ensemble
from dwiml_func.ensemble.state import EnsembleState, member, member_sums, stack_states
from dwiml_func.ensemble.step import ensemble_eval_step, ensemble_step
from dwiml_func.optim import chain, ema, per_step, reduce_on_plateau, skip_not_finite
from dwiml_func.optim.optimizers import adam, adamw, radam, sgd
from dwiml_func.types import Sum

OPTIMIZERS = {"sgd": partial(sgd, momentum=0.9), "adam": adam, "adamw": adamw, "radam": radam}
SEEDS = (3, 4, 5)


def mlp(seed: int) -> nn.Module:
    """In float64. No bias before the batch norm: its gradient would be rounding alone, which Adam makes large."""
    with torch_rng(Key(seed)):
        layers = [nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)]
        return nn.Sequential(*layers).double()


def batches(key: Key, epoch: int, start_batch: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Four batches of 6, 7, 8 and 9 rows, whoever asks."""
    for number in range(start_batch, 4):
        samples = numpy_rng(fold_in(Key(99), epoch, number)).normal(size=(6 + number, 6))
        yield torch.from_numpy(samples[:, :4]), torch.from_numpy(samples[:, 4:])


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int, dict[str, Any]]:
    out = model(batch[0])
    return (out - batch[1]).square().mean(), len(batch[1]), {"size": (out.abs().mean(), 3)}


LOSS = module_loss(mlp(0), squared_error)


def alone(
    state: TrainState, *, optimizer: Any, lr: float, clip_grad: float | None = None, max_epochs: int = 3, **options: Any
) -> tuple[TrainState, list[EpochReport]]:
    """A run of its own, to its end."""
    step = partial(train_step, loss_fn=LOSS, optimizer=optimizer, clip_grad=clip_grad)
    epochs = train_and_validate(
        state,
        train=batches,
        valid=lambda key, epoch, start: batches(key, 1000, start),
        step=step,
        eval_step=partial(eval_step, loss_fn=LOSS),
        learning_rate=lr,
        max_epochs=max_epochs,
        **options,
    )
    states, reports = zip(*epochs, strict=True)
    return states[-1], list(reports)


def together(
    ensemble: EnsembleState,
    *,
    optimizer: Any,
    lr: Any,
    weight_decay: Tensor | None = None,
    clip_grad: float | None = None,
    max_epochs: int = 3,
    **loop: Any,
) -> tuple[EnsembleState, list[EnsembleReport]]:
    """The same runs as an ensemble, to its end."""
    options = {"optimizer": optimizer, "weight_decay": weight_decay, "clip_grad": clip_grad}
    step = partial(ensemble_step, loss_fn=LOSS, **options)
    epochs = train_and_validate_ensemble(
        ensemble,
        train=batches,
        valid=lambda key, epoch, start: batches(key, 1000, start),
        step=step,
        eval_step=partial(ensemble_eval_step, loss_fn=LOSS),
        learning_rate=lr,
        max_epochs=max_epochs,
        **loop,
    )
    ensembles, reports = zip(*epochs, strict=True)
    return ensembles[-1], list(reports)


def starts(seeds: Sequence[int] = SEEDS, optimizer: Any = None) -> list[TrainState]:
    return [init_state(mlp(seed), optimizer or adam(), seed=seed) for seed in seeds]


def assert_close(one: TrainState, other: TrainState, *, rel: float = 1e-10) -> None:
    """Equal numbers; tensors and sums equal up to rounding."""
    assert (one.key, one.step, one.epoch, one.batch) == (other.key, other.step, other.epoch, other.batch)
    assert one.best[1:] == other.best[1:]
    assert one.best.value == pytest.approx(other.best.value, rel=rel)
    leaves, others = state_leaves(one), state_leaves(other)
    assert leaves.keys() == others.keys()
    for name, leaf in leaves.items():
        torch.testing.assert_close(
            leaf, others[name], rtol=rel, atol=rel, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert one.sums.keys() == other.sums.keys()
    for name, pair in one.sums.items():
        assert [float(part) for part in pair] == pytest.approx([float(part) for part in other.sums[name]], rel=rel)


def assert_same_reports(ensemble: Sequence[EnsembleReport], number: int, reports: Sequence[EpochReport]) -> None:
    own = [report.members[number] for report in ensemble if number in report.members]
    assert len(own) == len(reports)
    for one, other in zip(own, reports, strict=True):
        for name in ("epoch", "learning_rate", "num_batches", "num_points", "is_best", "stop"):
            assert getattr(one, name) == getattr(other, name)
        assert one.train == pytest.approx(other.train, rel=1e-10)
        assert one.valid == pytest.approx(other.valid, rel=1e-10)


@pytest.mark.parametrize("clip_grad", [None, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_seeds_are_separate_runs(name, clip_grad):
    optimizer = OPTIMIZERS[name](weight_decay=0.01)
    states = starts(optimizer=optimizer)
    ensemble, reports = together(stack_states(states), optimizer=optimizer, lr=0.02, clip_grad=clip_grad)
    for number, state in enumerate(states):
        end, own = alone(state, optimizer=optimizer, lr=0.02, clip_grad=clip_grad)
        assert_close(member(ensemble, number), end)
        assert_same_reports(reports, number, own)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates_and_weight_decays_are_separate_runs(name):
    make = OPTIMIZERS[name]
    rates, decays = [0.1, 0.01, lambda epoch: 0.05 / (epoch + 1)], [0.0, 0.1, 0.3]
    states, each = starts((3, 3, 3), make()), torch.tensor(decays, dtype=torch.float64)
    ensemble, reports = together(stack_states(states), optimizer=make, lr=rates, weight_decay=each, clip_grad=1.0)
    for number, (state, lr, decay) in enumerate(zip(states, rates, decays, strict=True)):
        end, own = alone(state, optimizer=make(weight_decay=decay), lr=lr, clip_grad=1.0)
        assert_close(member(ensemble, number), end)
        assert_same_reports(reports, number, own)


@pytest.mark.parametrize("clip_grad", [None, 0.1])
def test_parameters_of_several_dtypes_keep_theirs(clip_grad):
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 1)
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.scale

    model, batch = Scaled(), torch.ones(3, 4)
    loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
    options = {"loss_fn": loss_fn, "optimizer": adam(weight_decay=0.1), "clip_grad": clip_grad}
    ensemble = stack_states([init_state(model, adam(), seed=seed) for seed in SEEDS])
    state = init_state(model, adam(), seed=SEEDS[1])
    for _ in range(3):
        ensemble, _ = ensemble_step(ensemble, batch, lr=torch.tensor([0.1, 0.01, 1.0]), **options)
        state, _ = train_step(state, batch, lr=0.01, **options)
    torch.testing.assert_close(member(ensemble, 1).params, state.params)


def test_best_epochs_and_patience_are_each_members_own():
    states, rates = starts(), [0.03, 1e-12, 0.2]
    ensemble, reports = together(stack_states(states), optimizer=adam(), lr=rates, patience=2, max_epochs=9)
    ends = [
        alone(state, optimizer=adam(), lr=lr, patience=2, max_epochs=9) for state, lr in zip(states, rates, strict=True)
    ]
    assert len({len(own) for _, own in ends}) > 1  # they do not all stop together
    assert {own[-1].stop for _, own in ends} == {"patience"}
    for number, (end, own) in enumerate(ends):
        assert_close(member(ensemble, number), end)
        assert_same_reports(reports, number, own)


def test_a_generator_of_batches_that_begins_again_is_refused_in_an_ensemble_too():
    step = partial(ensemble_step, loss_fn=LOSS, optimizer=adam())
    ensemble = stack_states(starts())
    for batch in list(batches(Key(0), 0, 0))[:2]:
        ensemble, _ = step(ensemble, batch, lr=0.03)

    def begins_again(key: Key, epoch: int, start_batch: int) -> Iterable[Any]:
        yield from batches(key, epoch, 0)

    with pytest.raises(ValueError, match="Received: them from the first on"):
        next(
            iter(train_and_validate_ensemble(ensemble, train=begins_again, step=step, learning_rate=0.03, max_epochs=1))
        )


@pytest.mark.parametrize("every", [2, "3batches"])
def test_an_epoch_of_members_is_that_of_separate_runs_with_every_option_of_the_loop(every):
    def always_random(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int, dict[str, Any]]:
        out = nn.functional.dropout(model(batch[0]), 0.2, True)  # in evaluation too
        return (out - batch[1]).square().mean(), len(batch[1]), {"size": (out.abs().mean(), 3)}

    loss_fn, optimizer, now, asked = module_loss(mlp(0), always_random), ema(adam(), 0.5), 0.0, []

    def source(name: str, first_epoch: int) -> Any:
        def batches_of(key: Key, epoch: int, start: int) -> Any:
            asked.append((name, key, epoch, start))
            return batches(key, first_epoch + epoch, start)

        return batches_of

    def takes(seconds: float, function: Any) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return function(*args, **options)

        return partial(timed, loss_fn=loss_fn, optimizer=optimizer)

    def run(loop: Any, step: Any, evaluate: Any, state: Any) -> tuple[Any, list[Any], list[Any]]:
        asked.clear()
        by_step = per_step(lambda step: 0.03 / (1 + step / 50))
        schedule = reduce_on_plateau(by_step, factor=0.5, patience=0, threshold=0.01)
        options = {"monitor": "size", "mode": "max", "validate_every": every, "patience": 2, "patience_delta": 0.01}
        options |= {"train": source("train", 0), "valid": source("valid", 50), "clock": lambda: now}
        options |= {"step": takes(60, step), "eval_step": takes(30, evaluate)}
        epochs = loop(state, learning_rate=schedule, max_epochs=8, **options)
        ends, reports = zip(*epochs, strict=True)
        return ends[-1], list(reports), list(asked)

    batch = next(iter(batches(Key(0), 0, 0)))
    step = partial(train_step, loss_fn=LOSS, optimizer=optimizer, lr=0.03)
    states = [step(state, batch)[0] for state in starts(SEEDS, optimizer)]
    ensemble, together, calls = run(
        train_and_validate_ensemble, ensemble_step, ensemble_eval_step, stack_states(states)
    )
    ends = [run(train_and_validate, train_step, eval_step, state) for state in states]
    assert any(end.plateau.num_reductions for end, *_ in ends)
    for number, (end, reports, own_calls) in enumerate(ends):
        assert_close(member(ensemble, number), end)
        assert member(ensemble, number).plateau[::2] == end.plateau[::2]
        assert member(ensemble, number).validations == () or end.batch
        for other, one in zip(reports, (report.members[number] for report in together), strict=False):
            assert [own.batch for own in one.validations] == [own.batch for own in other.validations]
            for own, validation in zip(one.validations, other.validations, strict=True):
                assert own.means == pytest.approx(validation.means, rel=1e-9)
                assert own.learning_rate == validation.learning_rate
            for name, value in asdict(one).items():
                expected = asdict(other)[name]
                if name == "best":
                    (value, *rest), (expected, *others) = one.best, other.best
                    assert rest == others
                if name == "validations":
                    continue
                is_close = isinstance(expected, float | dict)
                assert value == (pytest.approx(expected, rel=1e-9) if is_close else expected), name
        assert [call[2:] for call in calls[: len(own_calls)]] == [call[2:] for call in own_calls]
    assert {call[1] for call in calls} == {Key(SEEDS[0])}


def test_a_validation_that_was_done_is_not_done_again_after_a_resume_beside_a_member_that_has_stopped():
    def epochs(ensemble: EnsembleState) -> Any:
        return train_and_validate_ensemble(
            ensemble,
            train=batches,
            valid=lambda key, epoch, start: batches(key, 1000, start),
            step=partial(ensemble_step, loss_fn=LOSS, optimizer=adam()),
            eval_step=partial(ensemble_eval_step, loss_fn=LOSS),
            learning_rate=0.02,
            max_epochs=1,
            validate_every="2batches",
        )

    within, report = next(epochs(stack_states(starts(), active=[True, False, True])))
    assert (report.batch, sorted(report.members)) == (2, [0, 2])
    assert [(report.batch, sorted(report.members)) for _, report in epochs(within)] == [(0, [0, 2])]


def test_a_member_that_stopped_early_stays_as_it_is_to_the_byte():
    rates = [0.03, 1e-12, 0.02]
    step = partial(ensemble_step, loss_fn=LOSS, optimizer=adam())
    digests: dict[int, str] = {}
    ensemble = stack_states(starts())
    epochs = train_and_validate_ensemble(
        ensemble, train=batches, step=step, learning_rate=rates, patience=1, max_epochs=6
    )
    for ensemble, report in epochs:
        digests |= {n: state_digest(member(ensemble, n)) for n, own in report.members.items() if own.stop}
        for number, digest in digests.items():
            assert state_digest(member(ensemble, number)) == digest
    assert member(ensemble, 1).epoch < ensemble.epoch


def exploding(params, buffers, batch, *, key, train):
    """Not finite for who has the number 5, from the third batch of the second epoch on."""
    x, y = batch
    loss = (x @ params["w"] - y).square().mean()
    bad = (buffers["count"] >= 6) & (buffers["number"] == 5)
    return LossOut(loss * torch.where(bad, torch.inf, 1.0), len(x), {**buffers, "count": buffers["count"] + 1}, {})


def test_a_member_that_is_not_finite_stays_as_it_was_and_is_named():
    states = [
        TrainState(
            params={"w": torch.full((4, 2), 0.1 * number, dtype=torch.float64)},
            buffers={"number": torch.tensor(number), "count": torch.tensor(0)},
            opt_state={},
            key=Key(number),
        )
        for number in (4, 5, 6)
    ]
    seen = []
    loop: dict[str, Any] = {"train": batches, "learning_rate": 0.01, "max_epochs": 3}
    step = partial(ensemble_step, loss_fn=exploding, optimizer=sgd())
    epochs = train_and_validate_ensemble(
        stack_states(states), step=step, on_batch=lambda ensemble, _: seen.append(ensemble), **loop
    )
    ensembles, reports = zip(*epochs, strict=True)
    ensemble = ensembles[-1]
    assert reports[0].failed == reports[2].failed == {}
    assert "epoch 2, batch 3 (step 7)" in reports[1].failed[1]
    assert [sorted(report.members) for report in reports] == [[0, 1, 2], [0, 2], [0, 2]]
    assert state_digest(member(ensemble, 1)) == state_digest(member(seen[5], 1))

    def run(state: TrainState) -> TrainState:
        step = partial(train_step, loss_fn=exploding, optimizer=sgd())
        last = [state]
        for _, _ in train_and_validate(state, step=step, on_batch=lambda state, _: last.append(state), **loop):
            pass
        return last[-1]

    with pytest.raises(NonFiniteError, match=r"epoch 2, batch 3 \(step 7\)"):
        run(states[1])
    for number in (0, 2):
        end = run(states[number])
        torch.testing.assert_close(member(ensemble, number).params, end.params, rtol=1e-12, atol=0)


@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_a_member_whose_gradient_alone_is_not_finite_takes_no_step(clip_grad):
    def loss_fn(params, buffers, batch, *, key, train):  # the root of zero has an infinite slope
        return LossOut(params["w"].sqrt().sum(), 1, {"count": buffers["count"] + 1}, {})

    states = [
        TrainState(params={"w": torch.tensor([w])}, buffers={"count": torch.tensor(0)}, opt_state={}, key=Key(0))
        for w in (1.0, 0.0)
    ]
    options = {"loss_fn": loss_fn, "optimizer": sgd(), "lr": 0.1, "clip_grad": clip_grad}
    ensemble, metrics = ensemble_step(stack_states(states), None, **options)
    assert ensemble.active.tolist() == [True, False]
    assert member_sums(metrics, 2)[1]["loss"] == (0, 0)
    assert state_digest(member(ensemble, 1)) == state_digest(states[1])
    assert state_digest(member(ensemble, 0)) == state_digest(train_step(states[0], None, **options)[0])
    with pytest.raises(NonFiniteError, match="gradient norm is inf in epoch 1, batch 1"):
        train_step(states[1], None, **options)


def test_a_member_whose_loss_alone_is_not_finite_takes_no_step():
    def loss_fn(params, buffers, batch, *, key, train):
        return LossOut((params["w"] + buffers["offset"]).sum(), 1, buffers, {})

    states = [
        TrainState(params={"w": torch.ones(1)}, buffers={"offset": torch.tensor(off)}, opt_state={}, key=Key(0))
        for off in (1.0, math.inf)
    ]
    ensemble, metrics = ensemble_step(stack_states(states), None, loss_fn=loss_fn, optimizer=sgd(), lr=0.1)
    assert ensemble.active.tolist() == [True, False]
    assert member_sums(metrics, 2)[1]["loss"] == (0, 0)
    assert state_digest(member(ensemble, 1)) == state_digest(states[1])


def test_a_member_whose_loss_alone_is_not_finite_skips_the_step_where_it_may():
    def loss_fn(params, buffers, batch, *, key, train):
        return LossOut((params["w"] + buffers["offset"]).sum(), 1, buffers, {})

    optimizer = chain(skip_not_finite(3), sgd())
    states = [
        TrainState(
            params=(params := {"w": torch.ones(1)}),
            buffers={"offset": torch.tensor(off)},
            opt_state=optimizer.init(params),
            key=Key(0),
        )
        for off in (1.0, math.inf)
    ]
    ensemble, metrics = ensemble_step(stack_states(states), None, loss_fn=loss_fn, optimizer=optimizer, lr=0.5)
    assert ensemble.active.tolist() == [True, True]
    assert ensemble.params["w"].tolist() == [[0.5], [1.0]]
    assert ensemble.opt_state["0"]["skipped"].tolist() == [0, 1]
    assert [sums["skipped"] for sums in member_sums(metrics, 2)] == [(0, 1), (1, 1)]
    stopped = ensemble.replace(active=torch.tensor([False, True]))
    _, metrics = ensemble_step(stopped, None, loss_fn=loss_fn, optimizer=optimizer, lr=0.5)
    assert [sums["skipped"] for sums in member_sums(metrics, 2)] == [(0, 0), (1, 1)]


def test_a_loss_that_is_no_scalar_for_a_later_batch_is_refused():
    def loss_fn(params, buffers, batch, *, key, train):
        return LossOut((params["w"] * batch).mean(0), len(batch), buffers, {})

    state = TrainState(params={"w": torch.ones(1)}, buffers={}, opt_state={}, key=Key(0))
    step = partial(ensemble_step, loss_fn=loss_fn, optimizer=sgd(), lr=0.5)
    ensemble, _ = step(stack_states([state, state]), torch.ones(4)[:, None].mean(1))
    with pytest.raises(ValueError, match=r"Expected a scalar loss, a mean over points. Received: .* \(3,\)"):
        step(ensemble, torch.ones(4, 3))


def test_an_error_of_the_loss_in_its_backward_pass_is_raised_as_it_is():
    calls = []

    class Fails(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output): ...

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Any) -> Any:
            calls.append(0)
            if len(calls) > 1:  # after the trial of the loss
                raise RuntimeError("mine")
            return grad_outputs[0]

    loss_fn = module_loss(mlp(0), lambda model, batch: (Fails.apply(model(batch[0])).square().mean(), 1))
    batch = next(iter(batches(Key(0), 0, 0)))
    with pytest.raises(RuntimeError, match=r"^mine$"):
        ensemble_step(stack_states(starts()), batch, loss_fn=loss_fn, optimizer=adam(), lr=0.1)


def test_an_ensemble_of_members_that_all_failed_ends():
    state = init_state(mlp(0), sgd(), seed=0)
    ensemble = stack_states([state.replace(params={n: p * torch.nan for n, p in state.params.items()})] * 2)
    _, reports = together(ensemble, optimizer=sgd(), lr=0.1)
    assert [sorted(report.failed) for report in reports] == [[0, 1]]
    assert reports[0].members == {}
    ended = stack_states([state.replace(best=Best(1.0, 1, 3))] * 2)
    step = partial(ensemble_step, loss_fn=LOSS, optimizer=sgd())
    loop = partial(train_and_validate_ensemble, train=batches, step=step, learning_rate=0.1, max_epochs=9)
    assert list(loop(ended, patience=3)) == []


@pytest.mark.parametrize("steps", [4, 6], ids=["at an epoch's end", "within an epoch"])
def test_a_member_taken_out_goes_on_as_the_separate_run(steps):
    states = starts()
    run = Stopped(steps)
    with pytest.raises(Stopped):
        together(stack_states(states), optimizer=adam(), lr=0.02, on_batch=run)
    for number, state in enumerate(states):
        taken = member(run.last, number)
        assert taken.step == steps
        resumed, reports = alone(taken, optimizer=adam(), lr=0.02)
        end, own = alone(state, optimizer=adam(), lr=0.02)
        assert_close(resumed, end)
        assert [report.train["loss"] for report in reports] == pytest.approx(
            [report.train["loss"] for report in own[-len(reports) :]], rel=1e-10
        )


class Stopped(Exception):
    """Raises itself after some batches, and has the ensemble then."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, ensemble: EnsembleState, metrics: Any) -> None:
        self.last = ensemble
        if ensemble.step == self.steps:
            raise self


@pytest.mark.parametrize("steps", [4, 6, 11])
def test_an_ensemble_taken_apart_and_put_together_continues_bitwise(steps):
    options: dict[str, Any] = {"optimizer": adam(), "lr": [0.03, 1e-12, 0.02], "patience": 1, "max_epochs": 5}
    whole, _ = together(stack_states(starts()), **options)
    run = Stopped(steps)
    with pytest.raises(Stopped):
        together(stack_states(starts()), on_batch=run, **options)
    members = [member(run.last, number) for number in range(3)]
    again = stack_states(members, active=run.last.active.tolist())
    assert digests(again) == digests(run.last)
    end, _ = together(again, **options)
    assert digests(end) == digests(whole)
    assert not end.active[1]


def test_an_interrupted_ensemble_is_that_after_its_last_training_batch_and_continues_bitwise():
    options: dict[str, Any] = {"optimizer": adam(), "lr": 0.02, "max_epochs": 2}
    whole, _ = together(stack_states(starts()), **options)
    for number, position in ((2, (0, 2)), (7, (0, 4)), (10, (1, 2))):  # 4 training and 4 validation batches an epoch
        calls = iter(range(1, 99))
        with pytest.raises(Interrupted) as stopped:
            together(stack_states(starts()), interrupt=lambda: next(calls) == number, **options)  # noqa: B023
        assert (stopped.value.state.epoch, stopped.value.state.batch) == position
        assert digests(together(stopped.value.state, **options)[0]) == digests(whole)


def digests(ensemble: EnsembleState) -> list[str]:
    return [state_digest(member(ensemble, number)) for number in range(len(ensemble))]


def test_a_step_changes_nothing_that_came_in_and_no_global_state():
    ensemble = stack_states(starts())
    batch = next(iter(batches(Key(0), 0, 0)))
    tensors = [*ensemble.params.values(), *ensemble.buffers.values(), ensemble.active, ensemble.done, *batch]
    tensors += [leaf for by_name in ensemble.opt_state.values() for leaf in by_name.values()]
    before = [(leaf._version, leaf_digest(leaf)) for leaf in tensors]
    random = torch.get_rng_state()
    step = partial(ensemble_step, loss_fn=LOSS, optimizer=adam, lr=torch.tensor([0.1, 0.2, 0.3]), clip_grad=0.1)
    decays = torch.tensor([0.1, 0.2, 0.3])
    one, other = (step(ensemble, batch, weight_decay=decays) for _ in range(2))
    ensemble_eval_step(ensemble, batch, loss_fn=LOSS)
    assert [(leaf._version, leaf_digest(leaf)) for leaf in tensors] == before
    assert torch.equal(torch.get_rng_state(), random)
    assert digests(one[0]) == digests(other[0])
    assert not any(leaf.requires_grad for leaf in state_leaves(member(one[0], 0)).values())


def test_sums_are_each_members_own():
    ensemble = stack_states(starts())
    ensemble = ensemble.replace(active=torch.tensor([True, False, True]))
    batch = next(iter(batches(Key(0), 0, 0)))
    after, metrics = ensemble_step(ensemble, batch, loss_fn=LOSS, optimizer=adam(), lr=0.1)
    sums = member_sums(metrics, 3)
    assert [own["loss"].weight for own in sums] == [6, 0, 6]
    assert [own["size"].weight for own in sums] == [3, 0, 3]
    for number, state in enumerate(starts()):
        _, own = train_step(state, batch, loss_fn=LOSS, optimizer=adam(), lr=0.1)
        if number != 1:
            assert read_means(sums[number]) == pytest.approx(read_means(own), rel=1e-12)
            assert member(after, number).sums == sums[number]
    assert member(after, 1).sums == {}
    assert member(after, 1).step == 0
    assert member(after.replace(sums={"loss": Sum(6.0, 4.0)}), 2).sums == {"loss": Sum(6.0, 4.0)}  # of all


def test_an_ensemble_made_of_its_parts_alone_is_at_its_beginning():
    whole = stack_states([init_state(mlp(0), adam(), seed=0)])
    names = ("params", "buffers", "opt_state", "keys", "active", "done")
    bare = EnsembleState(**{name: getattr(whole, name) for name in names})
    assert (bare.step, bare.epoch, bare.batch) == (0, 0, 0)


def test_members_that_do_not_fit_together_are_refused():
    state = init_state(mlp(0), adam(), seed=0)
    with pytest.raises(ValueError, match="at least one state"):
        stack_states([])
    with pytest.raises(ValueError, match=r"exp_avg/0.weight is missing in member 1, float64 \(8, 4\) on cpu"):
        stack_states([state, init_state(mlp(0), sgd(), seed=0)])
    with pytest.raises(ValueError, match=r"Received: \(0, 0, 0\), \(1, 0, 1\)\."):
        stack_states([state, state.replace(step=1, batch=1)])
    with pytest.raises(ValueError, match="active with 1 values, one for each state"):
        stack_states([state], active=[True, False])
    assert stack_states([state.replace(step=3), state], active=[False, False]).step == 3
    ensemble = stack_states([state, state])
    with pytest.raises(IndexError, match="from 0 to 1"):
        member(ensemble, 2)
    batch = next(iter(batches(Key(0), 0, 0)))
    with pytest.raises(ValueError, match="requires an optimizer factory"):
        ensemble_step(ensemble, batch, loss_fn=LOSS, optimizer=adam(), lr=0.1, weight_decay=torch.zeros(2))
    with pytest.raises(ValueError, match="clipping norm above 0"):
        ensemble_step(ensemble, batch, loss_fn=LOSS, optimizer=adam(), lr=0.1, clip_grad=0.0)
    with pytest.raises(ValueError, match="Expected 2 learning rates, one for each member"):
        together(ensemble, optimizer=adam(), lr=[0.1])
    with pytest.raises(TypeError, match=r"Expected learning_rate: a function \(count\)"):
        together(ensemble, optimizer=adam(), lr=[0.1, lambda epoch, step: 0.1])
    with pytest.raises(ValueError, match="scalar loss"):
        ensemble_step(ensemble, batch, loss_fn=rowwise, optimizer=adam(), lr=0.1)
    with pytest.raises(ValueError, match="depends on the parameters"):
        ensemble_step(ensemble, batch, loss_fn=constant, optimizer=adam(), lr=0.1)


def rowwise(params, buffers, batch, *, key, train):
    return LossOut(params["0.weight"].sum(0), 1, buffers, {})


def constant(params, buffers, batch, *, key, train):
    return LossOut(batch[0].sum(), 1, buffers, {})


def test_a_member_shares_no_memory_with_the_ensemble():
    ensemble = stack_states(starts())
    taken = member(ensemble, 0)
    before = digests(ensemble)
    step = partial(train_step, loss_fn=LOSS, optimizer=adam(), lr=0.1, donate=True)
    step(taken, next(iter(batches(Key(0), 0, 0))))
    assert digests(ensemble) == before


def frozen_encoder(seed: int) -> nn.Module:
    """Members of any seed have one pretrained encoder, and a head and a batch norm of their own."""
    model = mlp(seed)
    weight = model.get_parameter("0.weight").requires_grad_(False)
    weight.copy_(mlp(0).get_parameter("0.weight").detach())
    return model


def test_a_frozen_parameter_is_stored_once_for_all_members():
    loss_fn, make = module_loss(frozen_encoder(0), squared_error), partial(init_state, optimizer=sgd(momentum=0.9))
    states = [make(frozen_encoder(seed), seed=seed) for seed in SEEDS]
    ensemble = stack_states(states)
    step: Any = checked_step(partial(ensemble_step, loss_fn=loss_fn, optimizer=sgd(momentum=0.9)), every=2)  # type: ignore[arg-type]
    for number, batch in enumerate(batches(Key(0), 0, 0)):
        if number == 2:  # one member has stopped
            ensemble = ensemble.replace(active=torch.tensor([True, False, True]))
        ensemble, _ = step(ensemble, batch, lr=torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
        frozen = ensemble.buffers["0.weight"]
        assert frozen.shape == (3, 8, 4)
        assert frozen.untyped_storage().nbytes() == 8 * 4 * 8
        assert frozen.data_ptr() != states[0].buffers["0.weight"].data_ptr()
    again = stack_states([member(ensemble, number) for number in range(3)], active=[True, False, True])
    assert again.buffers["0.weight"].untyped_storage().nbytes() == 8 * 4 * 8
    for state, lr in ((states[0], 0.1), (states[2], 0.3)):
        for batch in batches(Key(0), 0, 0):
            state, _ = train_step(state, batch, loss_fn=loss_fn, optimizer=sgd(momentum=0.9), lr=lr)
        own = member(ensemble, SEEDS.index(state.key.seed))
        torch.testing.assert_close(own.params, state.params, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(own.buffers, state.buffers, rtol=1e-9, atol=1e-12)
