"""Claims about checked steps: flipped bits in what is computed never reach the state, correct steps are unchanged."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from experiment_cases import CONFIG, PHANTOM, latest_digest, trained
from torch import Tensor

from dwiml_func import adam, init_state, jit_step, module_loss, train_step, value_and_grad
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.core.checked_step import StepMismatchError, checked_step
from dwiml_func.experiment.config import CheckpointConfig
from dwiml_func.experiment.folder import create_experiment
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.types import Sum

MODEL = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
NUM_FLIPS = 40
BATCH = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


def flipped(tensor: Tensor, draws: random.Random) -> Tensor:
    """One bit of one value is another one."""
    result = tensor.detach().clone()
    bits = result.view(torch.int32).view(-1)
    bits[draws.randrange(len(bits))] ^= draws.choice([1 << bit for bit in range(31)] + [-(1 << 31)])
    return result


class Faulty:
    """A step that computes with a flipped bit at its calls number `faults`; `place` is where."""

    def __init__(self, place: str, draws: random.Random, faults: tuple[int, ...]) -> None:
        self.place, self.draws, self.faults, self.calls = place, draws, faults, -1
        self.loss_fn = module_loss(MODEL, self.loss)
        self(init_state(MODEL, adam(), seed=0), BATCH, lr=0.01)  # a loss function is tried at its first use

    def loss(self, model: Any, x: Tensor) -> Any:
        hidden = torch.tanh(model[0](x))
        if self.calls in self.faults and self.place == "activation":
            hidden = hidden + (flipped(hidden, self.draws) - hidden).detach()
        return model[2](hidden).square().mean(), len(x)

    def __call__(self, state: Any, batch: Tensor, *, lr: float) -> Any:
        self.calls += 1
        is_faulty, optimizer = self.calls in self.faults, adam()

        def gradient(*arguments: Any, **options: Any) -> Any:
            out, grads = value_and_grad(*arguments, **options)
            if is_faulty and self.place == "gradient":
                name = self.draws.choice(sorted(grads))
                grads = {**grads, name: flipped(grads[name], self.draws)}
            return out, grads

        bound = {"loss_fn": self.loss_fn, "gradient_fn": gradient, "non_finite": "defer"}
        new, metrics = train_step(state, batch, optimizer=optimizer, lr=lr, donate=True, **bound)
        if is_faulty and self.place == "optimizer state":
            part = self.draws.choice(("exp_avg", "exp_avg_sq"))
            name = self.draws.choice(sorted(new.opt_state[part]))
            tensors = {**new.opt_state[part], name: flipped(new.opt_state[part][name], self.draws)}
            new = new.replace(opt_state={**new.opt_state, part: tensors})
        return new, metrics


def trained_state(step: Any, num_steps: int = 3) -> str:
    state = init_state(MODEL, adam(), seed=0)
    for _ in range(num_steps):
        state, _ = step(state, BATCH, lr=0.01)
    return state_digest(state)


@pytest.mark.parametrize("place", ["activation", "gradient", "optimizer state"])
def test_no_flipped_bit_of_a_checked_step_reaches_the_state(place, caplog):
    draws = random.Random(place)
    clean = trained_state(Faulty(place, draws, ()))
    found = 0
    for number in range(NUM_FLIPS):
        caplog.clear()
        step = Faulty(place, draws, (1 + number % 6,))  # of three steps, each computed twice
        assert trained_state(checked_step(step, every=1)) == clean
        if caplog.records:
            assert step.calls == 8
            assert "Two computations of epoch 1, batch " in caplog.text
            found += 1
        else:
            assert step.calls == 6  # rounding took the flipped bit away
    assert found > (0.6 if place == "activation" else 0.9) * NUM_FLIPS


def test_a_difference_that_comes_again_stops_with_the_state_kept():
    state = init_state(MODEL, adam(), seed=0)
    before = state_digest(state)
    step = checked_step(Faulty("optimizer state", random.Random(1), (1, 3)), every=1)
    expected = r"epoch 1, batch 1 \(step 1\) differ in opt_state/exp_avg\w*/[02]\.(weight|bias), twice in a row"
    with pytest.raises(StepMismatchError, match=expected):
        step(state, BATCH, lr=0.01)
    assert state_digest(state) == before
    step(state, BATCH, lr=0.01)


def test_only_every_nth_step_is_computed_twice():
    step = Faulty("optimizer state", random.Random(1), ())
    trained_state(checked_step(step, every=4), num_steps=9)
    assert step.calls == 9 + 3  # the first, the fifth and the ninth
    later = init_state(MODEL, adam(), seed=0).replace(epoch=1, batch=1, step=4)  # the fifth of the run
    checked_step(step, every=4)(later, BATCH, lr=0.01)
    assert step.calls == 9 + 3 + 2
    with pytest.raises(ValueError, match="Expected to check every step, or every so many"):
        checked_step(step, every=0)


def test_a_nan_equals_itself_and_a_compiled_step_can_be_checked():
    state = init_state(MODEL, adam(), seed=0)
    loss_fn = module_loss(MODEL, lambda model, x: (model(x).square().mean() * torch.nan, len(x)))
    step = partial(train_step, loss_fn=loss_fn, optimizer=adam(), non_finite="defer")
    checked_step(step, every=1)(state, BATCH, lr=0.01)
    loss_fn = module_loss(MODEL, lambda model, x: (model(x).square().mean(), len(x)))
    compiled = jit_step(loss_fn=loss_fn, optimizer=adam(), donate=True)
    assert trained_state(checked_step(compiled, every=1)) == trained_state(compiled)


def test_runs_and_ensembles_with_checked_steps_have_the_same_bits(cli, tmp_path):
    checked = replace(CONFIG, checkpoints=CheckpointConfig(check_every=2))
    assert latest_digest(trained(tmp_path, checked, "checked")) == latest_digest(trained(tmp_path, CONFIG, "plain"))
    for name, options in (("two", ()), ("two_checked", ("--check-every", "1"))):
        small = ("--rnn-layer-sizes", "8", "--max-epochs", "1", "--num-models", "2", "--skip-figures", *options)
        assert cli("train", tmp_path, name, PHANTOM, *small).code == 0
    assert latest_digest(tmp_path / "two" / "1") == latest_digest(tmp_path / "two_checked" / "1")


def test_a_run_that_stops_saves_the_state_before_the_step_and_resumes_to_the_same_end(cli, tmp_path):
    config = replace(CONFIG, checkpoints=CheckpointConfig(check_every=1))
    parts, calls = prepare(config), 0
    directory = create_experiment(tmp_path, "run", config)

    def faulty(state: Any, batch: Any, *, lr: float) -> Any:
        nonlocal calls
        new, metrics = correct(state, batch, lr=lr)
        if (state.epoch, state.batch) == (1, 1):
            calls += 1
            new = new.replace(buffers={**new.buffers, "fault": torch.tensor(float(calls))})
        return new, metrics

    correct = prepare(CONFIG).step
    expected = r"epoch 2, batch 2 \(step \d\) differ in buffers/fault, twice in a row"
    with pytest.raises(StepMismatchError, match=expected):
        list(run_experiment(directory, replace(parts, step=checked_step(faulty, 1))))
    assert calls == 4
    assert cli("resume", tmp_path, "run").code == 0
    assert latest_digest(directory) == latest_digest(trained(tmp_path, CONFIG, "plain"))


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ({"mean": torch.ones(2)}, {"mean": torch.ones(2)}, None),
        ({"mean": torch.tensor([math.nan, 0.0])}, {"mean": torch.tensor([math.nan, 0.0])}, None),
        ({"mean": torch.zeros(2)}, {"mean": -torch.zeros(2)}, "buffers/mean"),
        ({"mean": torch.ones(2)}, {"mean": torch.ones(2, 1)}, "buffers/mean"),
        ({"mean": torch.zeros(2)}, {"mean": torch.zeros(2, dtype=torch.float64)}, "buffers/mean"),
        ({"mean": torch.ones(2)}, {"mean": torch.ones(2), "more": torch.ones(1)}, "which tensors there are"),
        ({"mean": torch.ones(2), "b": torch.ones(())}, {"mean": torch.ones(2), "b": torch.zeros(())}, "buffers/b"),
    ],
)
def test_results_differ_in_any_bit_shape_dtype_or_name(one, other, told):
    state, results = init_state(torch.nn.Linear(1, 1), adam(), seed=0), iter((one, other) * 2)
    step = checked_step(lambda state, batch, *, lr: (state.replace(buffers=next(results)), {}), every=1)
    if told is None:
        assert step(state, None, lr=0.1)[0].buffers is one
    else:
        with pytest.raises(StepMismatchError, match=rf"differ in {told}, twice in a row"):
            step(state, None, lr=0.1)


@pytest.mark.parametrize("place", ["metrics/loss/0", "buffers/mean"])
def test_metrics_and_buffers_are_compared_too(place):
    values = iter(range(9))

    def step(state: Any, batch: Any, *, lr: float) -> Any:
        value = float(next(values))
        loss, mean = (value, 0.0) if place.startswith("metrics") else (0.0, value)
        new = state.replace(step=state.step + 1, batch=state.batch + 1, buffers={"mean": torch.tensor(mean)})
        return new, {"loss": Sum(loss, 1.0)}

    with pytest.raises(StepMismatchError, match=rf"differ in {place}, twice in a row"):
        checked_step(step, every=1)(init_state(torch.nn.Linear(1, 1), adam(), seed=0), None, lr=0.1)
