"""Claims about steps that the host never waits for: CUDA graphs (their capture replaced by a call on the CPU), sums."""

import copy
import logging
import math
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from experiment_cases import CONFIG
from graph_recorder import recorded
from test_compiled_step import make_steps as make_steps_with
from test_compiled_step import same_states, some_batch, squared_error
from torch.utils._pytree import tree_leaves

from dwiml_func import (
    Key,
    adam,
    ema,
    fold_in,
    init_state,
    jit_step,
    module_loss,
    radam,
    sgd,
    torch_rng,
    train_step,
)
from dwiml_func.compiled import cuda_graphs
from dwiml_func.compiled.cuda_graphs import OnCuda, Replays
from dwiml_func.compiled.direct import leaves_of
from dwiml_func.compiled.sums import VectorSums, add_vectors, vector_of
from dwiml_func.core import metrics
from dwiml_func.core.metrics import add_metrics
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.optim import accumulate, chain, clip_by_global_norm, clip_by_value
from dwiml_func.types import Sum

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
make_steps = partial(make_steps_with, backend="eager")


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 6, bias=False), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 1)
    )


def rate(step: int) -> float:
    return 0.1 / (1 + step)


def take_steps(step, state, batches):
    for batch in batches:
        state, _ = step(state, batch, lr=rate(state.step))
    return state


def captured_step(max_graphs, capture, **options):
    step = jit_step(**options, cuda_graphs=True, max_compilations=max_graphs)
    assert step._replays is not None
    step._replays._capture = capture
    return step


