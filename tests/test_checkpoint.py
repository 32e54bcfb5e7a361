"""Claims about checkpoints: whole or absent, never silently wrong, and what is kept."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiment_cases import latest_digest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwiml_func import EpochReport, Key, NonFiniteError, TrainState, adam, init_state, module_loss, sgd, train_step
from dwiml_func.checkpoint.background import AsyncCheckpointer
from dwiml_func.checkpoint.checkpoint import read, restore, restore_or, save
from dwiml_func.checkpoint.digest import state_digest, state_leaves
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.manifest import CheckpointError, manifest_checksum
from dwiml_func.checkpoint.retention import kept_checkpoints
from dwiml_func.core.early_stopping import Best
from dwiml_func.types import Sum

ODD = {
    "a": torch.tensor(2.5),
    "a.b": torch.tensor([1e38, -0.0, float("nan")], dtype=torch.bfloat16),
    "a/b": torch.tensor([6e-8, 65504], dtype=torch.float16),
    "a%2Fb": torch.tensor([[0.1], [5e-324]], dtype=torch.float64),
    "a.b.c": torch.tensor(-(2**63)),
    "A": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "strided": torch.arange(12.0)[::5],
}
"""Leaves of every kind, under names that a store may take for one another."""


def odd_state(**changes: Any) -> TrainState:
    state = TrainState(
        params=ODD,
        buffers=dict(reversed(ODD.items())),
        opt_state={"m": ODD, "m.v": ODD, "empty": {}},
        key=Key(2**64 - 1),
    )
    return state.replace(**changes)


def linear_state(**changes: Any) -> TrainState:
    """A small state of known numbers, whatever torch's generators hold."""
    module = torch.nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.fill_(0.5)
        module.bias.fill_(0.25)
    return init_state(module, adam(), seed=7).replace(**changes)


def report(epoch: int = 1, **changes: Any) -> EpochReport:
    values: dict[str, Any] = {
        "epoch": epoch,
        "learning_rate": 0.1,
        "train": {"loss": 0.1 + 0.2},
        "valid": {},
        "num_batches": 3,
        "num_points": 30.0,
        "best": Best(0.5, 1, 0),
        "is_best": True,
        "stop": None,
        "train_minutes": 1 / 3,
        "valid_minutes": 0.0,
    }
    return EpochReport(**values | changes)


def check_equal(restored: TrainState, saved: TrainState) -> None:
    assert state_digest(restored) == state_digest(saved)
    for group in ("params", "buffers"):
        for name, leaf in getattr(saved, group).items():
            other = getattr(restored, group)[name]
            assert (other.dtype, other.shape) == (leaf.dtype, leaf.shape)
            assert torch.equal(other.nan_to_num(7), leaf.nan_to_num(7))
    assert {kind: list(tensors) for kind, tensors in restored.opt_state.items()} == {
        kind: list(tensors) for kind, tensors in saved.opt_state.items()
    }
    assert (restored.key, restored.step, restored.epoch, restored.batch) == (
        saved.key,
        saved.step,
        saved.epoch,
        saved.batch,
    )
    assert repr(restored.sums) == repr(saved.sums)
    assert repr(restored.best) == repr(saved.best)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"step": 2**70, "epoch": 2**63, "batch": 2**40, "best": Best(math.inf, None, 2**65)},
        {"best": Best(-math.inf, 1, 0), "sums": {"loss": Sum(math.nan, math.inf), "a/b.c": Sum(-0.0, 5e-324)}},
        {"batch": 3, "sums": {"loss": Sum(0.1, 3.0), "grad_norm": Sum(1.7976931348623157e308, 1.0)}},
        {"best": Best(0.1 + 0.2, 3, 1), "epoch": 4},
        {"key": Key(0, (0, 2**32 - 1))},
    ],
    ids=["start", "huge", "not_finite", "mid_epoch", "best", "key"],
)
def test_every_state_comes_back_as_it_was(tmp_path, changes):
    state = odd_state(**changes)
    save(tmp_path, state)
    restored = restore(tmp_path, odd_state(key=state.key)).state
    check_equal(restored, state)
    assert latest_digest(tmp_path) == state_digest(state)


