"""The bits of a run with shards depend on no number of threads, processes or workers, nor on a change of them."""

from __future__ import annotations

import functools
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_cases import BATCHES, CONFIG, trained
from preloaded import run_ranks
from reproduction_cases import differences, results
from test_sharding import Member, Threads
from torch import Tensor

from dwiml_func import (
    Key,
    LossOut,
    init_state,
    module_loss,
    restore,
    save,
    sgd,
    train_and_validate,
    train_step,
    value_and_grad,
)
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.core.rng import torch_rng
from dwiml_func.core.run_epoch import Interrupted
from dwiml_func.core.state import TrainState
from dwiml_func.distributed.sharding import SINGLE_PROCESS, ProcessGroup, sharded_loss, sharded_value_and_grad
from dwiml_func.distributed.threads import ShardThreads
from dwiml_func.experiment.audit.audit import audit_experiment
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import create_experiment, read_config
from dwiml_func.experiment.resume import resume_experiment
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import RunParts, prepare
from dwiml_func.models.config import ModelConfig

Cell = tuple[int, int, int]
"""Numbers of threads, processes and workers."""

_TWO = Threads(2)
RANKS: list[ProcessGroup] = [Member(_TWO, rank) for rank in (0, 1)]
ALONE: Cell = (1, 1, 0)
CELLS: list[Cell] = list(itertools.product((1, 2, 4), (1, 2), (0, 2)))
PLAIN = replace(
    CONFIG,
    model=replace(CONFIG.model, dg_dropout=0.0),
    batches=replace(BATCHES, reverse_ratio=0.5, noise_gaussian_size_forward=0.05, max_batches_per_epoch_training=2),
    training=replace(CONFIG.training, num_shards=4),
)
RANDOM = replace(PLAIN, model=replace(CONFIG.model, dropout=0.3, rnn_layer_sizes=(6, 5)))


@functools.cache  # to start workers takes longer than all else here
def _batches(config: RunConfig, processes: int, start_batch: int) -> list[Any]:
    config = replace(config, batches=replace(config.batches, processes=processes))
    return list(prepare(config).train(Key(config.training.rng), 0, start_batch))


@functools.cache
def _parts(config: RunConfig, num_threads: int, group: ProcessGroup) -> RunParts:
    return prepare(replace(config, training=replace(config.training, num_threads=num_threads)), group)


def _epoch(config: RunConfig, cell: Cell, group: ProcessGroup, folder: Path, *, num_batches: int) -> str:
    """Train an epoch from the checkpoint of its first batch, where there is one, or only its first batch; a digest."""
    parts = _parts(config, cell[0], group)
    state = parts.first_state()
    if list_checkpoints(folder):
        state = restore(folder, state).state
    trained: list[TrainState] = []
    loop = train_and_validate(
        state,
        train=lambda key, epoch, start_batch: _batches(config, cell[2], start_batch),
        step=parts.step,
        learning_rate=0.01,
        max_epochs=1,
        on_batch=lambda state, _: trained.append(state),
        interrupt=lambda: len(trained) == num_batches,
    )
    try:
        ((state, _),) = loop
    except Interrupted as stopped:
        state = stopped.state
        if group.rank == 0:
            save(folder, state)
    return state_digest(state)


def _run(config: RunConfig, cell: Cell, folder: Path, *, num_batches: int = 9) -> str:
    train = partial(_epoch, config, cell, folder=folder, num_batches=num_batches)
    if cell[1] == 1:
        return train(SINGLE_PROCESS)
    with ThreadPoolExecutor(2) as pool:
        (digest,) = set(pool.map(train, RANKS))
    return digest


def test_one_digest_for_all_threads_processes_and_workers_without_and_with_a_change_within_the_epoch(tmp_path):
    expected, table = _run(RANDOM, ALONE, tmp_path / "alone"), {}
    for before, cell in zip([*CELLS[-5:], *CELLS[:-5]], CELLS, strict=True):  # others in all three
        table[cell, "uninterrupted"] = _run(RANDOM, cell, tmp_path / "unused")
        folder = tmp_path / "-".join(map(str, cell))
        _run(RANDOM, before, folder, num_batches=1)
        table[cell, "resumed"] = _run(RANDOM, cell, folder)
    assert {row: digest for row, digest in table.items() if digest != expected} == {}
    assert len(table) == 24


