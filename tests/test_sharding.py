"""Gradients of shards are those of the whole batch, and their bits do not depend on who computes which."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dwiml_func import (
    Key,
    LossOut,
    adam,
    eval_step,
    init_state,
    module_loss,
    sgd,
    torch_rng,
    train_step,
    value_and_grad,
)
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.distributed.process_group import (
    ProcessLostError,
    _Group,
    join_process_group,
    rank_in,
    rank_zero_first,
)
from dwiml_func.distributed.sharding import (
    SINGLE_PROCESS,
    ProcessGroup,
    check_shards,
    sharded_loss,
    sharded_value_and_grad,
)

Shards = Sequence[Tensor | None]


class Threads:
    """Processes that train together, played by threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.given: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=300)

    def run(self, function: Callable[[ProcessGroup], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(function, [Member(self, rank) for rank in range(self.size)]))


class Member:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank, self.size = threads, rank, threads.size

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self.threads.given[self.rank] = tensor.clone()
        self.threads.barrier.wait()
        gathered = [tensor.clone() for tensor in self.threads.given]
        self.threads.barrier.wait()
        return gathered


def _model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to(dtype)


def _loss(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, int, dict[str, Any]]:
    outputs = model(x)
    positive = (x[:, 0] > 0).to(x.dtype)
    share = (outputs[:, 0] * positive).sum() / positive.sum()  # NaN where none is positive
    return outputs.square().mean(), len(x), {"size": outputs.abs().mean(), "share": (share, float(positive.sum()))}


def _rows(num_rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(num_rows), dtype=dtype)


def _cut(rows: Tensor, sizes: Sequence[int]) -> Shards:
    return [piece if len(piece) else None for piece in rows.split(list(sizes))]


sizes_of_shards = st.lists(st.integers(0, 5), min_size=0, max_size=11).map(lambda sizes: [3, *sizes])


@given(sizes_of_shards)
def test_the_gradient_and_the_means_are_those_of_the_whole_batch(sizes: list[int]) -> None:
    model, rows = _model(torch.float64), _rows(sum(sizes), torch.float64)
    params, loss_fn = dict(model.named_parameters()), module_loss(model, _loss)
    whole, expected = value_and_grad(loss_fn, params, {}, rows, key=Key(0))
    out, grads = sharded_value_and_grad()(loss_fn, params, {}, _cut(rows, sizes), key=Key(0))
    assert list(grads) == list(expected)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-14)
    assert out.weight == whole.weight
    torch.testing.assert_close(out.loss, whole.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.aux["size"][0], whole.aux["size"], rtol=1e-12, atol=0)
    torch.testing.assert_close(out.aux["share"][0], whole.aux["share"][0], rtol=1e-11, atol=1e-12, equal_nan=True)
    assert out.aux["share"][1] == whole.aux["share"][1]


MODEL = _model()  # once: threads share the global generator that initial values are drawn from


def _train(process_group: ProcessGroup, batches: Sequence[Shards]) -> str:
    # Without a seed for random numbers: threads share torch's global generator.
    loss_fn, optimizer = module_loss(MODEL, _loss, stochastic=False), adam(weight_decay=0.01)
    state = init_state(MODEL, optimizer, seed=3)
    step = partial(
        train_step,
        loss_fn=loss_fn,
        optimizer=optimizer,
        clip_grad=0.5,
        gradient_fn=sharded_value_and_grad(process_group),
        donate=True,
    )
    for batch in batches:
        state, _ = step(state, batch, lr=0.01)
    return state_digest(state)


@pytest.mark.parametrize(
    ("num_shards", "num_processes"), [(2, 2), (4, 2), (4, 4), (6, 2), (6, 3), (12, 4), (12, 6), (5, 5), (8, 2)]
)
def test_any_number_of_processes_trains_bitwise_identically(num_shards: int, num_processes: int) -> None:
    sizes = [5 + number % 3 for number in range(num_shards)]
    batches = [_cut(_rows(sum(sizes) + 7 * index)[: sum(sizes)], sizes) for index in range(4)]
    alone = _train(SINGLE_PROCESS, batches)
    assert Threads(num_processes).run(partial(_train, batches=batches)) == [alone] * num_processes
    assert (
        _train(SINGLE_PROCESS, [[torch.cat([rows for rows in batch if rows is not None])] for batch in batches])
        != alone
    )


@settings(max_examples=10)
@given(sizes_of_shards.filter(lambda sizes: len(sizes) % 2 == 0))
def test_empty_shards_change_no_bit_between_processes(sizes: list[int]) -> None:
    batches = [_cut(_rows(sum(sizes)), sizes)] * 2
    assert Threads(2).run(partial(_train, batches=batches)) == [_train(SINGLE_PROCESS, batches)] * 2


