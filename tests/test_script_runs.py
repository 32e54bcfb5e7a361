"""Claims about runs that a script saved with `save` alone: they are listed, drawn, compared, and verified in Python."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dwiml_func import (
    adam,
    eval_step,
    init_state,
    module_loss,
    restore_or,
    save,
    train_and_validate,
    train_step,
    verify,
)
from dwiml_func.checkpoint.arrays import load_leaves, save_leaves
from dwiml_func.checkpoint.manifest import read_manifest
from dwiml_func.core.state import TrainState

MODEL = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.2), torch.nn.Linear(3, 1))
BATCHES = [torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


def loss(model: Any, x: torch.Tensor) -> Any:
    return (model(x) - 1).square().mean(), len(x), {"accuracy": (model(x) > 0).float().mean()}


LOSS = module_loss(MODEL, loss)
OPTIONS: dict[str, Any] = {
    "train": lambda key, epoch, start: BATCHES[start:],
    "valid": lambda *_: BATCHES[:2],
    "step": partial(train_step, loss_fn=LOSS, optimizer=adam()),
    "eval_step": partial(eval_step, loss_fn=LOSS),
    "learning_rate": 0.05,
    "validate_every": "2batches",
}


def first() -> TrainState:
    return init_state(MODEL, adam(), seed=0)


def script(directory: Path, *, max_epochs: int = 3, **options: Any) -> Path:
    state, history = restore_or(directory, first())
    for state, report in train_and_validate(state, **OPTIONS | options, max_epochs=max_epochs):  # noqa: B020
        history = (*history, report)
        save(directory, state, history)
    return directory


def test_an_epoch_is_verified_with_the_scripts_own_functions(tmp_path: Path) -> None:
    directory = script(tmp_path / "a")
    found = verify(directory, **OPTIONS)
    assert (found.epoch, found.start, found.problems, found.is_replayed) == (3, "2", (), True)
    assert found.digest is not None
    others: Any = OPTIONS | {"learning_rate": 0.051}
    other = verify(directory, **others)
    assert any("digest of the state" in problem for problem in other.problems)
    assert any("first leaf that differs" in problem for problem in other.problems)
    assert any(problem.startswith("learning_rate: 0.05 recorded, 0.051 replayed") for problem in other.problems)
    with pytest.raises(ValueError, match=r"Epoch 4 of .* is not recorded. Expected one of 1 to 3"):
        verify(directory, **OPTIONS, epoch=4)


def test_the_first_epoch_is_verified_from_the_first_state(tmp_path: Path) -> None:
    directory = script(tmp_path / "a", max_epochs=1)
    with pytest.raises(ValueError, match="Give first_state"):
        verify(directory, **OPTIONS)
    assert verify(directory, **OPTIONS, first_state=first()).problems == ()
    assert verify(directory, **OPTIONS, first_state=init_state(MODEL, adam(), seed=0).replace(step=1)).problems
    with pytest.raises(ValueError, match="no recorded epoch"):
        verify(tmp_path, **OPTIONS)


def test_a_planted_fault_is_found(tmp_path: Path) -> None:
    directory = script(tmp_path / "a")
    path = directory / "checkpoint" / "2"
    manifest, leaves = read_manifest(path), load_leaves(path)
    leaves["params/0.bias"][0] += 1e-6
    facts = {name: manifest[name] for name in ("history", "config", "data", "environment")}
    save_leaves(path, leaves, facts, numbers=manifest["numbers"])
    problems = verify(directory, **OPTIONS).problems
    assert any(problem.startswith("checkpoint 2, where the replay began: digest") for problem in problems)


def test_runs_of_scripts_are_listed_drawn_and_compared(cli: Any, tmp_path: Path) -> None:
    a, b = script(tmp_path / "plain"), script(tmp_path / "faster", learning_rate=0.1, monitor="accuracy", mode="max")
    save(tmp_path / "begun", first().replace(epoch=1))
    (tmp_path / "no_run").mkdir()
    rows = json.loads(cli("runs", tmp_path, "--json").out)
    assert [(row["name"], row["state"], row["epochs"], row["monitor"]) for row in rows] == [
        ("begun", "unfinished", 0, "loss"),
        ("faster", "finished", 3, "accuracy"),
        ("plain", "finished", 3, "loss"),
    ]
    table = cli("runs", tmp_path)
    assert table.code == 0
    assert "plain" in table.out
    assert "3/?" in table.out
    assert cli("plot", a, b, "--out", tmp_path / "both.svg").code == 0
    drawn = (tmp_path / "both.svg").read_text()
    assert "<!-- plain -->" in drawn
    assert "<!-- Monitored metric -->" in drawn
    same = cli("diff", a, a)
    assert same.code == 0
    outcome = cli("diff", a, b)
    assert outcome.code == 1
    assert "learning_rate: 0.05 in A, 0.1 in B" in outcome.out
    outcome = cli("verify", a)
    outcome.check_refusal("was saved by a script", "dwiml_func.verify(directory, train=..., step=...")
    assert cli("digest", a).code == 0