def test_a_model_without_random_numbers_has_one_digest_too(tmp_path):
    digests = {_run(PLAIN, (number, 1, 0), tmp_path) for number in (1, 2, 3, 4, 7)}
    assert len(digests) == 1
    assert digests != {_run(replace(PLAIN, training=replace(PLAIN.training, num_shards=2)), ALONE, tmp_path)}


@pytest.mark.parametrize("kind", ["tts", "ttst", "tto", "autoencoder"])
def test_transformers_and_the_autoencoder_have_one_digest_too(kind: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"input_embedded_size": 8, "nheads": 2, "n_layers_e": 1, "dropout_rate": 0.3}
    if kind == "ttst":
        options["target_embedded_size"] = 4
    if kind == "autoencoder":
        options = {"latent_space_dims": 4, "first_channels": 2}
    batches = replace(RANDOM.batches, nb_points=33 if kind == "autoencoder" else None)
    config = replace(RANDOM, model=ModelConfig(model=kind, **options), batches=batches)
    cells: tuple[Cell, ...] = ALONE, (4, 1, 0), (1, 2, 0), (2, 2, 2)
    digests = {cell: _run(config, cell, tmp_path) for cell in cells}
    assert set(digests.values()) == {digests[ALONE]}, digests


def test_stopped_with_one_thread_resumed_with_four_and_then_with_two_processes(tmp_path):
    config = replace(RANDOM, training=replace(RANDOM.training, max_epochs=2))
    expected = results(trained(tmp_path, config, "alone"))

    def stop(state: TrainState, metrics: Any) -> None:
        if state.batch == 1:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        list(run_experiment(create_experiment(tmp_path, "run", config), prepare(config), on_batch=stop))
    parts, state, history = resume_experiment(tmp_path / "run", num_threads=4)
    assert (state.epoch, state.batch, parts.config.training.num_threads) == (0, 1, 4)
    with pytest.raises(RuntimeError):
        list(run_experiment(tmp_path / "run", parts, state=state, history=history, on_batch=stop))
    run_ranks(2, "resume", tmp_path, "run", "--num-threads", 2)
    assert differences(results(tmp_path / "run"), expected) == []
    assert read_config(tmp_path / "run").training.num_threads == 2
    assert audit_experiment(tmp_path / "run").problems == ()


def test_a_run_without_shards_keeps_its_number_of_threads(cli, tmp_path):
    trained(tmp_path, CONFIG)
    cli("resume", tmp_path, "run", "--num-threads", 2, "--new-max-epochs", 3).check_refusal(
        "--num-threads 2: results of a run without shards depend on it, and this one began with 1"
    )


