"""Claims about ensemble steps that are replayed: their capture is a call on the CPU, and the real one is marked."""

import copy
import logging
import math
import re
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from experiment_cases import PHANTOM, latest_digest
from graph_recorder import noted, recorded
from test_ensemble import LOSS, SEEDS, batches, mlp
from torch.utils._pytree import tree_leaves

from dwiml_func import init_state, optim
from dwiml_func.compiled.cuda_graphs import OnCuda
from dwiml_func.core.checked_step import checked_step
from dwiml_func.core.rng import Key
from dwiml_func.ensemble import capture_ensemble_step, captured, ensemble_step, stack_states
from dwiml_func.ensemble.captured import GraphGenerators
from dwiml_func.ensemble.state import EnsembleState
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.types import Optimizer

SHAPES = [0, 0, 0, 0, 1, 0, 1, 1, 0, 1, 2]  # of batches, in order
RATES = torch.tensor([0.1, 0.01, 0.03], dtype=torch.float64)


def some_batches(device: str = "cpu") -> list[tuple[torch.Tensor, ...]]:
    all_sizes = [list(batches(Key(1), number, 0)) for number in range(len(SHAPES))]
    return [tuple(part.to(device) for part in all_sizes[n][shape]) for n, shape in enumerate(SHAPES)]


def first_members(optimizer: Any, seeds: Any = SEEDS, device: str = "cpu") -> EnsembleState:
    return stack_states([init_state(mlp(seed), optimizer, seed=seed) for seed in seeds]).to(device)


def take_steps(step: Any, ensemble: EnsembleState, given: Any, rates: Any = RATES, **more: Any) -> EnsembleState:
    for batch in given:
        ensemble, _ = step(ensemble, batch, lr=rates / (1 + ensemble.step), **more)
    return ensemble


def captured_step(max_graphs: int, capture: Any, **options: Any) -> Any:
    step = capture_ensemble_step(loss_fn=LOSS, **options, max_graphs=max_graphs)
    step._replays._capture = capture
    return step


def same(one: EnsembleState, other: EnsembleState) -> bool:
    ours, theirs = tree_leaves(one), tree_leaves(other)
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("rates", [RATES, 0.05])
@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        (optim.radam(), {}),
        (optim.adam, {"weight_decay": torch.tensor([0.0, 0.1, 0.2])}),
        (optim.chain(optim.clip_by_global_norm(0.5), optim.ema(optim.adam(), 0.9)), {}),
        (optim.chain(optim.skip_not_finite(2), optim.sgd(momentum=0.9)), {}),
    ],
)
def test_replays_follow_schedules_dropout_and_buffers_to_the_bit_and_end_as_steps_without_do(
    optimizer, more, rates, monkeypatch
):
    monkeypatch.setattr(captured, "_standing_in", noted)
    calls: list[int] = []

    def capture(step):
        number, repeat = len(calls), recorded(step)
        calls.append(0)

        def replay():
            calls[number] += 1
            repeat()

        return replay

    made = optimizer if isinstance(optimizer, Optimizer) else optimizer()
    start, fixed = first_members(made), {"optimizer": optimizer, "clip_grad": 0.3}
    without = captured_step(2, capture, **fixed)
    without._replays._is_stopped = True
    expected = take_steps(without, copy.deepcopy(start), some_batches(), rates, **more)
    assert calls == []
    step = captured_step(2, capture, **fixed)
    ended = take_steps(step, copy.deepcopy(start), some_batches(), rates, **more)
    assert same(ended, expected)
    assert (calls, step.num_cuda_graphs, step.cuda_graphs_reason) == ([4, 2], 2, None)
    eager = take_steps(partial(ensemble_step, loss_fn=LOSS, **fixed), start, some_batches(), rates, **more)
    assert (ended.step, ended.batch, ended.done.tolist()) == (11, 11, eager.done.tolist())
    assert list(ended.sums) == list(eager.sums)
    pairs = zip(tree_leaves(ended), tree_leaves(eager), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_one_step_serves_ensembles_of_other_sizes(monkeypatch):
    """Its graphs are captured again at once, when no generator can be made any more."""

    def capture(step):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "Generator", lambda *_: pytest.fail("a generator was made in a capture"))
            return recorded(step)

    monkeypatch.setattr(captured, "_standing_in", noted)
    optimizer, given = optim.adam(), some_batches()[:4]
    step = captured_step(1, capture, optimizer=optimizer)
    for number, seeds in enumerate(((3, 4, 5), (3, 4), (3, 4, 5, 6)), start=1):
        without = captured_step(1, capture, optimizer=optimizer)
        without._replays._is_stopped = True
        expected = take_steps(without, first_members(optimizer, seeds), given, 0.1)
        assert same(take_steps(step, first_members(optimizer, seeds), given, 0.1), expected)
        assert step.num_cuda_graphs >= number
    assert step.cuda_graphs_reason is None