@settings(max_examples=10)
@given(
    numbers=st.tuples(st.integers(0, 2**70), st.integers(0, 2**70), st.integers(0, 2**70), st.integers(0, 2**64 - 1)),
    sums=st.dictionaries(st.text(max_size=5), st.tuples(st.floats(), st.floats()), max_size=3),
    values=st.lists(st.floats(width=32), max_size=5),
)
def test_any_numbers_come_back(numbers, sums, values, tmp_path_factory):
    step, epoch, batch, seed = numbers
    state = TrainState(
        params={"w": torch.tensor(values)},
        buffers={},
        opt_state={},
        key=Key(seed),
        step=step,
        epoch=epoch,
        batch=batch,
        sums={name: Sum(*pair) for name, pair in sums.items()},
    )
    directory = tmp_path_factory.mktemp("any")
    save(directory, state)
    check_equal(restore(directory, state).state, state)


def test_the_history_and_the_config_come_back(tmp_path):
    history = (
        report(1, train={"loss": math.nan, "grad_norm": math.inf}, best=Best(math.inf, None, 1), is_best=False),
        report(2, valid={"loss": 0.1 + 0.2, "angular_error": -0.0}, stop="patience", num_points=1e300),
    )
    config = {"a": {"b": [1, None, "é", 0.1]}, "c": -math.inf}
    save(tmp_path, linear_state(), history, config=config)
    checkpoint = restore(tmp_path, linear_state())
    assert repr(checkpoint.history) == repr(history)  # a NaN is not equal to itself
    assert checkpoint.history[1] == history[1]
    assert isinstance(checkpoint.history[1].best, Best)
    assert checkpoint.config == config


def test_the_folders_of_a_first_checkpoint_survive_a_loss_of_power(tmp_path, monkeypatch):
    flushed, fsync = set(), os.fsync

    def flush(descriptor: int) -> None:
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    save(tmp_path / "runs" / "run", linear_state())
    places = [tmp_path, tmp_path / "runs", tmp_path / "runs" / "run", tmp_path / "runs" / "run" / "checkpoint"]
    assert {str(place) for place in places} <= flushed


def test_a_save_hashes_each_tensor_once(tmp_path, monkeypatch):
    monkeypatch.delattr("dwiml_func.checkpoint.arrays.leaf_digest")  # not again where the arrays are written
    save(tmp_path, linear_state())
    monkeypatch.undo()
    assert restore(tmp_path, linear_state()).digest == state_digest(linear_state())


def test_saving_changes_neither_the_state_nor_torchs_generator(tmp_path):
    state, generator = odd_state(), torch.get_rng_state()
    before = state_digest(state)
    save(tmp_path, state)
    restore(tmp_path, state)
    assert state_digest(state) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_restored_state_shares_no_memory(tmp_path):
    state = linear_state()
    save(tmp_path, state)
    first, second = restore(tmp_path, state).state, restore(tmp_path, state).state
    for leaf in state_leaves(first).values():
        leaf.add_(1)
    assert state_digest(second) == state_digest(state)
    assert not any(leaf.requires_grad for leaf in state_leaves(second).values())


def test_a_checkpoint_read_twice_is_equal_and_its_repr_names_no_function(tmp_path):
    save(tmp_path, linear_state())
    assert read(tmp_path) == read(tmp_path)
    assert "function" not in repr(read(tmp_path))


def test_a_restored_state_has_the_devices_and_the_order_of_what_it_is_restored_into(tmp_path):
    state = linear_state()
    save(tmp_path, state.replace(opt_state={**state.opt_state, "missed": {"bias": torch.tensor(1)}}))
    like = state.replace(params=dict(list(state.params.items())[::-1])).to("meta")
    restored = restore(tmp_path, like).state
    assert {leaf.device.type for leaf in state_leaves(restored).values()} == {"meta"}
    assert list(restored.params) == list(like.params) == ["bias", "weight"]
    assert list(restored.opt_state) == [*like.opt_state, "missed"]


def test_names_sort_by_number(tmp_path):
    for epoch, batch in [(0, 0), (0, 1), (3, 0), (3, 9), (3, 50), (4, 0), (9, 0), (10, 0)]:
        save(tmp_path, linear_state(epoch=epoch, batch=batch), keep=None)
    assert list_checkpoints(tmp_path) == ["0", "0-1", "3", "3-9", "3-50", "4", "9", "10"]
    assert restore(tmp_path, linear_state()).state.epoch == 10
    assert restore(tmp_path, linear_state(), name="3-50").state.batch == 50