class _Noisy(torch.nn.Module):
    """Draws random numbers from its third step on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return torch.nn.functional.dropout(self.linear(x), 0.5) if self.calls > 2 else self.linear(x)


def _square(model: Any, x: Tensor) -> tuple[Tensor, int]:
    return model(x).square().mean(), len(x)


def test_a_model_that_draws_from_its_third_step_on_has_the_bits_of_one_thread():
    def final(num_threads: int) -> str:
        model = _Noisy()
        torch.nn.init.ones_(model.linear.weight)
        torch.nn.init.zeros_(model.linear.bias)
        state, loss_fn = init_state(model, sgd(), seed=0), module_loss(model, _square)
        shards = [torch.full((number, 3), float(number)) for number in (3, 1, 4, 2)]
        gradient_fn = sharded_value_and_grad(num_threads=num_threads)
        before = torch.get_rng_state()
        for _ in range(5):
            state, _ = train_step(state, shards, loss_fn=loss_fn, optimizer=sgd(), lr=0.1, gradient_fn=gradient_fn)
        assert torch.equal(torch.get_rng_state(), before)
        return state_digest(state)

    assert final(3) == final(1)


def test_the_functions_run_side_by_side_in_order_and_with_the_callers_grad_mode():
    barrier = threading.Barrier(2, timeout=60)

    def meet(number: int) -> tuple[int, bool, int]:
        barrier.wait()  # would break if they ran one after the other
        return number, torch.is_grad_enabled(), torch.get_num_threads()

    with torch.no_grad():
        assert ShardThreads(2).run([partial(meet, 1), partial(meet, 2)]) == [(1, False, 1), (2, False, 1)]


def test_one_function_and_those_of_a_transform_stay_in_the_callers_thread():
    threads, here = ShardThreads(2), threading.get_ident()
    assert threads.run([threading.get_ident]) == [here]

    def mapped(x: Tensor) -> Tensor:
        assert threads.run([threading.get_ident] * 3) == [here] * 3
        return x

    torch.func.vmap(mapped)(torch.ones(2))
    assert here not in threads.run([threading.get_ident] * 3)


def test_functions_that_draw_are_called_again_only_the_first_time():
    threads, calls = ShardThreads(2), []

    def draw(number: int) -> float:
        calls.append(number)
        with torch_rng(Key(number)):
            return float(torch.rand(()))

    first = threads.run([partial(draw, 1), partial(draw, 2)])
    assert sorted(calls) == [1, 1, 2, 2]
    assert threads.run([partial(draw, 1), partial(draw, 2)]) == first == [draw(1), draw(2)]
    assert sorted(calls[4:]) == [1, 1, 2, 2]  # once by the threads, once here


def test_each_operation_of_a_thread_runs_on_one_thread():
    torch.set_num_threads(2)
    try:
        assert ShardThreads(2).run([torch.get_num_threads] * 4) == [1] * 4
    finally:
        torch.set_num_threads(1)


def test_an_error_in_a_shard_is_that_of_one_thread():
    def loss_fn(params: Any, buffers: Any, batch: Tensor, *, key: Key, train: bool) -> LossOut:
        if len(batch) == 2:
            raise ZeroDivisionError("in the second shard")
        return LossOut((params["w"] * batch).mean(), len(batch), buffers, {})

    gradient = sharded_value_and_grad(num_threads=2)
    with pytest.raises(ZeroDivisionError, match="in the second shard"):
        gradient(loss_fn, {"w": torch.ones(())}, {}, [torch.ones(1), torch.ones(2)], key=Key(0))


def test_an_error_waits_for_the_other_functions():
    threads, fails, ended = ShardThreads(2), threading.Event(), []

    def fail() -> None:
        fails.set()
        raise ZeroDivisionError

    def follow() -> None:
        assert fails.wait(60)
        for _ in range(200):
            _ = torch.ones(100, 100) @ torch.ones(100, 100)
        ended.append(True)

    with pytest.raises(ZeroDivisionError):
        threads.run([fail, follow])
    assert len(ended) == 2  # without seeds, and then with them


@pytest.mark.parametrize("num_threads", [1, 2])
def test_shards_run_in_other_threads_where_there_are_to_be_several(num_threads):
    here, seen = threading.get_ident(), []

    def loss_fn(params: Any, buffers: Any, batch: Tensor, *, key: Key, train: bool) -> LossOut:
        seen.append(threading.get_ident() == here)
        return LossOut((params["w"] * batch).mean(), len(batch), buffers, {})

    params, shards = {"w": torch.ones(())}, [torch.ones(1), torch.ones(2)]
    sharded_value_and_grad(num_threads=num_threads)(loss_fn, params, {}, shards, key=Key(0))
    sharded_loss(loss_fn, num_threads=num_threads)(params, {}, shards, key=Key(0), train=True)
    assert set(seen) == {num_threads == 1}


def test_threads_may_call_one_module_loss_side_by_side():
    model = torch.nn.LSTM(3, 4, batch_first=True)
    loss_fn = module_loss(model, lambda model, x: (model(x)[0].square().mean(), len(x)))
    params = dict(model.named_parameters())
    tried = [{name: tensor.detach() * number for name, tensor in params.items()} for number in range(1, 9)]

    def loss_and_gradient(params: dict[str, Tensor]) -> list[Tensor]:
        out, grads = value_and_grad(loss_fn, params, {}, torch.ones(2, 60, 3), key=Key(0))
        return [out.loss, *grads.values()]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(loss_and_gradient, tried * 4))
    for one, params in zip(found, tried * 4, strict=True):
        assert all(map(torch.equal, one, loss_and_gradient(params)))


def test_no_threads_are_refused() -> None:
    loss_fn = module_loss(torch.nn.Linear(3, 2), _square)
    for make in (sharded_value_and_grad, partial(sharded_loss, loss_fn)):
        with pytest.raises(ValueError, match="num_threads: expected"):
            make(num_threads=0)