@pytest.mark.parametrize("non_finite", ["raise", "defer"])
@pytest.mark.parametrize("optimizer", [radam(), chain(clip_by_value(0.5), adam()), ema(sgd(), 0.9)])
def test_a_replayed_step_follows_schedule_dropout_and_buffers_to_the_bit(non_finite, optimizer, monkeypatch):
    monkeypatch.setattr(metrics, "is_transformed", lambda: True)  # no number is read, as on a GPU
    fixed = {"loss_fn": module_loss(make_model(), squared_error), "optimizer": optimizer, "non_finite": non_finite}
    batches = [some_batch(number, size) for number, size in enumerate([8, 8, 8, 8, 4, 8, 4, 4, 8, 4, 2])]
    start = init_state(make_model(), optimizer, seed=3)

    def captured(step):
        number, repeat = len(calls), recorded(step, may_read=False)
        calls.append(0)

        def replay():
            calls[number] += 1
            repeat()

        return replay

    calls: list[int] = []
    kept_out = captured_step(1, captured, **fixed, donate=True)
    assert kept_out._replays is not None
    kept_out._replays._is_stopped = True  # no graph at all
    state = take_steps(kept_out, copy.deepcopy(start), batches)
    eager = take_steps(partial(train_step, **fixed), start, batches)
    assert calls == []
    assert state.sums.keys() == eager.sums.keys()
    for ours, theirs in ((state.params, eager.params), (state.buffers, eager.buffers)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    replays = captured_step(2, captured, **fixed, donate=True)
    replayed = take_steps(replays, copy.deepcopy(start), batches)
    assert same_states(replayed, state)
    assert [*map(float, replayed.sums["loss"])] == [*map(float, state.sums["loss"])]
    assert (calls, replays.num_cuda_graphs, replays.cuda_graphs_reason) == ([4, 2], 2, None)
    kept = copy.deepcopy(replayed)
    other = take_steps(replays, copy.deepcopy(start), batches)  # a run of its own tensors: new graphs
    assert same_states(other, state)
    assert same_states(replayed, kept)
    assert (calls, replays.num_cuda_graphs) == ([4, 2, 5, 4], 4)
    take_steps(replays, other, [some_batch(n, 2) for n in range(2)])
    assert replays.cuda_graphs_reason == "more than 2 would be needed"
    take_steps(replays, take_steps(replays, copy.deepcopy(start), batches), batches[:1])
    assert calls[-2] > 5  # the graphs that there are stay in use


def test_steps_of_learn2track_read_no_number_and_end_bitwise_as_without_graphs(monkeypatch):
    monkeypatch.setattr(metrics, "is_transformed", lambda: True)
    monkeypatch.setattr(TrainingConfig, "captures", property(lambda training: training.compile))
    options = {"compile": True, "pad_batches": "on", "skip_window_lag": True}
    model = replace(CONFIG.model, dropout=0.2)
    parts = prepare(replace(CONFIG, model=model, training=replace(CONFIG.training, **options)))
    batches, ends = [*parts.train(Key(1), 0, 0), *parts.train(Key(1), 0, 0)], []
    for is_captured in (False, True):
        step = captured_step(
            64, partial(recorded, may_read=False), loss_fn=parts.loss_fn, optimizer=adam(), donate=True
        )
        assert step._replays is not None
        step._replays._is_stopped = not is_captured
        ends.append(take_steps(step, init_state(parts.model, adam(), seed=1), batches))
        assert (step.num_cuda_graphs > 0, step.cuda_graphs_reason) == (is_captured, None)
    assert same_states(*ends)


def test_what_cannot_be_captured_says_why_once_and_runs(caplog):
    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def with_key(params, buffers, batch, *, key, train):
        with torch_rng(fold_in(key, 1)):
            return loss_fn(params, buffers, batch, key=key, train=train)

    class Opaque:
        pair = some_batch(1)

    loss_fn = module_loss(make_model(), squared_error)
    of_opaque = module_loss(make_model(), lambda model, batch: squared_error(model, batch.pair))
    start = init_state(make_model(), adam(), seed=3)
    for loss, capture, message, batch in (
        (loss_fn, refuse, "operation not permitted when stream is capturing", some_batch(1)),
        (with_key, lambda step: step, "a key cannot be used in a compiled step", some_batch(1)),
        (of_opaque, refuse, "the batch has parts other than tensors, numbers and texts", Opaque()),
    ):
        fixed = {"loss_fn": loss, "optimizer": adam(), "donate": True}
        step = captured_step(2, capture, **fixed)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            state = take_steps(step, copy.deepcopy(start), [batch] * 5)
        messages = [record.message for record in caplog.records if record.name == "dwiml_func.compiled.cuda_graphs"]
        assert messages == [f"Training steps run without CUDA graphs from now on: {message}"]
        expected = take_steps(partial(train_step, **fixed), copy.deepcopy(start), [batch] * 5)
        torch.testing.assert_close(state.params, expected.params)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA device was found"):
            OnCuda()(lambda: None)
    with pytest.raises(ValueError, match="Expected donate=True with cuda_graphs=True"):
        jit_step(loss_fn=loss_fn, optimizer=adam(), cuda_graphs=True)


@pytest.mark.parametrize("kind", ["the same tensor twice", "views of many", "one row for all"])
def test_a_replay_reads_the_batch_that_it_is_given(kind):
    """Whatever the first batches share: each tensor has a place of its own in the graph."""

    def batch(number, *, first):
        inputs, more = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(number))
        if kind == "the same tensor twice":
            return inputs, inputs if first else more
        if kind == "views of many":
            return many[number], more
        return inputs, more[:1].expand(8, 3)

    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean(), len(batch[0])

    many, taken = torch.randn(50, 8, 3, generator=torch.Generator().manual_seed(9)), []
    fixed = {"loss_fn": module_loss(torch.nn.Linear(3, 3), loss), "optimizer": sgd(), "donate": True}
    start = init_state(torch.nn.Linear(3, 3), sgd(), seed=0)
    batches = [batch(number, first=number < 4) for number in range(8)]
    step, without = (captured_step(8, lambda step: taken.append(0) or step, **fixed) for _ in range(2))
    assert step._replays is not None
    assert without._replays is not None
    without._replays._is_stopped = True
    state = take_steps(step, copy.deepcopy(start), batches)
    assert same_states(state, take_steps(without, copy.deepcopy(start), batches))
    assert len(taken) == (2 if kind == "the same tensor twice" else 1)
    for replay in step._replays._replays.values():
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes == 8 * 3 * 4 for tensor in replay._batch)


@pytest.mark.parametrize("optimizer", [radam(), chain(accumulate(2), clip_by_global_norm(0.5), ema(adam(), 0.9))])
def test_a_replay_keeps_all_from_a_batch_on_that_is_not_finite(optimizer):
    fixed = {"loss_fn": module_loss(make_model(), squared_error), "optimizer": optimizer, "non_finite": "defer"}
    step = captured_step(1, lambda step: step, **fixed, donate=True)
    state = take_steps(step, init_state(make_model(), optimizer, seed=3), [some_batch(n) for n in range(5)])
    kept = copy.deepcopy(state)
    inputs, targets = some_batch(5)
    state = take_steps(step, state, [(inputs * math.nan, targets), some_batch(6), some_batch(7)])
    assert step.num_cuda_graphs == 1
    assert state.step == 8
    assert [*map(float, state.sums["non_finite"])] == [5.0, 1.0]
    for name in ("params", "buffers", "opt_state"):
        ours, theirs = (tree_leaves(getattr(own, name)) for own in (state, kept))
        assert all(map(torch.equal, ours, theirs))