def test_the_latest_two_and_the_best_are_kept(tmp_path):
    kept = []
    for epoch in range(1, 6):
        best = Best(0.5, min(epoch, 2), max(0, epoch - 2))
        path = save(tmp_path, linear_state(epoch=epoch, best=best))
        assert path == tmp_path / "checkpoint" / str(epoch)
        kept.append(list_checkpoints(tmp_path))
    assert kept == [["1"], ["1", "2"], ["2", "3"], ["2", "3", "4"], ["2", "4", "5"]]
    save(tmp_path, linear_state(epoch=6, best=Best(0.4, 6)))
    assert list_checkpoints(tmp_path) == ["5", "6"]
    save(tmp_path, linear_state(epoch=6, batch=10, best=Best(0.4, 6)), keep=1)
    assert list_checkpoints(tmp_path) == ["6", "6-10"]


def test_the_latest_two_within_the_current_epoch_those_named_and_those_being_read_are_kept(tmp_path, monkeypatch):
    for epoch, batch in [(0, 9), (1, 0), (1, 1), (1, 2), (1, 3)]:
        save(tmp_path, linear_state(epoch=epoch, batch=batch), keep=1, keep_always=["0-9"])
    assert list_checkpoints(tmp_path) == ["0-9", "1", "1-2", "1-3"]
    with kept_checkpoints(tmp_path) as names:
        assert names == ["0-9", "1", "1-2", "1-3"]
        save(tmp_path, linear_state(epoch=2), keep=1)
        assert list_checkpoints(tmp_path) == [*names, "2"]
    save(tmp_path, linear_state(epoch=3), keep=1)
    assert list_checkpoints(tmp_path) == ["3"]
    seen = iter([["2", "3"], ["3"], ["3"], ["3"]])  # one is removed between the look and the lock
    monkeypatch.setattr("dwiml_func.checkpoint.retention.list_checkpoints", lambda directory: next(seen))
    with kept_checkpoints(tmp_path) as names:
        assert names == ["3"]


def test_without_a_best_epoch_only_the_latest_are_kept(tmp_path):
    for epoch in range(4):
        save(tmp_path, linear_state(epoch=epoch))
    assert list_checkpoints(tmp_path) == ["2", "3"]


def test_keep_every_third_keeps_it_the_latest_two_and_the_best(tmp_path):
    for epoch in range(1, 12):
        save(tmp_path, linear_state(epoch=epoch, best=Best(0.4, min(epoch, 4))), keep="every:3")
    assert list_checkpoints(tmp_path) == ["3", "4", "6", "9", "10", "11"]


@pytest.mark.parametrize("keep", [0, -1, True, "", "every", "every:0", "every:x", "every:-1", "every: 2", "every:²"])
def test_a_number_to_keep_that_is_none_is_refused(tmp_path, keep):
    with pytest.raises(ValueError, match="keep: expected a number of at least 1"):
        save(tmp_path, linear_state(epoch=1), keep=keep)
    assert not list(tmp_path.iterdir())


def test_keep_none_keeps_all(tmp_path):
    for epoch in range(5):
        save(tmp_path, linear_state(epoch=epoch), keep=None)
    assert list_checkpoints(tmp_path) == ["0", "1", "2", "3", "4"]


