"""Claims about `train --compile`: resumed runs end with the bits of whole ones, and the gain is told."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from experiment_cases import latest_digest
from preloaded import run_program, run_ranks

from dwiml_func import init_state, module_loss, sgd
from dwiml_func.compiled import warmup
from dwiml_func.compiled.step import jit_step
from dwiml_func.compiled.warmup import CompilationReport, WarmUpStep
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.types import Sum

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
OPTIONS = (
    *("--rnn-layer-sizes", "8", "--dropout", "0.25", "--nb-previous-dirs", "1", "--compile"),
    *("--batch-size-training", "30", "--batch-size-validation", "20", "--learning-rate", "0.01*1 0.001"),
    *("--max-epochs", "2", "--keep", "all", "--skip-figures"),
)
TELLING_ITS_CODE = """
import sys
from dwiml_func.cli.main import main
code = main(sys.argv[1:])
from torch._inductor.codecache import PyCodeCache
print("Code:", *sorted(module.__file__ for module in PyCodeCache.modules))
sys.exit(code)
"""
EVERY_OPTION = (
    *("--rule", "*bias*: weight_decay=0, lr=0.5", "--rule", "rnn_model.rnn_0.weight_ih_l0: frozen"),
    *("--accumulate", "3", "--ema", "0.9", "--skip-not-finite", "2", "--clip-grad", "0.5"),
    *("--num-shards", "2", "--precision", "bf16"),
)


@pytest.mark.compiles
@pytest.mark.soak
def test_a_compiled_run_with_every_option_that_two_processes_resume_makes_the_same_code_and_ends_bitwise_as_in_one(
    tmp_path: Path,
) -> None:
    """Its batches are sharded, its forward pass is in bf16; the code is known by its text, which names its file."""
    out = run_program(TELLING_ITS_CODE, "train", tmp_path, "whole", PHANTOM, *OPTIONS, *EVERY_OPTION)
    (code,) = re.findall(r"^Code: .+", out, re.MULTILINE)
    (gain,) = re.findall(r"^Compiled in .*", out, re.MULTILINE)
    assert re.search(r"^Steps ran in \d+ compiled graph", out, re.MULTILINE)
    assert re.match(r"Compiled in \d+\.\d s: a step takes [\d.]+ ms instead of [\d.]+ ms, ", gain)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint" / "2")  # as if it had been killed after its first epoch
    assert latest_digest(tmp_path / "parts") != latest_digest(tmp_path / "whole")
    told = run_ranks(2, "resume", tmp_path, "parts", program=TELLING_ITS_CODE)
    assert [text.count("Compiled in ") for text in told] == [1, 0]
    assert [re.findall(r"^Code: .+", text, re.MULTILINE) for text in told] == [[code]] * 2
    assert latest_digest(tmp_path / "parts") == latest_digest(tmp_path / "whole")


@pytest.mark.compiles
def test_a_step_warms_up_on_the_first_batch_of_the_run_and_changes_nothing_by_it() -> None:
    model = torch.nn.Linear(2, 1)
    loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
    options = {"loss_fn": loss_fn, "optimizer": sgd(), "donate": True, "backend": "eager"}
    asked = []

    def first_batch() -> torch.Tensor:
        asked.append(1)
        return torch.ones(7, 2)

    states = []
    inner = jit_step(**options)
    warm = WarmUpStep(inner, eager=inner.eager, graph=inner.graph, first_batch=first_batch)
    for step in (jit_step(**options), warm):
        state = init_state(model, sgd(), seed=0)
        for _ in range(3):
            state, _ = step(state, torch.ones(4, 2), lr=0.1)
        states.append(state)
    assert asked == [1]
    assert warm.report is not None
    assert warm.report.seconds > 0
    assert torch.equal(states[0].params["weight"], states[1].params["weight"])
    assert states[0].sums == states[1].sums


def test_a_warm_up_measures_both_steps_on_copies_of_the_first_state_and_leaves_errors_to_the_training(monkeypatch):
    now, seen = 0.0, []
    monkeypatch.setattr(warmup.time, "perf_counter", lambda: now)

    def step_of(name: str, seconds: list[float]) -> Any:
        def step(state: Any, batch: Any, *, lr: float) -> Any:
            nonlocal now
            now += seconds.pop(0) if seconds else 0.0
            seen.append((name, state.params["weight"], state.epoch, state.batch, dict(state.sums), batch, lr))
            if batch == "bad":
                raise NonFiniteError("The loss is nan in epoch 1, batch 1.")
            return state, {}

        return step

    start = init_state(torch.nn.Linear(1, 1), sgd(), seed=0).replace(epoch=2, batch=3, sums={"loss": Sum(1.0, 1.0)})
    compiled, eager = step_of("compiled", [99.0, 99.0, 1.0, 2.0, 3.0]), step_of("eager", [99.0, 4.0, 6.0, 5.0])
    graph: Any = SimpleNamespace(eager_reason=None, compile_seconds=12.0)
    warm = WarmUpStep(compiled, eager=eager, graph=graph, first_batch=lambda: "first")
    warm(start, "own", lr=0.1)
    warm(start, "next", lr=0.1)
    assert warm.report == CompilationReport(seconds=12.0, eager_step=5.0, compiled_step=2.0)
    *rehearsals, own, following = seen
    assert [name for name, *_ in rehearsals] == ["compiled", *["compiled", "eager"] * 4]
    assert {tuple(map(str, rest)) for _, _, *rest in rehearsals} == {("0", "0", "{}", "first", "0.0")}
    assert all(weight is not start.params["weight"] for _, weight, *_ in rehearsals)
    assert own == ("compiled", start.params["weight"], 2, 3, start.sums, "own", 0.1)
    assert following[-2:] == ("next", 0.1)
    for reason, first in (("it branches", "first"), (None, "bad")):
        graph.eager_reason = reason
        warm = WarmUpStep(compiled, eager=eager, graph=graph, first_batch=lambda first=first: first)
        warm(start, "own", lr=0.1)
        assert warm.report is None


def test_a_gain_is_told_as_the_steps_that_pay_for_it_and_a_loss_as_a_loss() -> None:
    assert CompilationReport(12.0, 0.010, 0.010).break_even is None
    assert str(CompilationReport(12.0, 0.030, 0.010)) == (
        "Compiled in 12.0 s: a step takes 10.0 ms instead of 30.0 ms, paid off after 600 steps"
    )
    assert str(CompilationReport(12.0, 0.010, 0.030)).endswith("which does not pay off")