def test_a_step_with_tensors_elsewhere_is_not_captured():
    """A capture would run what the host computes once, and never again."""
    x = torch.ones(2)
    replays = Replays(
        lambda batch, params, buffers, opt_state, numbers: (params, buffers, opt_state, (), numbers),
        max_graphs=2,
        capture=lambda step: pytest.fail("it was captured"),
    )
    batch = (x, x.to("meta"))
    for _ in range(4):
        leaves = leaves_of(batch, ({"w": x}, {}, {}), None)
        assert replays(batch, leaves, torch.zeros(3)) is not None
    assert replays.reason == "tensors of the batch or of the state are not on cpu"


def taken_by(replays: Replays, size: int, *, state: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    """The next state after a step, on a batch of ones of that size."""
    batch, state = torch.ones(size, dtype=dtype), {"w": torch.zeros(2)} if state is None else state
    results = replays(batch, leaves_of(batch, (state, {}, {}), 0), torch.tensor([0.5, 1.0]))
    return None if results is None else results[0]


def add_batch(batch: Any, params: Any, buffers: Any, opt_state: Any, numbers: torch.Tensor) -> Any:
    return {"w": params["w"] + batch.sum() * numbers[0]}, buffers, opt_state, ("loss",), numbers + batch.sum()


def record(step: Any) -> Any:
    return step


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_step_that_fails_before_its_capture_is_taken_again_without_and_other_errors_are_raised(fails_at):
    """The first of all says whether there can be steps at all, the second of a size whether there can be a graph."""
    calls = []

    def function(*given: Any) -> Any:
        calls.append(len(given[0]))
        if len(calls) == fails_at:
            raise RuntimeError("\n it waits\n more")
        return add_batch(*given)

    replays = Replays(function, max_graphs=2, capture=record)
    state, sizes = {"w": torch.zeros(2)}, (3, 3, 5, 5, 5)
    if fails_at == 3:  # the first of another size
        for size in (3, 3):
            state = taken_by(replays, size, state=state)
        with pytest.raises(RuntimeError, match="it waits"):
            taken_by(replays, 5, state=state)
        assert (calls, replays.reason) == ([3, 3, 5], None)
        return
    states = [state := taken_by(replays, size, state=state) for size in sizes]
    assert replays.reason == "it waits"
    assert replays.num_graphs == 0
    if fails_at == 1:
        assert (calls, states) == ([3], [None] * 5)
    else:
        assert [new["w"].tolist() for new in states] == [[n] * 2 for n in (1.5, 3, 5.5, 8, 10.5)]
        assert len(calls) == 6
    if fails_at == 2:  # once stopped, nothing is taken again
        calls[:] = [0]
        with pytest.raises(RuntimeError, match="it waits"):
            taken_by(replays, 7)


def test_each_size_and_dtype_has_a_graph_on_the_state_that_it_gave_last(caplog):
    replays = Replays(add_batch, max_graphs=2, capture=record)
    state = {"w": torch.zeros(2)}
    for number in range(4):
        state = taken_by(replays, 3, state=state)
        assert replays.num_graphs == (number >= 2)
    place = state["w"]
    assert state["w"].tolist() == [6.0, 6.0]
    for _ in range(4):
        state = taken_by(replays, 3, state=state, dtype=torch.float64)
    assert (replays.num_graphs, state["w"].tolist()) == (2, [12.0, 12.0])
    assert place is not state["w"]
    for _ in range(4):
        state = taken_by(replays, 5, state=state)
    assert (replays.num_graphs, replays.reason) == (2, "more than 2 would be needed")
    state = taken_by(replays, 5, state=state)
    assert state["w"].tolist() == [24.5, 24.5]
    assert [record.message for record in caplog.records] == [
        "Some training steps run without CUDA graphs from now on: more than 2 would be needed"
    ]


def test_a_replay_gives_values_of_its_own_and_copies_numbers_and_batches_into_its_own():
    replays, state = Replays(add_batch, max_graphs=1, capture=record), {"w": torch.zeros(2)}
    found = []
    for number in range(5):
        batch, numbers = torch.full((2,), number + 1.0), torch.tensor([1.0, number])
        results = replays(batch, leaves_of(batch, (state, {}, {}), 0), numbers)
        assert results is not None
        state, *_, names, values = results
        found.append(values)
        assert (batch.tolist(), numbers.tolist(), names) == ([number + 1.0] * 2, [1.0, number], ("loss",))
    assert [values.tolist() for values in found] == [[2.0 * n + 3, 3.0 * n + 2] for n in range(5)]
    assert state["w"].tolist() == [30.0, 30.0]


def test_a_state_of_which_one_tensor_is_another_has_a_graph_of_its_own_tensors():
    def read(batch: Any, params: Any, buffers: Any, opt_state: Any, numbers: torch.Tensor) -> Any:
        return {"w": params["w"] + params["v"], "v": params["v"]}, buffers, opt_state, ("loss",), numbers

    replays = Replays(read, max_graphs=2, capture=record)
    state = {"w": torch.zeros(1), "v": torch.ones(1)}
    for _ in range(3):
        state = taken_by(replays, 3, state=state)
    assert (replays.num_graphs, state["w"].item()) == (1, 3.0)
    kept, other = state["v"], torch.full((1,), 5.0)
    state = taken_by(replays, 3, state={**state, "v": other})
    assert (replays.num_graphs, state["w"].item(), kept.item()) == (2, 8.0, 1.0)
    assert state["v"] is other


def test_a_state_that_changes_its_structure_has_no_graph():
    def rename(batch: Any, params: Any, *rest: Any) -> Any:
        new, *others = add_batch(batch, params, *rest)
        return (new if "w" not in params else {"v": new["w"]}), *others

    def capture(step: Any) -> Any:
        step()
        return step

    replays = Replays(rename, max_graphs=1, capture=capture)
    state = {"w": torch.zeros(2)}
    for number in range(1, 4):
        state = {"w": taken_by(replays, 3, state=state)["v"]}
        assert state["w"].tolist() == [1.5 * number] * 2
    assert replays.reason == "the state gets another structure"


def test_an_error_without_words_is_named_by_its_type():
    def refuse(step: Any) -> Any:
        raise MemoryError

    replays = Replays(add_batch, max_graphs=1, capture=refuse)
    state = {"w": torch.zeros(2)}
    for number in range(1, 4):
        state = taken_by(replays, 3, state=state)
        assert state["w"].tolist() == [1.5 * number] * 2
    assert replays.reason == "MemoryError"


def test_captures_share_a_stream_and_a_pool_which_the_newest_graph_keeps(monkeypatch):
    captured: list[dict[str, Any]] = []

    class Stream:
        pass

    class Graph:
        def replay(self) -> str:
            return "replayed"

    @contextmanager
    def capturing(graph: Any, **options: Any) -> Iterator[None]:
        captured.append(options)
        calls.append("begin")
        yield  # an error passes: torch may then leave the stream of the capture
        calls.append("end")

    calls: list[str] = []
    for name, value in {"is_available": lambda: True, "graph_pool_handle": object, "Stream": Stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", calls.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    capture = OnCuda()
    replays = [capture(lambda: calls.append("step")) for _ in range(2)]
    assert calls == ["begin", "step", "end", "before"] * 2
    calls.clear()
    with pytest.raises(IndexError):
        capture(lambda: print(calls[7]))
    assert calls == ["begin", "before"]
    assert [replay() for replay in replays] == ["replayed"] * 2
    assert captured[0] == captured[1]
    assert isinstance(captured[0]["stream"], Stream)
    assert captured[0].keys() == {"pool", "stream", "capture_error_mode"}
    assert captured[0]["capture_error_mode"] == "thread_local"
    newest = weakref.ref(getattr(replays[1], "__self__"))  # noqa: B009
    del replays
    assert newest() is not None


def test_waiting_is_an_error_only_on_a_cuda_device_and_only_in_the_step_before_a_capture(monkeypatch):
    def set_mode(mode: Any) -> None:
        if mode == "error":
            warnings.warn("a prototype", stacklevel=2)
        modes.append(mode)

    modes: list[Any] = [1]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with cuda_graphs._no_waits(torch.device("cpu")):
        assert modes == [1]
    with pytest.raises(KeyError, match=r"\[1, 'error'\]"), cuda_graphs._no_waits(torch.device("cuda")):
        raise KeyError(modes.copy())
    assert modes == [1, "error", 1]
    entered = []
    monkeypatch.setattr(cuda_graphs, "_no_waits", lambda device: entered.append(device) or nullcontext())
    replays, state = Replays(add_batch, max_graphs=1, capture=record), {"w": torch.zeros(2)}
    for number in range(4):
        state = taken_by(replays, 3, state=state)
        assert len(entered) == (number >= 1)
    assert entered == [torch.device("cpu")]


@pytest.mark.compiles
@pytest.mark.parametrize("optimizer", [radam(), chain(clip_by_value(0.5), adam())])
def test_no_number_is_read_in_a_step_with_a_deferred_check_and_one_graph_follows_schedule_and_dropout(
    optimizer, monkeypatch
):
    fixed = {"optimizer": optimizer, "clip_grad": 0.1, "donate": True, "non_finite": "defer"}
    start, compiled, eager = make_steps(make_model(), **fixed)
    batches = [some_batch(number) for number in range(6)]
    reference = take_steps(eager, copy.deepcopy(start), batches)
    state = take_steps(compiled, start, batches[:3])  # the first two go through torch.compile
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a number was read"))
        state = take_steps(compiled, state, batches[3:])
    assert compiled.num_compilations == 1
    torch.testing.assert_close(state.params, reference.params)
    for name in ("loss", "grad_norm", "non_finite"):
        ours, theirs = ([*map(float, own.sums[name])] for own in (state, reference))
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_sums_of_the_same_names_are_added_as_one_vector_also_to_those_that_were_restored():
    new = VectorSums(("a", "b"), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    restored = {"a": Sum(10.0, 1.0), "b": Sum(torch.tensor(20.0), 2)}
    for sums in (restored, VectorSums(("a", "b"), torch.tensor([10.0, 1.0, 20.0, 2.0], dtype=torch.float64))):
        total = add_vectors(sums, new)
        assert isinstance(total, VectorSums)
        assert {name: (float(s.total), float(s.weight)) for name, s in total.items()} == {"a": (11, 3), "b": (23, 6)}
    assert add_vectors({}, new) is new
    for others in ({"b": Sum(20.0, 2.0), "a": Sum(10.0, 1.0)}, {"c": Sum(5.0, 5.0)}):
        assert add_vectors(others, new) == add_metrics(others, new)
    assert vector_of(torch.device("meta"), 1.0).is_meta  # a device that is not the CPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("optimizer", [radam(), chain(clip_by_value(0.5), adam()), ema(sgd(), 0.9)])
def test_on_a_gpu_replays_have_the_bits_of_steps_without_a_graph_and_never_wait(optimizer):
    def device(batch):
        return tuple(tensor.cuda() for tensor in batch)

    fixed = {"loss_fn": module_loss(make_model(), squared_error), "optimizer": optimizer, "donate": True}
    batches = [device(some_batch(number)) for number in range(8)]
    ends = []
    for is_captured in (False, True):
        step = jit_step(**fixed, cuda_graphs=True)
        assert step._replays is not None
        step._replays._is_stopped = not is_captured
        state = init_state(make_model(), optimizer, seed=0).to("cuda")
        state = take_steps(step, state, batches[:4])
        torch.cuda.set_sync_debug_mode("error")
        try:
            state = take_steps(step, state, batches[4:])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ends.append(state.to("cpu"))
        assert (step.num_cuda_graphs, step.cuda_graphs_reason) == (int(is_captured), None)
    assert same_states(*ends)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_on_a_gpu_a_loss_that_waits_is_found_before_its_capture_and_trains_on():
    def waits(model, batch):
        loss, weight = squared_error(model, batch)[:2]
        return loss * (2.0 if loss.item() > 0 else 1.0), weight

    step = jit_step(loss_fn=module_loss(make_model(), waits), optimizer=adam(), donate=True, cuda_graphs=True)
    batch = tuple(tensor.cuda() for tensor in some_batch(1))
    state = take_steps(step, init_state(make_model(), adam(), seed=0).to("cuda"), [batch] * 5)
    assert (state.step, step.num_cuda_graphs) == (5, 0)
    assert "synchronizing" in str(step.cuda_graphs_reason)