def test_each_shard_draws_by_its_number() -> None:
    rows = torch.ones(1, 3)
    model = torch.nn.Dropout(0.5)
    seen = []

    def loss_fn(params: Any, buffers: Any, batch: Tensor, *, key: Key, train: bool) -> LossOut:
        seen.append(key)
        with torch_rng(key):
            return LossOut((params["w"] * model(batch)).mean(), 1, buffers, {})

    sharded_value_and_grad()(loss_fn, {"w": torch.ones(())}, {}, [rows] * 3, key=Key(5, (2, 0, 7)))
    expected = [Key(5, (2, 0, 7, number)) for number in range(3)]
    assert seen[-3:] == expected  # the first shard is tried before
    seen.clear()
    sharded_loss(loss_fn)({"w": torch.ones(())}, {}, [rows, None, rows], key=Key(5, (2, 0, 7)), train=False)
    assert seen == expected


def test_evaluation_gives_the_means_of_the_whole_batch_on_any_number_of_processes() -> None:
    model, rows = _model(), _rows(23)
    state = init_state(model, sgd(), seed=0)
    loss_fn = module_loss(model, _loss)
    shards = _cut(rows, [9, 1, 13, 0])
    whole = eval_step(state, rows, loss_fn=loss_fn)

    def evaluated(process_group: ProcessGroup) -> Any:
        # A loss of its own for each thread: `module_loss` is not to be called from several at once.
        return eval_step(
            state, shards, loss_fn=sharded_loss(module_loss(model, _loss, stochastic=False), process_group)
        )

    alone = evaluated(SINGLE_PROCESS)
    assert Threads(4).run(evaluated) == [alone] * 4
    for name, total in whole.items():
        assert alone[name].weight == total.weight
        assert alone[name].total == pytest.approx(total.total, rel=1e-5)


def test_buffers_are_those_of_the_first_shard() -> None:
    model = torch.nn.BatchNorm1d(3)
    model.register_buffer("fixed", torch.ones(2))  # beside those that change

    def loss(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, int]:
        return model(x).square().mean(), len(x)

    shards = _cut(_rows(20), [9, 11])
    state = init_state(model, sgd(), seed=0)

    def stepped(process_group: ProcessGroup) -> str:
        step = partial(train_step, loss_fn=module_loss(model, loss, stochastic=False), optimizer=sgd(), lr=0.1)
        return state_digest(step(state, shards, gradient_fn=sharded_value_and_grad(process_group))[0])

    alone = stepped(SINGLE_PROCESS)
    assert Threads(2).run(stepped) == [alone] * 2
    out, _ = value_and_grad(module_loss(model, loss), state.params, state.buffers, shards[0], key=Key(0))
    both, _ = sharded_value_and_grad()(module_loss(model, loss), state.params, state.buffers, shards, key=Key(0))
    assert all(torch.equal(both.buffers[name], out.buffers[name]) for name in state.buffers)


def test_a_shard_that_has_rows_and_no_point_adds_nothing() -> None:
    """Masked means, as of points that are padding: 0/0 where all are, in the loss and in its gradient."""

    def loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, mask = batch
        return (model(x).square().mean(1) * mask).sum() / mask.sum(), mask.sum()

    model, rows, mask = _model(torch.float64), _rows(6, torch.float64), torch.tensor([1.0, 0, 1, 0, 0, 0])
    params, loss_fn = dict(model.named_parameters()), module_loss(model, loss)
    whole, expected = value_and_grad(loss_fn, params, {}, (rows, mask), key=Key(0))
    shards = list(zip(rows.split(3), mask.split(3), strict=True))
    out, grads = sharded_value_and_grad()(loss_fn, params, {}, shards, key=Key(0))
    torch.testing.assert_close((out.loss, dict(grads)), (whole.loss, dict(expected)))


def test_parameters_of_several_dtypes_keep_theirs() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(3, dtype=torch.float64), "c": torch.ones(1)}

    def loss_fn(params: Any, buffers: Any, batch: Tensor, *, key: Key, train: bool) -> LossOut:
        total = params["a"].sum() * 2 + params["b"].sum() * 3 + params["c"].sum()
        return LossOut((total * batch).mean(), len(batch), buffers, {})

    _, grads = sharded_value_and_grad()(loss_fn, params, {}, [torch.ones(2), torch.ones(5)], key=Key(0))
    assert {name: (grad.dtype, grad.tolist()) for name, grad in grads.items()} == {
        "a": (torch.float32, [2.0, 2.0]),
        "b": (torch.float64, [3.0] * 3),
        "c": (torch.float32, [1.0]),
    }


