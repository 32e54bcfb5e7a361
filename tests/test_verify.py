"""Claims about `verify` and `diff`: identical results are reported as such, and a planted fault is found."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from dwiml_func.checkpoint.arrays import load_leaves, save_leaves
from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.checkpoint.manifest import CorruptError, read_manifest
from dwiml_func.experiment.audit import replay
from dwiml_func.experiment.audit import verify as verification
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.model_store import MANIFEST

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
OPTIONS = ("--rnn-layer-sizes", "8", "--batch-size-training", "40", "--max-epochs", "3", "--reverse-ratio", "0.5")
OPTIONS = (*OPTIONS, "--skip-figures")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dwiml_func.cli.main import main

    folder = tmp_path_factory.mktemp("verify")
    data = shutil.copy(PHANTOM, folder / "data.hdf5")
    assert main(["train", str(folder), "run", str(data), *OPTIONS]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def record(run: Path, name: str) -> dict[str, Any]:
    return read_manifest(run / "checkpoint" / name)


def save_again(run: Path, name: str, leaves: dict[str, torch.Tensor] | None = None, **facts: Any) -> None:
    """Rewrite a checkpoint with digests that fit, as one who hides a fault would."""
    path = run / "checkpoint" / name
    manifest = read_manifest(path)
    kept = {key: manifest[key] for key in ("history", "config", "data", "environment")}
    save_leaves(path, leaves or load_leaves(path), kept | facts, numbers=manifest["numbers"])


def test_a_replay_is_bitwise_identical_and_nothing_is_written(cli, run):
    before = contents(run)
    for epoch, start in [("1", "the first state"), ("3", "checkpoint 2")]:
        outcome = cli("verify", run, "--epoch", epoch)
        assert (outcome.code, len(outcome.out.splitlines())) == (0, 1)
        assert f"{run}: epoch {epoch}, replayed from {start}, is bitwise identical to the recorded epoch" in outcome.out
        assert f"state {record(run, '3')['history'][int(epoch) - 1]['digest']}" in outcome.out
    assert contents(run) == before


def test_one_float_changed_by_one_ulp_is_found_with_its_place(cli, run):
    name, leaves = "params/rnn_model.rnn_0.weight_hh_l0", load_leaves(run / "checkpoint" / "2")
    before = leaves[name].view(-1)[5].clone()
    leaves[name].view(-1)[5] = after = torch.nextafter(before, torch.tensor(torch.inf))
    recorded = record(run, "2")["digest"]
    save_again(run, "2", leaves)
    changed = record(run, "2")["digest"]

    outcome = cli("verify", run, "--epoch", "2")  # the checkpoint after the epoch
    assert outcome.code == 1
    assert outcome.out.splitlines() == [
        f"{run}: epoch 2, replayed from the first state, differs from the recorded epoch.",
        f"  first leaf that differs: {name}, 1 of 256 values, by {float(after - before):.3g} at most; the first at "
        f"[0, 5]: {after.numpy()[()]!s} in checkpoint 2, {before.numpy()[()]!s} replayed, "
        f"1 ulp apart (1 of {len(leaves)} leaves differ)",
        f"  digest of checkpoint 2: {recorded} recorded, {changed} found",
    ]

    outcome = cli("verify", run)  # the checkpoint that the replay begins from
    assert outcome.code == 1
    lines = outcome.out.splitlines()
    assert lines[0] == f"{run}: epoch 3, replayed from checkpoint 2, differs from the recorded epoch."
    assert lines[1] == f"  checkpoint 2, where the replay began: digest {recorded} recorded, {changed} found"
    assert any(line.startswith("  first leaf that differs: ") and " ulp apart (" in line for line in lines)
    assert any(line.startswith("  digest of the state: ") for line in lines)


def test_what_differs_in_the_environment_is_told_with_or_without_a_fault(cli, run):
    environment = record(run, "3")["environment"]
    other = environment | {"torch": "1.0.0", "numpy": "1.0", "cpu_capability": "NONE"}
    texts = [f"environment: {key}: {other[key]!r}, now {environment[key]!r}" for key in sorted(other)]
    texts = [text for text in texts if any(f" {key}:" in text for key in ("torch", "numpy", "cpu_capability"))]
    save_again(run, "3", environment=other)
    outcome = cli("verify", run)
    assert (outcome.code, len(outcome.out.splitlines())) == (0, 1)
    assert outcome.out.endswith(f" (different: {'; '.join(texts)})\n")

    leaves = load_leaves(run / "checkpoint" / "3")
    leaves["opt_state/exp_avg/rnn_model.rnn_0.bias_hh_l0"][0] += 1
    save_again(run, "3", leaves)
    outcome = cli("verify", run)
    assert outcome.code == 1
    assert (
        "first leaf that differs: opt_state/exp_avg/rnn_model.rnn_0.bias_hh_l0, 1 of 32 values, by 1 at" in outcome.out
    )
    assert [line.strip() for line in outcome.out.splitlines()[-3:]] == texts


def test_the_recorded_number_of_threads_is_set_for_the_replay_and_put_back(cli, run, monkeypatch):
    save_again(run, "3", environment=record(run, "3")["environment"] | {"num_threads": 2})
    seen, prepare = [], verification.prepare
    monkeypatch.setattr(
        verification, "prepare", lambda config: (seen.append(torch.get_num_threads()), prepare(config))[1]
    )
    before = torch.get_num_threads()
    cli("verify", run)
    assert (seen, torch.get_num_threads()) == ([2], before)


def test_a_streamline_changed_in_the_data_is_found(cli, finished, tmp_path):
    data = Path(shutil.copy(read_config(finished).hdf5_file, tmp_path / "data.hdf5"))
    with h5py.File(data, "r+") as file:
        points = file["subj0/streamlines/data"]
        assert isinstance(points, h5py.Dataset)
        points[3] = points[3] + np.float32(0.25)
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    recorded = record(run, "3")["data"]["sha256"]
    found = hashlib.sha256(data.read_bytes()).hexdigest()
    outcome = cli("verify", run, "--hdf5-file", data)
    assert outcome.code == 1
    lines = outcome.out.splitlines()
    assert lines[-1] == f'  data file {data}: sha256: "{recorded}" recorded, "{found}" now'
    latest = newest(run)
    assert latest is not None
    assert verification.data_problems(replace(latest, data={}), "/gone.hdf5") == []  # of scripts that record none
    with pytest.raises(FileNotFoundError, match=r"No dataset /gone.hdf5\. If it was moved, give its path"):
        verification.data_problems(latest, "/gone.hdf5")
    assert any(line.startswith("  train.loss: ") for line in lines)
    assert any(line.startswith("  first leaf that differs: ") for line in lines)
    cli("resume", tmp_path, "run", "--new-max-epochs", "4", "--hdf5-file", data).check_refusal("whose bytes differ")


def test_a_changed_config_is_found(cli, run):
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"reverse_ratio": 0.5', '"reverse_ratio": 0.25'))
    outcome = cli("verify", run)
    assert outcome.code == 1
    lines = outcome.out.splitlines()
    assert lines[-1] == "  config: batches.reverse_ratio: 0.5 recorded, 0.25 in config.json"
    assert any(line.startswith("  first leaf that differs: ") for line in lines)
    (run / "config.json").write_text(config.replace('"rnn_layer_sizes": [\n      8', '"rnn_layer_sizes": [\n      9'))
    outcome = cli("verify", run)  # with which the state cannot even be restored
    assert outcome.code == 1
    assert "the replay failed: " in outcome.out
    assert "config: model.rnn_layer_sizes: [8] recorded, [9] in config.json" in outcome.out


def test_a_corrupt_checkpoint_is_named_and_another_start_is_taken(cli, run):
    (run / "checkpoint" / "2" / "leaves" / "_METADATA").unlink()
    outcome = cli("verify", run)
    assert outcome.code == 1
    assert f"{run}/checkpoint/2 is corrupt: it has no file leaves/_METADATA." in outcome.out
    assert "replayed from the first state" in outcome.out
    assert "digest" not in outcome.out  # the epoch itself came out as recorded


def test_a_difference_before_the_epoch_is_reported_too(cli, run):
    """Epoch 3 is replayed from the first state, and epoch 2 is not as recorded."""
    shutil.rmtree(run / "checkpoint" / "2")
    shutil.rmtree(run / "checkpoint" / "1", ignore_errors=True)
    history = record(run, "3")["history"]
    history[1]["train"]["loss"] += 1.0
    save_again(run, "3", history=history)
    outcome = cli("verify", run)
    assert outcome.code == 1
    assert outcome.out.splitlines() == [
        f"{run}: epoch 3, replayed from the first state, differs from the recorded epoch.",
        "  epoch 2, replayed before, also differs",
    ]


def test_corrupt_tensors_after_the_epoch_are_reported_also_where_all_else_is_as_recorded(cli, run):
    for path in (run / "checkpoint" / "2" / "leaves").glob("**/d/*"):  # of a tensor there may be a second copy
        content = bytearray(path.read_bytes())
        content[32::64] = bytes(byte ^ 1 for byte in content[32::64])
        path.write_bytes(content)
    outcome = cli("verify", run, "--epoch", "2")
    assert outcome.code == 1
    first, *problems = outcome.out.splitlines()
    assert first == f"{run}: epoch 2, replayed from the first state, differs from the recorded epoch."
    assert len(problems) == 1
    assert f"{run}/checkpoint/2 is corrupt" in problems[0]


def test_a_best_model_that_is_not_that_of_the_best_epoch_is_found(cli, run):
    facts = read_manifest(run / "best_model", MANIFEST)
    leaves = load_leaves(run / "best_model", facts)
    name = min(leaves)
    leaves[name] = leaves[name] + 1
    facts = {key: value for key, value in facts.items() if key not in ("format", "digest", "leaves", "checksum")}
    save_leaves(run / "best_model", leaves, facts, manifest_name=MANIFEST)
    outcome = cli("verify", run, "--epoch", "1")
    assert (outcome.code, outcome.out.splitlines()[1:]) == (1, [f"  best model: {name} are not those of checkpoint 3"])


def test_what_cannot_be_verified_is_refused_with_exit_code_2(cli, run, tmp_path):
    for epoch in ("0", "-1", "4"):
        cli("verify", run, "--epoch", epoch).check_refusal(f"Epoch {epoch} of {run} is not recorded", "1 to 3")
    cli("verify", run, "--epoch", "x").check_refusal("--epoch", "'x'")
    cli("verify", tmp_path).check_refusal("is not an experiment")
    cli("verify", run, "--hdf5-file", tmp_path / "none").check_refusal(str(tmp_path / "none"))
    shutil.rmtree(run / "checkpoint")
    cli("verify", run).check_refusal("no recorded epoch yet")


def test_diff_tells_the_first_epoch_that_differs(cli, run, tmp_path):
    assert cli("diff", run, run).code == 0
    data = read_config(run).hdf5_file
    assert cli("train", tmp_path, "other", data, *OPTIONS, "--learning-rate", "0.001*2 0.01").code == 0
    outcome = cli("diff", run, tmp_path / "other")
    assert outcome.code == 1
    assert "training.learning_rate" in outcome.out
    assert "first differ after epoch 3" in outcome.out


def state_at(epoch: int, batch: int = 0, digest: str = "") -> Any:
    return SimpleNamespace(epoch=epoch, batch=batch, digest=digest)


def reported(epoch: int, digest: str | None = None, *, batch: int = 0, loss: float = 0.5) -> Any:
    return SimpleNamespace(epoch=epoch, digest=digest, batch=batch, loss=loss)


@pytest.fixture
def by_digest(monkeypatch):
    """States are compared by the digest that they say, reports by their loss."""
    monkeypatch.setattr(replay, "state_digest", lambda state: state.digest)
    monkeypatch.setattr(replay, "state_leaves", lambda state: {"w": state.digest})
    monkeypatch.setattr(replay, "state_numbers", lambda state: {"step": state.batch})
    monkeypatch.setattr(
        replay, "leaf_problems", lambda a, b, name: [] if a == b else [f"{a['w']} in {name}, {b['w']} replayed"]
    )
    monkeypatch.setattr(
        replay, "report_differences", lambda a, b, _: [] if a.loss == b.loss else [f"{a.loss}, {b.loss}"]
    )


@pytest.mark.parametrize(
    ("after", "digest", "recorded", "expected"),
    [
        ("a", "a", "a", []),
        (None, "a", "a", []),
        (None, "a", None, []),
        ("a", "a", None, []),
        ("b", "a", None, ["b in 2, a replayed"]),
        ("b", "a", "b", ["b in 2, a replayed", "digest of the state: b recorded, a replayed"]),
        ("b", "a", "a", ["b in 2, a replayed", "digest of checkpoint 2: a recorded, b found"]),
        ("a", "a", "b", ["digest of the state: b recorded, a replayed", "digest of checkpoint 2: b recorded, a found"]),
        (None, "a", "b", ["digest of the state: b recorded, a replayed", "the leaf that differs is unknown: "]),
    ],
)
def test_a_replayed_state_is_that_of_the_record_and_of_the_checkpoint(by_digest, after, digest, recorded, expected):
    checkpoint: Any = None if after is None else SimpleNamespace(name="2", digest=after, state=state_at(2, 0, after))
    found = replay.state_problems(state_at(2, 0, digest), digest, reported(2, recorded), checkpoint)
    assert [text[: len(wanted)] for text, wanted in zip(found, expected, strict=True)] == expected


@pytest.mark.parametrize(
    ("state", "start", "origin", "is_told"),
    [
        (state_at(1, 0, "a"), "1", None, False),
        (state_at(1, 0, "b"), "1", None, True),
        (state_at(1, 3, "b"), "1-3", None, False),  # no report is of a part of an epoch
        (state_at(2, 0, "b"), "2", None, False),  # an earlier version recorded no digest
        (state_at(7, 0, "b"), "7", None, False),
        (state_at(1, 0, "f"), "1", "1", False),  # of a fork
        (state_at(1, 0, "a"), "1", "1", True),
        (state_at(1, 0, "a"), "1", "2", False),
    ],
)
def test_a_replay_begins_with_the_state_that_was_recorded(by_digest, state, start, origin, is_told):
    source: Any = None if origin is None else SimpleNamespace(checkpoint=origin, start_digest="f")
    found = replay.start_problems(state, start, {1: reported(1, "a"), 2: reported(2)}, source)
    assert bool(found) is is_told
    assert all(text.startswith(f"checkpoint {start}, where the replay began: digest ") for text in found)


@pytest.mark.parametrize(
    ("replayed", "expected"),
    [
        ([(1, "a", 0.5), (2, "b", 0.5)], []),
        ([(1, "x", 0.5), (2, "b", 0.5)], ["epoch 1, replayed before, also differs"]),
        ([(1, "a", 0.25), (2, "b", 0.5)], ["epoch 1, replayed before, also differs"]),
        ([(0, "x", 0.5), (1, "x", 0.5), (2, "b", 0.25)], ["epoch 0, replayed before, also differs", "0.5, 0.25"]),
        ([(1, "a", 0.5), (2, "x", 0.25)], ["digest of the state: b", "the leaf that", "0.5, 0.25"]),
        ([(2, "b", 0.5), (3, "x", 0.25)], []),  # what comes after it is not trained
    ],
)
def test_a_replay_is_compared_up_to_its_epoch(by_digest, replayed, expected):
    reports = {0: reported(0, "a"), 1: reported(1, "a"), 2: reported(2, "b"), 3: reported(3, "c")}
    within = (state_at(2, 4, "?"), reported(2, "?", batch=4, loss=9.0))  # of a validation within an epoch
    epochs: Any = [(state_at(epoch, 0, digest), reported(epoch, loss=loss)) for epoch, digest, loss in replayed]
    found = replay.replay_problems(iter([within, *epochs]), reports, 2, None)
    assert [text[: len(wanted)] for text, wanted in zip(found, expected, strict=True)] == expected
    with pytest.raises(AssertionError, match="before the epoch"):
        replay.replay_problems(iter([within]), reports, 2, None)


@pytest.mark.parametrize(
    ("names", "corrupt", "first", "origin", "expected"),
    [
        (["1", "2", "3"], "", None, None, "2"),
        (["1", "2-4", "3"], "", None, None, "1"),
        (["1", "2"], "2", None, None, "1"),
        (["1", "2"], "1 2", "first", None, "first"),
        (["3"], "", "first", None, "first"),
        (["1", "2"], "1 2", None, None, "Give first_state, the first state of the run."),
        (["2-4", "3"], "", "first", "2-4", "2-4"),
        (["1", "2-4"], "", "first", "2-4", "1"),
        (["3"], "", "first", "2-4", "Expected checkpoint 2-4, where it was forked, or a later one."),
        (["2"], "2", "first", "2", "Expected checkpoint 2, where it was forked, or a later one."),
    ],
)
def test_a_replay_begins_at_the_newest_valid_checkpoint_before_it(monkeypatch, names, corrupt, first, origin, expected):
    def read(directory: Path, name: str, like: object) -> Any:
        assert (directory, like) == (Path("run"), first)
        if name in corrupt.split():
            raise CorruptError(f"{name} is corrupt")
        return SimpleNamespace(state=f"state {name}")

    monkeypatch.setattr(replay, "list_checkpoints", lambda _: names)
    monkeypatch.setattr(replay, "read", read)
    source: Any = None if origin is None else SimpleNamespace(checkpoint=origin)
    if "." in expected:
        with pytest.raises(
            replay.NothingLeft, match=re.escape(f"run has no valid checkpoint before epoch 3. {expected}")
        ):
            replay.replay_start(Path("run"), first, 3, source)
        return
    found: Any = replay.replay_start(Path("run"), first, 3, source)
    spoilt = [f"{name} is corrupt" for name in reversed(corrupt.split())]
    assert found == (("first", None, spoilt) if expected == "first" else (f"state {expected}", expected, spoilt))


@pytest.mark.parametrize(
    ("recorded", "expected"), [(4, 4), (1, 1), (4096, 4096), (4097, 3), (0, 3), ("4", 3), (None, 3)]
)
def test_a_replay_has_the_recorded_number_of_threads_where_one_can_have_it(monkeypatch, recorded, expected):
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(KeyError), replay.recorded_threads({"num_threads": recorded}, default=3):
        raise KeyError
    assert asked == [expected, 2]