def test_anything_else_in_the_folder_is_ignored_and_stays(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    strangers = ["notes", "-1", "03", "3-0", "3-", "3-05", "1.5", "+9", "٣", "²", "9 ", "best", ".tmp-9-x", "9-9-9"]
    for name in strangers:
        (folder / name).mkdir()
    (folder / "99").write_text("a file, not a checkpoint")
    assert list_checkpoints(tmp_path) == []
    for epoch in range(3):
        save(tmp_path, linear_state(epoch=epoch), keep=1)
    assert list_checkpoints(tmp_path) == ["2"]
    assert sorted(entry.name for entry in folder.iterdir()) == sorted([*strangers, "99", "2"])
    assert restore(tmp_path, linear_state()).state.epoch == 2


def test_a_checkpoint_replaces_one_of_the_same_name(tmp_path):
    save(tmp_path, linear_state(epoch=3, step=1))
    save(tmp_path, linear_state(epoch=3, step=2))
    assert restore(tmp_path, linear_state()).state.step == 2
    assert [entry.name for entry in (tmp_path / "checkpoint").iterdir()] == ["3"]


def test_what_does_not_fit_is_listed_with_both_values(tmp_path):
    saved = TrainState(
        params={"same": torch.ones(1), "shape": torch.ones(2), "dtype": torch.ones(3), "gone": torch.ones(4)},
        buffers={"moved": torch.ones(5)},
        opt_state={"exp_avg": {"same": torch.ones(1)}},
        key=Key(1),
    )
    like = TrainState(
        params={
            "same": torch.ones(1),
            "shape": torch.ones(2, 1),
            "dtype": torch.ones(3).half(),
            "moved": torch.ones(5),
        },
        buffers={},
        opt_state={"momentum": {"same": torch.ones(1)}},
        key=Key(2),
    )
    save(tmp_path, saved)
    with pytest.raises(CheckpointError) as raised:
        restore(tmp_path, like)
    message = str(raised.value)
    assert "\n" not in message
    head, _, listed = message.partition("restore into: ")
    assert str(tmp_path / "checkpoint" / "0") in head
    assert listed.split("; ") == [
        "key: Key(seed=1, path=()) in the checkpoint, Key(seed=2, path=()) expected",
        "buffers/moved: float32 (5,) in the checkpoint, not expected",
        "opt_state/exp_avg/same: float32 (1,) in the checkpoint, not expected and 5 more.",
    ]


def test_another_optimizer_or_seed_does_not_fit(tmp_path):
    save(tmp_path, linear_state())
    with pytest.raises(CheckpointError, match=r"opt_state/exp_avg/bias: .* not expected"):
        restore(tmp_path, init_state(torch.nn.Linear(2, 1), sgd(), seed=7))
    with pytest.raises(CheckpointError, match=r"seed=7.*seed=8"):
        restore(tmp_path, init_state(torch.nn.Linear(2, 1), adam(), seed=8))


@pytest.mark.parametrize(
    ("old", "new"), [('"step": 0', '"step": 1'), ('"num_batches": 3', '"num_batches": 4'), ('"a": 1', '"a": 2')]
)
def test_a_changed_number_in_the_manifest_is_noticed(tmp_path, old, new):
    manifest = save(tmp_path, linear_state(), (report(),), config={"a": 1}) / "manifest.json"
    text = manifest.read_text()
    assert text.count(old) == 1
    manifest.write_text(text.replace(old, new))
    for read_it in (lambda: restore(tmp_path, linear_state()), lambda: latest_digest(tmp_path)):
        with pytest.raises(CheckpointError, match=r"manifest\.json does not hold what was written"):
            read_it()


def test_a_later_format_is_refused(tmp_path):
    manifest = save(tmp_path, linear_state()) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 3}))
    with pytest.raises(CheckpointError, match=r"has format 3\. Expected format 2"):
        restore(tmp_path, linear_state())


def test_later_checkpoints_of_another_version_are_not_saved_over(tmp_path):
    file = save(tmp_path, linear_state(epoch=5)) / "manifest.json"
    manifest = {name: value for name, value in json.loads(file.read_text()).items() if name != "checksum"}
    manifest["format"] = 3
    file.write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))
    with pytest.raises(CheckpointError, match=r"which holds 5\."):
        save(tmp_path, linear_state(epoch=2))
    assert list_checkpoints(tmp_path) == ["5"]


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.write_text"])
def test_a_write_that_fails_leaves_the_older_checkpoints(tmp_path, monkeypatch, broken):
    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    save(tmp_path, linear_state(epoch=1))
    save(tmp_path, linear_state(epoch=2))
    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        for epoch in (2, 3):
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path, linear_state(epoch=epoch, step=9))
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["1", "2"]
    assert restore(tmp_path, linear_state()).state.step == 0


def test_a_missing_checkpoint_is_an_error_that_says_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No checkpoint in .*checkpoint"):
        restore(tmp_path, linear_state())
    with pytest.raises(FileNotFoundError, match=r"No checkpoint in .*checkpoint"):
        latest_digest(tmp_path)
    save(tmp_path, linear_state(epoch=1))
    save(tmp_path, linear_state(epoch=2))
    with pytest.raises(FileNotFoundError, match=r"No checkpoint '3' in .*There are: 1, 2\."):
        restore(tmp_path, linear_state(), name="3")