def test_a_number_of_processes_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 processes cannot share 6 shards .* 1, 2, 3, 6 of processes"):
        check_shards(6, Member(Threads(4), 0))
    with pytest.raises(ValueError, match="at least one point"):
        sharded_loss(lambda *_, **__: LossOut(torch.zeros(()), 0, {}, {}))(
            {}, {}, [torch.ones(1)], key=Key(0), train=False
        )


def test_without_torchrun_a_process_is_alone() -> None:
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "1"}):
        with join_process_group(environment=environment) as process_group:
            assert (process_group.rank, process_group.size) == (0, 1)
            assert rank_zero_first(process_group, lambda: "called") == "called"
    assert (rank_in({}), rank_in({"RANK": "3", "LOCAL_RANK": "1"})) == (0, 3)


def test_each_shard_has_the_backend_that_was_asked_for() -> None:
    given: list[Any] = []

    def gradient_fn(*arguments: Any, backend: Any = None, **options: Any) -> Any:
        given.append(backend)
        return value_and_grad(*arguments, backend=backend, **options)

    model, shards = _model(), _cut(_rows(3), [2, 1])
    params, loss_fn = dict(model.named_parameters()), module_loss(model, _loss)
    sharded_value_and_grad(gradient_fn=gradient_fn)(loss_fn, params, {}, shards, key=Key(0), backend="autograd")
    assert given == ["autograd"] * 2


@pytest.mark.parametrize(
    ("device", "environment", "store", "backend", "devices"),
    [
        ("cpu", {"LOCAL_RANK": "1"}, ("attempt_0", "store"), "gloo", []),
        ("cuda", {"LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "3"}, ("attempt_3", "store"), None, [1]),
        ("cuda", {"GROUP_WORLD_SIZE": "2"}, "store", None, [0]),  # over several machines torchrun makes a new store
    ],
)
def test_processes_of_torchrun_meet_over_its_store(
    monkeypatch: Any, device: str, environment: dict[str, str], store: Any, backend: str | None, devices: list[int]
) -> None:
    called: list[Any] = []
    limit = timedelta(minutes=10)

    def rendezvous(url: str, *, timeout: timedelta) -> Any:
        assert (url, timeout) == ("env://", limit)
        return iter([("store", 1, 3)])

    monkeypatch.setattr("torch.cuda.set_device", called.append)
    monkeypatch.setattr("torch.distributed.rendezvous", rendezvous)
    monkeypatch.setattr("torch.distributed.PrefixStore", lambda prefix, store: (prefix, store))
    monkeypatch.setattr("torch.distributed.init_process_group", lambda name, **how: called.append((name, how)))
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: called.append("left"))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    environment = {"WORLD_SIZE": "3", **environment}
    with suppress(ZeroDivisionError), join_process_group(device, environment=environment) as group:
        assert (group.rank, group.size) == (1, 3)
        assert called[-1] != "left"
        raise ZeroDivisionError
    how = {"store": store, "rank": 1, "world_size": 3, "timeout": limit}
    assert called == [*devices, (backend or "cpu:gloo,cuda:nccl", how), "left"]

    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("connection refused\nand more")

    monkeypatch.setattr("torch.distributed.init_process_group", refused)
    with (
        pytest.raises(ProcessLostError, match=r"could not join the others of this run: connection refused\. See"),
        join_process_group(device, environment=environment),
    ):
        pass


def test_the_first_process_goes_first_and_all_wait_for_all() -> None:
    called, has_left = [], threading.Event()

    def function(rank: int) -> int:
        called.append(rank)
        if rank == 2:
            assert not has_left.wait(0.05)  # no process leaves before the last has called
        return rank

    def work(group: ProcessGroup) -> tuple[int, int]:
        result = rank_zero_first(group, partial(function, group.rank))
        has_left.set()
        return result, len(called)

    assert Threads(3).run(work) == [(0, 3), (1, 3), (2, 3)]
    assert called[0] == 0


def test_what_is_gathered_is_contiguous_and_a_process_that_was_lost_is_said_to_be(monkeypatch: Any) -> None:
    def all_gather(gathered: list[Tensor], tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        for rank, own in enumerate(gathered):
            own.copy_(tensor + rank)

    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    group, numbers = _Group(1, 2), torch.arange(6.0).reshape(2, 3).t()
    assert [own.tolist() for own in group.gather(numbers)] == [numbers.tolist(), (numbers + 1).tolist()]

    def lost(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("torch.distributed.all_gather", lost)
    with pytest.raises(ProcessLostError, match="Another of the 2 processes of this run has ended"):
        group.gather(numbers)
