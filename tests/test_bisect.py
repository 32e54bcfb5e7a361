"""Claims about `bisect`: it names the first epoch, batch and tensor in which runs differ, from checkpoints alone."""

from __future__ import annotations

import random
import re
import shutil
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import pytest
import torch
from experiment_cases import CONFIG, PHANTOM, trained
from forgeries import read_checked, write_checked
from test_summary import report

from dwiml_func.checkpoint.arrays import load_leaves, save_leaves
from dwiml_func.checkpoint.manifest import read_manifest
from dwiml_func.core.state import TrainState
from dwiml_func.experiment.audit import bisect, lockstep
from dwiml_func.experiment.audit.bisect import bisect_runs
from dwiml_func.experiment.audit.lockstep import Difference, tensor_differences
from dwiml_func.experiment.config import CheckpointConfig, RunConfig
from dwiml_func.experiment.folder import create_ensemble, create_experiment, read_config
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import RunParts, prepare

RUN: RunConfig = replace(
    CONFIG,
    training=replace(CONFIG.training, max_epochs=3, skip_window_lag=True),
    checkpoints=CheckpointConfig(keep="all"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("bisect"), RUN, "a")


ENDS = [("a", report(epoch=1)), ("b", report(epoch=2)), ("c", report(epoch=2, batch=5))]
OTHER_MEANS = report(epoch=2, train={"loss": 0.5})


@pytest.mark.parametrize(
    ("ends", "num_batches", "expected"),
    [
        (ENDS, 2, ("c", "c")),
        ([*ENDS[:1], ("x", ENDS[1][1])], 2, Difference(2, None, (), ("numbers of the state",))),
        ([*ENDS[:1], ("b", OTHER_MEANS)], 2, Difference(2, None, (), ("train.loss: 0.25 in A, 0.5 in B",))),
        ([*ENDS[:2], ("x", ENDS[2][1])], 2, Difference(2, 5, (), ("numbers of the state",))),
        ([*ENDS, ("d", report(epoch=3))], 2, Difference(3, None, (), ("A has ended before it",))),
        (ENDS, 1, Difference(1, 2, (), ("B has no such batch",))),
        ([], 2, Difference(1, 1, (), ("B has no such batch",))),
        ([], 3, "explained"),
    ],
)
def test_what_differs_after_an_epochs_batches_is_told_too(monkeypatch, ends, num_batches, expected) -> None:
    def traced(_: object, is_first: bool, last_epoch: int, see: Any) -> Any:
        for batch in range(1, 1 + (2 if is_first else num_batches * bool(ends) + 3 * (num_batches == 3))):
            see((1, batch))
        assert last_epoch == 9
        yield from ENDS if is_first else ends

    of_batch: Any = namedtuple("Batch", ["epoch", "batch"])
    monkeypatch.setattr(lockstep, "_explain", lambda *_: "explained")
    monkeypatch.setattr(lockstep, "_traced", lambda a, b, c, see: traced(a, b, c, lambda at: see(of_batch(*at))))
    starts, parts = cast(Any, (None, None)), cast(Any, (True, False))
    assert lockstep.first_difference(starts, parts, 9) == expected


Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Given:
    points: torch.Tensor
    name: str
    more: Any


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        (torch.ones(1), ["batch"]),
        (Given(torch.ones(1), "a", None), ["points"]),
        (Given(torch.ones(1), "a", [torch.ones(1), "b", {"c": torch.ones(1)}]), ["points", "more.1", "more.3.c"]),
        ((torch.ones(1), Pair(torch.ones(1), 3)), ["1", "2.1"]),
        ({"x": torch.ones(1), 5: torch.ones(1)}, ["x", "5"]),
        ("text", []),
        (None, []),
    ],
)
def test_the_tensors_of_a_batch_have_names(batch, names) -> None:
    assert list(lockstep._tensors_of(batch)) == names


FIRST = ("aten.mul", "float32 (2,)", ("ab",))
SECOND = ("aten.add", "float32 (2,)", ("cd",))