def test_a_member_that_fails_in_a_replay_stays_as_it_was_and_the_others_train_on():
    optimizer, given = optim.adam(), some_batches()[:4]
    step = captured_step(1, lambda step: step, optimizer=optimizer)
    ensemble = take_steps(step, first_members(optimizer), given)
    ensemble.params["4.bias"][1, 0] = math.inf
    before = copy.deepcopy(ensemble)
    after = take_steps(step, ensemble, [given[0]] * 2)
    assert (step.num_cuda_graphs, after.active.tolist()) == (1, [True, False, True])
    assert after.done.tolist() == [[6, 0, 6], [4, 0, 4], [6, 0, 6]]
    for name, tensor in after.params.items():
        assert [torch.equal(tensor[n], before.params[name][n]) for n in range(3)] == [False, True, False]
    weights = [torch.as_tensor(each.sums["loss"].weight).tolist() for each in (before, after)]
    assert weights == [[24.0] * 3, [36.0, 24.0, 36.0]]


def test_equal_keys_draw_the_same_numbers_and_a_step_that_is_checked_replays_the_same_bits():
    optimizer, given = optim.sgd(), some_batches()[:4] * 2
    step = captured_step(1, lambda step: step, optimizer=optimizer)
    ensemble = take_steps(checked_step(step, 4), first_members(optimizer, (3, 3)), given, 0.1)
    assert step.num_cuda_graphs == 2  # again after each check
    alone = take_steps(
        captured_step(1, lambda step: step, optimizer=optimizer), first_members(optimizer, (3,)), given, 0.1
    )
    for ours, theirs in ((ensemble.params, alone.params), (ensemble.buffers, alone.buffers)):
        for name, tensor in ours.items():
            assert torch.equal(tensor[0], tensor[1])
            torch.testing.assert_close(tensor[:1], theirs[name])
    assert ensemble.done.tolist() == [[8, 0, 8]] * 2