def test_restore_or_takes_the_latest_or_the_state_that_is_given(tmp_path):
    first = linear_state()
    assert restore_or(tmp_path, first) == (first, ())
    saved = linear_state(epoch=1, step=5)
    save(tmp_path, saved, (report(),))
    state, history = restore_or(tmp_path, first)
    assert state_digest(state) == state_digest(saved)
    assert history == (dataclasses.replace(report(), digest=state_digest(saved)),)
    shutil.rmtree(Path(tmp_path) / "checkpoint" / "1" / "leaves")
    with pytest.raises(CheckpointError, match="corrupt"):  # never from the beginning, silently
        restore_or(tmp_path, first)


def test_the_manifest_is_readable_without_the_tensors(tmp_path):
    path = save(tmp_path, linear_state(epoch=3, step=12, best=Best(0.5, 2, 1)), (report(),), config={"lr": 0.1})
    shutil.rmtree(path / "leaves")
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["numbers"]["step"] == 12
    assert manifest["numbers"]["best"] == {"value": 0.5, "epoch": 2, "num_bad_epochs": 1}
    assert manifest["history"][0]["train"] == {"loss": 0.1 + 0.2}
    assert manifest["config"] == {"lr": 0.1}
    assert manifest["digest"] == state_digest(linear_state(epoch=3, step=12, best=Best(0.5, 2, 1)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_restored_convolution_trains_on_bitwise_identically(tmp_path, memory_format):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3))
    loss_fn = module_loss(model.to(memory_format=memory_format), lambda model, x: (model(x).square().mean(), len(x)))  # type: ignore

    def train(state: TrainState, first: int, last: int) -> TrainState:
        for seed in range(first, last):
            batch = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
            state, _ = train_step(state, batch, loss_fn=loss_fn, optimizer=adam(), lr=0.01)
        return state

    start = init_state(model, adam(), seed=0)
    middle = train(start, 0, 3)
    save(tmp_path, middle)
    assert state_digest(train(restore(tmp_path, start).state, 3, 6)) == state_digest(train(middle, 3, 6))


def trained(
    directory: Path, state: TrainState, history: tuple[EpochReport, ...] = (), *, epochs: int, by: float
) -> Any:
    """Train on from a state, each epoch adding `by` to the parameters, and save each epoch. Returns the last state."""
    for epoch in range(state.epoch + 1, epochs + 1):
        params = {name: tensor + by for name, tensor in state.params.items()}
        state = state.replace(params=params, epoch=epoch, best=Best(0.5, 1, epoch - 1))
        history = (*history, report(epoch))
        path = save(directory, state, history)
        assert path.name in list_checkpoints(directory)  # what has just been written is never removed
    return state


def digests(directory: Path) -> dict[str, str]:
    return {name: restore(directory, linear_state(), name=name).digest for name in list_checkpoints(directory)}


@pytest.mark.parametrize(
    ("position", "history", "later"), [((2, 0), (report(1), report(2)), "4, 5"), ((0, 3), (), "1, 4, 5")]
)
def test_a_folder_with_later_epochs_of_another_run_is_refused_and_left_alone(tmp_path, position, history, later):
    trained(tmp_path, linear_state(), epochs=5, by=1)
    before = digests(tmp_path)
    other = linear_state(epoch=position[0], batch=position[1])
    with pytest.raises(CheckpointError) as raised:
        save(tmp_path, other, history)
    assert str(raised.value) == (
        f"Expected a folder without later epochs of another run, to save checkpoint {'2' if history else '0-3'}. "
        f"Received: {tmp_path / 'checkpoint'}, which holds {later}. "
        f"Save to another folder, or delete these checkpoints."
    )
    assert digests(tmp_path) == before
    save(tmp_path / "another", other, history)


def test_nothing_tells_runs_apart_that_were_saved_without_a_history(tmp_path):
    for epoch in range(1, 6):
        save(tmp_path, linear_state(epoch=epoch))
    with pytest.raises(CheckpointError, match=r"holds 4, 5\."):
        save(tmp_path, linear_state(epoch=3))
    save(tmp_path, linear_state(epoch=4))  # that one is there, with this digest


def test_a_run_restored_from_an_older_checkpoint_may_repeat_its_later_ones_bitwise(tmp_path):
    trained(tmp_path, linear_state(), epochs=5, by=1)
    before = digests(tmp_path)
    older = restore(tmp_path, linear_state(), name="1")
    for _ in range(2):
        assert save(tmp_path, older.state.replace(batch=3), older.history).is_dir()
    trained(tmp_path, older.state, older.history, epochs=5, by=1)
    assert digests(tmp_path) == before