@pytest.mark.parametrize(
    ("b", "is_filled", "told"),
    [
        ([FIRST, SECOND], [True, True], "operation: unknown, the operations of the step have the same results"),
        (
            [FIRST, (*SECOND[:2], ("x",))],
            [True, True],
            "operation 2 of the step: aten.add (float32 (2,)) has ano",
        ),
        ([(*FIRST[:2], ("x",)), SECOND], [False, True], "operation: unknown, "),  # of memory that holds anything
        ([("aten.div", *FIRST[1:]), SECOND], [False, True], "operation 1 of the step: aten.mul in A, aten.div in B"),
        (
            [(FIRST[0], "float32 (3,)", ("x",))],
            [True, True],
            "operation 1 of the step: aten.mul (float32 (2,) in A, ",
        ),
        ([FIRST], [True, True], "operation 2 of the step: 2 operations in A, 1 in B"),
        ([FIRST, SECOND, FIRST], [True, True], "operation 3 of the step: 2 operations in A, 3 in B"),
    ],
)
def test_the_first_operation_that_differs_is_named(b, is_filled, told: str) -> None:
    assert lockstep._first_operation([FIRST, SECOND], b, is_filled).startswith(told)


def planted(parts: RunParts, epoch: int, batch: int, leaf: str) -> RunParts:
    """A run whose step has one value of a parameter or of its optimizer state one ulp larger, after one batch."""
    group, _, name = leaf.partition("/")

    def larger(tree: Any, path: list[str]) -> Any:
        if not path:
            flat = tree.clone().view(-1)
            flat[0] = torch.nextafter(flat[0], torch.tensor(torch.inf))
            return flat.view(tree.shape)
        return {**tree, path[0]: larger(tree[path[0]], path[1:])}

    def step(state: TrainState, given: Any, *, lr: float) -> Any:
        is_there = (state.epoch + 1, state.batch + 1) == (epoch, batch)
        new, metrics = parts.step(state, given, lr=lr)
        if is_there:
            new = new.replace(**{group: larger(getattr(new, group), name.split("/"))})
        return new, metrics

    return replace(parts, step=step)


@pytest.mark.parametrize("seed", range(3))
def test_one_ulp_in_one_tensor_of_one_batch_is_named(run, tmp_path, monkeypatch, seed):
    parts, draws = prepare(RUN), random.Random(seed)
    num_batches = sum(1 for _ in parts.train(parts.first_state().key, 0, 0))
    epoch, batch = draws.randint(1, 3), draws.randint(1, num_batches)
    leaf = draws.choice(sorted(load_leaves(run / "checkpoint" / "1")))
    other = planted(parts, epoch, batch, leaf)
    directory = create_experiment(tmp_path, "b", RUN)
    list(run_experiment(directory, other))

    with monkeypatch.context() as patch:
        made = iter((parts, other))
        patch.setattr(bisect, "prepare", lambda _: next(made))
        found = bisect_runs(run, directory)
    assert found.different == (epoch, 0)
    assert found.start == (None if epoch == 1 else str(epoch - 1))
    assert found.found is not None
    assert (found.found.epoch, found.found.batch, found.found.leaves) == (epoch, batch, (leaf,))
    assert found.found.lines[0].startswith("operation ")

    without = bisect_runs(run, directory)  # B was recorded by a step that its config does not make
    assert (without.found, without.unlike) == (None, ("B",))


def test_one_ulp_in_the_data_is_named_with_the_batch_that_reads_it(cli, run, tmp_path):
    data = Path(shutil.copy(PHANTOM, tmp_path / "data.hdf5"))
    with h5py.File(data, "r+") as file:
        points = file["subj0/streamlines/data"]
        assert isinstance(points, h5py.Dataset)
        points[700, 1] = np.nextafter(points[700, 1], np.float32(np.inf))
    trained(tmp_path, replace(RUN, hdf5_file=str(data)), "b")
    outcome = cli("bisect", run, tmp_path / "b")
    assert outcome.code == 1
    assert outcome.out.splitlines()[2] == "The recorded states agree nowhere and differ after epoch 1."
    assert "Trained again from the first states, the runs first differ in epoch 1, batch " in outcome.out
    assert "\n  batch.points: 1 of " in outcome.out
    assert " 1 ulp apart\n" in outcome.out


def test_learning_rate_seed_and_clipping_are_named(cli, run, tmp_path):
    training = RUN.training
    for name, changes, expected in [
        ("rate", {"learning_rate": ("0.001*2 0.002",)}, "epoch 3, batch 1:\n  learning rate: 0.001 in A, 0.002 in B"),
        ("seed", {"rng": 7}, "the first state:\n  seed: 1234 in A, 7 in B"),
        ("clip", {"clip_grad": 0.05}, "epoch 1, batch 1:\n  operation "),
    ]:
        trained(tmp_path, replace(RUN, training=replace(training, **changes)), name)
        outcome = cli("bisect", run, tmp_path / name)
        assert outcome.code == 1
        assert f"the runs first differ in {expected}" in outcome.out