def test_where_there_can_be_no_graph_steps_say_so_once_and_go_on(caplog):
    step = capture_ensemble_step(loss_fn=LOSS, optimizer=optim.adam())
    given = some_batches()[:4]
    if not torch.cuda.is_available():
        with caplog.at_level(logging.WARNING):
            take_steps(step, first_members(optim.adam()), given)
        assert step.cuda_graphs_reason == "no CUDA device was found"
        assert len(caplog.records) == 1
    with pytest.raises(ValueError, match=r"lr: expected a number, or \(3,\) one for each member. Received: \(2,\)"):
        step(first_members(optim.adam()), given[0], lr=RATES[:2])
    with pytest.raises(TypeError, match="Expected an EnsembleState"):
        capture_ensemble_step(loss_fn=LOSS, optimizer=optim.adam())(None, given[0], lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip"):
        capture_ensemble_step(loss_fn=LOSS, optimizer=optim.adam(), clip_grad=-1.0)


def test_on_a_gpu_a_members_own_generator_stands_in_for_the_default_one_while_it_draws(monkeypatch):
    """Their states, and not copies, which a graph would not follow; each has the seed of an eager step."""

    class Generator:
        def __init__(self, device: Any) -> None:
            self.device = torch.device(device)
            self.state: Any = [0]

        def graphsafe_get_state(self) -> Any:
            return SimpleNamespace(state=self.state)

        def graphsafe_set_state(self, other: Any) -> None:
            self.state = other.state

        def manual_seed(self, seed: int) -> None:
            self.state[:] = [seed]

    made = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: made(device) if device == "cpu" else Generator(device))
    default = Generator("cuda:1")
    monkeypatch.setattr(torch.cuda, "default_generators", [None, default])
    before, generators = default.state, GraphGenerators()
    generators.start([Key(5), Key(6)], (1,), torch.device("cuda:1"))
    assert generators.on_device() == []
    with pytest.raises(KeyError), generators.of(1):
        raise KeyError(default.state.append("drawn"))
    own: Any = generators.on_device()[0]
    assert default.state is before
    assert own.state[1:] == ["drawn"]
    first = own.state[0]
    with generators.of(0):
        assert default.state[0] != first
    generators.start([Key(5), Key(6)], (2,), torch.device("cuda:1"))
    assert len(generators.on_device()) == 2
    assert own.state != [first]
    generators.start([Key(5), Key(6)], (1,), torch.device("cuda:1"))
    assert own.state == [first]
    generators.start([Key(5), Key(6)], (1,), torch.device("cpu"))
    assert generators.on_device() == []


def test_a_run_on_a_gpu_captures_the_step_of_its_ensemble_and_ends_bitwise_where_it_was_stopped(
    tmp_path, cli, monkeypatch
):
    """On the CPU: what needs a GPU is the choice alone, and the capture."""
    monkeypatch.setattr(captured, "_standing_in", noted)
    monkeypatch.setattr(TrainingConfig, "captures", property(lambda training: training.compile))
    monkeypatch.setattr(OnCuda, "__call__", lambda self, step: recorded(step))
    options = ("--rnn-layer-sizes", "5", "--dropout", "0.2", "--nb-previous-dirs", "1", "--batch-size-training", "30")
    several = ("--sweep", "weight-decay=0,0.1", "--compile", "--pad-batches", "on", "--learning-rate", "0.01")
    several = (*several, "--skip-figures")
    done = cli("train", tmp_path, "whole", PHANTOM, *options, *several, "--max-epochs", "2")
    assert re.search(r"Steps were replays of \d+ CUDA graphs?\n", done.out), done.out
    assert cli("train", tmp_path, "stopped", PHANTOM, *options, *several, "--max-epochs", "1").code == 0
    assert cli("resume", tmp_path, "stopped", "--new-max-epochs", "2").code == 0
    ends = [[latest_digest(tmp_path / name / number) for number in "01"] for name in ("whole", "stopped")]
    assert ends[0] == ends[1]
    assert ends[0][0] != ends[0][1]
    assert cli("verify", tmp_path / "whole", "--all", "--jobs", "1").code == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("optimizer", [optim.radam(), optim.chain(optim.clip_by_global_norm(0.5), optim.adam())])
def test_on_a_gpu_replays_have_the_bits_of_steps_without_a_graph_and_the_numbers_of_eager_ones(optimizer):
    given, ends = some_batches("cuda")[:8], []
    for is_captured in (False, True):
        step = capture_ensemble_step(loss_fn=LOSS, optimizer=optimizer)
        step._replays._is_stopped = not is_captured
        ensemble = take_steps(step, first_members(optimizer, device="cuda"), given, 0.05)
        assert (step.num_cuda_graphs, step.cuda_graphs_reason) == (2 * is_captured, None)
        with no_waits():
            ensemble = take_steps(step, ensemble, given[:2], 0.05)
        ends.append(ensemble)
    assert same(*ends)
    eager = partial(ensemble_step, loss_fn=LOSS, optimizer=optimizer)
    expected = take_steps(eager, first_members(optimizer, device="cuda"), [*given, *given[:2]], 0.05)
    for ours, theirs in zip(tree_leaves(ends[0]), tree_leaves(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@contextmanager
def no_waits() -> Any:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