def test_a_run_restored_from_an_older_checkpoint_and_trained_otherwise_needs_another_folder(tmp_path):
    trained(tmp_path, linear_state(), epochs=5, by=1)
    older = restore(tmp_path, linear_state(), name="4")
    save(tmp_path, older.state.replace(batch=3), older.history)
    trained(tmp_path / "another", older.state, older.history, epochs=6, by=2)
    older = restore(tmp_path, linear_state(), name="1")
    with pytest.raises(CheckpointError, match=r"holds 4, (4-3, )?5\."):
        trained(tmp_path, older.state, older.history, epochs=5, by=2)
    for name in list_checkpoints(tmp_path)[1:]:  # the second way out
        shutil.rmtree(tmp_path / "checkpoint" / name)
    assert restore_or(tmp_path, linear_state())[0].epoch == 1
    trained(tmp_path, older.state, older.history, epochs=5, by=2)


def test_corrupt_later_checkpoints_do_not_end_a_run_that_resumed_before_them(tmp_path):
    for epoch in range(1, 4):
        save(tmp_path, linear_state(epoch=epoch), keep=None)  # without a history: only their being corrupt tells
    for file in (tmp_path / "checkpoint" / "3" / "leaves").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    state, _ = restore_or(tmp_path, linear_state())
    assert state.epoch == 2
    assert save(tmp_path, state.replace(batch=2)).is_dir()


def test_a_state_whose_deferred_check_failed_is_refused_and_the_checkpoint_before_stays(tmp_path):
    model = torch.nn.Linear(2, 1)
    loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
    step = partial(train_step, loss_fn=loss_fn, optimizer=sgd(), lr=0.1, non_finite="defer")
    state, _ = step(init_state(model, sgd(), seed=0), torch.ones(4, 2))
    good = state_digest(state)
    save(tmp_path, state)
    for batch in (torch.full((4, 2), torch.nan), torch.ones(4, 2)):
        state, _ = step(state, batch)
        with pytest.raises(NonFiniteError, match=r"not finite in epoch 1, batch 2 \(step 2\)\. No later"):
            save(tmp_path, state)
    assert list_checkpoints(tmp_path) == ["0-1"]
    assert latest_digest(tmp_path) == good


def test_numbers_of_numpy_and_torch_are_taken_for_what_they_are(tmp_path):
    best = Best(np.float32(0.5), np.int64(1), torch.tensor(0))  # type: ignore
    state = linear_state(epoch=np.int64(1), step=torch.tensor(3), best=best, key=Key(np.uint64(7), (np.int32(1),)))  # type: ignore
    measured = report(
        1, learning_rate=np.float32(0.5), train={"loss": torch.tensor(0.25)}, num_points=np.int16(30), best=best
    )
    config = {"rates": np.geomspace(1, 4, 3), "lr": torch.tensor(0.5), np.int64(3): (np.True_, Path("a") / "b", None)}
    save(tmp_path, state, [measured], config=config, data={"size": np.uint8(9)})
    plain = linear_state(epoch=1, step=3, best=Best(0.5, 1, 0), key=Key(7, (1,)))
    found = restore(tmp_path, plain)
    assert found.digest == state_digest(plain)
    assert (found.config, found.data) == ({"rates": [1, 2, 4], "lr": 0.5, "3": [True, "a/b", None]}, {"size": 9})
    expected = report(1, learning_rate=0.5, train={"loss": 0.25}, num_points=30, best=plain.best, digest=found.digest)
    assert found.history == (expected,)


def test_what_json_does_not_have_is_named_before_a_training(tmp_path):
    with pytest.raises(
        TypeError, match=r"^config\.model\.act: expected numbers, .* Received: builtin_function_or_method"
    ):
        save(tmp_path, linear_state(), config={"model": {"act": torch.relu}})
    with pytest.raises(TypeError, match="expected texts as keys"):
        AsyncCheckpointer(tmp_path, config={(1, 2): 3})  # type: ignore
    with pytest.raises(TypeError, match=r"^history: expected the reports of epochs\. Received: 'ab'$"):
        save(tmp_path, linear_state(), history="ab")  # type: ignore
    assert list_checkpoints(tmp_path) == []