def test_equal_runs_differ_nowhere(cli, run, tmp_path):
    trained(tmp_path, RUN, "b")
    outcome = cli("bisect", run, tmp_path / "b")
    assert (outcome.code, outcome.out.splitlines()[2]) == (
        0,
        "The recorded states agree after epoch 3 and differ nowhere.",
    )


def test_a_run_is_compared_with_its_own_record_and_the_piece_that_differs_is_named(cli, tmp_path):
    config = replace(RUN, checkpoints=CheckpointConfig(keep="all", checkpoint_every="1batches"))
    directory = trained(tmp_path, config, "b")
    outcome = cli("bisect", directory)
    assert outcome.out == f"{directory}: this machine computes what was recorded, in all 3 epochs\n"

    path = directory / "checkpoint" / "1-1"
    if not path.is_dir():
        path = next(path for path in sorted((directory / "checkpoint").iterdir()) if "-" in path.name)
    manifest, leaves = read_manifest(path), load_leaves(path)
    name = "opt_state/exp_avg/rnn_model.rnn_0.bias_hh_l0"
    leaves[name][3] = torch.nextafter(leaves[name][3], torch.tensor(torch.inf))
    kept = {key: manifest[key] for key in ("history", "config", "data", "environment")}
    save_leaves(path, leaves, kept, numbers=manifest["numbers"])
    outcome = cli("bisect", directory)
    assert outcome.code == 1
    assert f"to {path.name}, this machine computes something else:\n  first leaf that differs: {name}" in outcome.out


def test_a_first_epoch_that_differs_is_named(cli, run, tmp_path):
    forged = Path(shutil.copytree(run, tmp_path / "run"))
    record = read_checked(forged)
    name = sorted(record[1]["leaves"])[0]
    record[1]["leaves"][name].view(-1)[0] += 1
    write_checked(forged, record, PHANTOM)
    outcome = cli("bisect", forged)
    assert (outcome.code, outcome.err) == (1, "")
    assert (
        "from the first state to 1, this machine computes something else:\n  first leaf that differs: " in outcome.out
    )


def test_ensembles_and_their_members_are_refused(cli, tmp_path):
    create_ensemble(tmp_path, "run", [RUN, RUN])
    for path in (tmp_path / "run", tmp_path / "run" / "1"):
        cli("bisect", path).check_refusal("Expected a single run", f"dwiml-func verify {tmp_path / 'run'} --all")
    cli("verify", tmp_path / "run").check_refusal("is an ensemble, whose epochs are verified together. Give --all")


def test_a_run_without_an_epoch_is_refused(cli, run, tmp_path):
    create_experiment(tmp_path, "new", read_config(run))
    cli("bisect", run, tmp_path / "new").check_refusal("has no recorded epoch yet")


def test_tensors_that_one_run_lacks_or_that_have_another_shape_are_told():
    a = {"same": torch.ones(2), "gone": torch.ones(1), "wide": torch.ones(3), "kind": torch.ones(1)}
    b = {"same": torch.ones(2), "new": torch.ones(1), "wide": torch.ones(2), "kind": torch.ones(1).double()}
    assert tensor_differences({n: a[n] for n in ("same", "gone")}, {n: b[n] for n in ("same", "new")}) == [
        "gone: only in A",
        "new: only in B",
    ]
    wide, kind = tensor_differences({n: a[n] for n in ("wide", "kind")}, {n: b[n] for n in ("wide", "kind")}, "grad/")
    assert re.fullmatch(r"grad/wide: .*3.* in A, .*2.* in B", wide)
    assert re.fullmatch(r"grad/kind: .*float32.* in A, .*float64.* in B", kind)
    assert tensor_differences(a, a) == []
    ones, zeros = ({name: torch.full((1,), value) for name in "abcde"} for value in (1.0, 0.0))
    three = [tensor_differences({n: ones[n] for n in "abcde"[:num]}, zeros)[:3] for num in (3, 5)]
    assert [line[:2] for line in three[0]] == [line[:2] for line in three[1]] == ["a:", "b:", "c:"]
    assert len(tensor_differences({n: ones[n] for n in "abc"}, {n: zeros[n] for n in "abc"})) == 3
    assert tensor_differences(ones, zeros)[3:] == ["2 more tensors differ"]
