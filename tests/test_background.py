"""Claims about saving in the background: the bytes of the moment, in order, and no error lost."""

from __future__ import annotations

import threading
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_cases import report

from dwiml_func import TrainState, adam, init_state, module_loss, sgd, train_step
from dwiml_func.checkpoint.background import AsyncCheckpointer, copy_to_host
from dwiml_func.checkpoint.checkpoint import restore
from dwiml_func.checkpoint.checkpoint import save as save_checkpoint
from dwiml_func.checkpoint.digest import state_digest, state_leaves
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.data.config import BatchConfig
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import create_experiment
from dwiml_func.experiment.model_store import load_model
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.run_files import NoRunFiles
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models.config import ModelConfig
from dwiml_func.types import Sum

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
FORMATS = (torch.contiguous_format, torch.channels_last)
SAVE = "dwiml_func.checkpoint.background.save"


def state_at(epoch: int) -> TrainState:
    state = init_state(torch.nn.Linear(2, 1), sgd(), seed=0)
    return state.replace(params={name: torch.full_like(p, epoch) for name, p in state.params.items()}, epoch=epoch)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Saves begin to write only when this is set."""
    go = threading.Event()

    def save(*args: Any, **kwargs: Any) -> Path:
        assert go.wait(300)
        return save_checkpoint(*args, **kwargs)

    monkeypatch.setattr(SAVE, save)
    return go


def test_a_donated_state_that_is_written_over_is_saved_as_it_was(tmp_path, held):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
    step = partial(train_step, loss_fn=loss_fn, optimizer=adam(), lr=0.1, donate=True)
    state, batch = init_state(model, adam(), seed=1), torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    state, _ = step(state, batch)
    digest, memory = state_digest(state), {leaf.data_ptr() for leaf in state_leaves(state).values()}
    with AsyncCheckpointer(tmp_path) as checkpointer:
        checkpointer.save(state)
        later, _ = step(state, batch)
        assert memory & {leaf.data_ptr() for leaf in state_leaves(later).values()}  # the step reused it
        for leaf in state_leaves(later).values():
            leaf.fill_(torch.nan if leaf.is_floating_point() else -1)
        held.set()
    assert state_digest(restore(tmp_path, init_state(model, adam(), seed=1)).state) == digest


def test_the_copy_shares_no_memory_and_a_donated_state_has_none(tmp_path):
    model = torch.nn.BatchNorm1d(2)
    state = init_state(model, adam(), seed=0)
    copied = copy_to_host(state)
    assert state_digest(copied) == state_digest(state)
    assert not {leaf.data_ptr() for leaf in state_leaves(copied).values()} & {
        leaf.data_ptr() for leaf in state_leaves(state).values()
    }
    loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
    train_step(state, torch.randn(4, 2), loss_fn=loss_fn, optimizer=adam(), lr=0.1, donate=True)
    with pytest.raises(RuntimeError, match="donated to the update after step 0"):
        AsyncCheckpointer(tmp_path).save(state)
    assert list(tmp_path.iterdir()) == []


def test_the_record_has_the_devices_of_the_state_and_not_of_its_copy(tmp_path, monkeypatch):
    state, on_host = state_at(1), state_at(1)
    state = state.replace(params={name: p.to("meta") for name, p in state.params.items()})
    monkeypatch.setattr(
        "dwiml_func.checkpoint.background.copy_to_host", lambda state, reuse: on_host
    )  # meta tensors have no bytes
    with AsyncCheckpointer(tmp_path) as checkpointer:
        checkpointer.save(state)
    assert restore(tmp_path, on_host).environment["devices"] == ["meta"]


def test_a_step_that_was_not_finite_is_refused_at_once_in_each_process(tmp_path):
    state = state_at(1).replace(sums={"non_finite": Sum(3.0, 1.0)}, step=5, batch=3)
    for save in (AsyncCheckpointer(tmp_path).save, NoRunFiles().save):
        with pytest.raises(NonFiniteError, match=r"epoch 2, batch 2 \(step 4\)"):
            save(state, ())
    NoRunFiles().save(state_at(1), ())
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_of_the_data_is_waited_for_in_the_background_and_recorded(tmp_path):
    known = threading.Event()

    def fingerprint() -> dict[str, int]:
        assert known.wait(300)
        return {"size": 7}

    with AsyncCheckpointer(tmp_path, config={"lr": 0.1}, data=fingerprint) as checkpointer:
        checkpointer.save(state_at(1))
        known.set()
    checkpoint = restore(tmp_path, state_at(0))
    assert (checkpoint.data, checkpoint.config) == ({"size": 7}, {"lr": 0.1})


def test_it_keeps_what_it_is_told_to_keep(tmp_path):
    with AsyncCheckpointer(tmp_path, keep=1, keep_always=["0"]) as checkpointer:
        for epoch in range(3):
            checkpointer.save(state_at(epoch))
    assert list_checkpoints(tmp_path) == ["0", "2"]


def test_one_save_at_a_time_in_the_order_of_the_calls(tmp_path, monkeypatch):
    seen: list[tuple[str, int]] = []

    def save(directory: Path, state: TrainState, *_: Any, **__: Any) -> None:
        seen.append(("begin", state.epoch))
        seen.append(("end", state.epoch))

    monkeypatch.setattr(SAVE, save)
    with AsyncCheckpointer(tmp_path) as checkpointer:
        for epoch in range(20):
            checkpointer.save(state_at(epoch), then=lambda state: seen.append(("then", state.epoch)))
    assert seen == [(what, epoch) for epoch in range(20) for what in ("begin", "end", "then")]


def test_the_training_thread_goes_on_while_a_checkpoint_is_written(tmp_path, held):
    history = [report(1)]
    with AsyncCheckpointer(tmp_path) as checkpointer:
        checkpointer.save(state_at(1), history)
        history.append(report(2))  # it writes what was given
        assert checkpointer._thread is not None
        assert checkpointer._thread.daemon  # an interpreter that ends does not wait for it
        assert list_checkpoints(tmp_path) == []
        held.set()
    assert list_checkpoints(tmp_path) == ["1"]
    assert [each.epoch for each in restore(tmp_path, state_at(0)).history] == [1]


def fail_at(*epochs: int) -> Any:
    def save(directory: Path, state: TrainState, *args: Any, **kwargs: Any) -> Path:
        if state.epoch in epochs:
            raise OSError(28, f"no space for {state.epoch}")
        return save_checkpoint(directory, state, *args, **kwargs)

    return save


def test_an_error_surfaces_at_the_next_save_once(tmp_path, monkeypatch):
    monkeypatch.setattr(SAVE, fail_at(1))
    with AsyncCheckpointer(tmp_path) as checkpointer:
        checkpointer.save(state_at(1))
        with pytest.raises(OSError, match="no space for 1"):
            checkpointer.save(state_at(2))
        checkpointer.save(state_at(3))  # the caller may continue
    assert list_checkpoints(tmp_path) == ["3"]


def test_an_error_surfaces_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(SAVE, fail_at(2))

    def run() -> None:
        with AsyncCheckpointer(tmp_path) as checkpointer:
            checkpointer.save(state_at(1))
            checkpointer.save(state_at(2))

    with pytest.raises(OSError, match="no space for 2"):
        run()
    assert list_checkpoints(tmp_path) == ["1"]


def test_an_error_surfaces_when_the_generator_around_it_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(SAVE, fail_at(1))

    def epochs() -> Generator[int]:
        with AsyncCheckpointer(tmp_path) as checkpointer:
            checkpointer.save(state_at(1))
            yield 1

    run = epochs()
    next(run)
    with pytest.raises(OSError, match="no space for 1"):
        run.close()


def test_an_error_after_the_checkpoint_surfaces_too_and_the_checkpoint_stands(tmp_path):
    def then(_: TrainState) -> None:
        raise ValueError("no best model")

    checkpointer = AsyncCheckpointer(tmp_path)
    checkpointer.save(state_at(1), then=then)
    with pytest.raises(ValueError, match="no best model"):
        checkpointer.wait()
    assert list_checkpoints(tmp_path) == ["1"]


def test_the_error_of_the_training_goes_first_and_tells_of_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(SAVE, fail_at(1))

    def run() -> None:
        with AsyncCheckpointer(tmp_path) as checkpointer:
            checkpointer.save(state_at(1))
            raise ZeroDivisionError("of the training")

    with pytest.raises(ZeroDivisionError, match="of the training") as raised:
        run()
    (note,) = raised.value.__notes__
    assert "the last checkpoint could not be saved: [Errno 28] no space for 1" in note


def test_a_ctrl_c_does_not_wait_for_the_disk(tmp_path, held):
    def run() -> None:
        with AsyncCheckpointer(tmp_path) as checkpointer:
            checkpointer.save(state_at(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert list_checkpoints(tmp_path) == []
    (thread,) = [each for each in threading.enumerate() if each.name == "checkpointer"]
    assert thread.daemon  # nor does the end of the process
    held.set()
    thread.join()


def test_checkpoint_then_best_model_then_logs(tmp_path, monkeypatch):
    """Each is on the disk before the next begins, so that a crash leaves neither model nor logs ahead of the state."""
    config = RunConfig(
        hdf5_file=str(PHANTOM),
        model=ModelConfig(rnn_layer_sizes=(4,)),
        batches=BatchConfig(batch_size_training=96, batch_size_validation=48),
        training=TrainingConfig(max_epochs=2, learning_rate=("0.01*1", "1e-30")),
    )
    directory = create_experiment(tmp_path, "run", config)
    seen: list[tuple[str, list[str], int | None, list[int]]] = []

    def note(what: str) -> None:
        model, log = directory / "best_model", directory / "logs" / "train_loss_monitor_per_epoch.npy"
        best = load_model(model).facts["epoch"] if model.exists() else None
        seen.append((what, list_checkpoints(directory), best, [len(np.load(log))] if log.exists() else []))

    def observed(what: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            note(what)
            return function(*args, **kwargs)

        return call

    from dwiml_func.experiment import run_files
    from dwiml_func.writers.npy import npy

    monkeypatch.setattr(SAVE, observed("checkpoint", save_checkpoint))
    monkeypatch.setattr(run_files, "save_best_model", observed("best", run_files.save_best_model))
    list(run_experiment(directory, prepare(config), write=observed("logs", npy(directory))))
    assert seen == [
        ("checkpoint", [], None, []),
        ("best", ["1"], None, []),
        ("logs", ["1"], 1, []),
        ("checkpoint", ["1"], 1, [1]),
        ("logs", ["1", "2"], 1, [1]),  # the second epoch learns nothing, so it is not the best
    ]


def test_the_memory_of_a_copy_is_used_again_where_it_fits():
    model = torch.nn.BatchNorm1d(3)
    one, other = init_state(model, adam(), seed=0), init_state(torch.nn.BatchNorm1d(3), sgd(), seed=0)
    other = other.replace(params={"weight": torch.full((3,), 7.0), "bias": torch.ones(4)})
    first = copy_to_host(one)
    memory = {name: leaf.data_ptr() for name, leaf in state_leaves(first).items()}
    second = copy_to_host(other, reuse=first)
    reused = {name for name, leaf in state_leaves(second).items() if leaf.data_ptr() == memory[name]}
    assert reused == {"params/weight", *(f"buffers/{name}" for name in other.buffers)}
    assert state_digest(second) == state_digest(other)
    assert not {leaf.data_ptr() for leaf in state_leaves(second).values()} & {
        leaf.data_ptr() for leaf in state_leaves(other).values()
    }


def test_the_memory_of_a_copy_keeps_the_memory_format_of_its_state():
    module = torch.nn.Conv2d(3, 4, 3)
    plain, last = (init_state(module.to(memory_format=f), sgd(), seed=0) for f in FORMATS)  # type: ignore
    copied = copy_to_host(last, reuse=copy_to_host(plain))
    assert copied.params["weight"].stride() == last.params["weight"].stride()


def test_saves_that_share_memory_hold_each_its_own_values(tmp_path):
    with AsyncCheckpointer(tmp_path, keep=None) as checkpointer:
        for epoch in range(4):
            checkpointer.save(state_at(epoch))
    for epoch in range(4):
        assert state_digest(restore(tmp_path, state_at(9), name=str(epoch)).state) == state_digest(state_at(epoch))
