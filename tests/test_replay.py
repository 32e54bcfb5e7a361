"""Claims about steps that the host never waits for: CUDA graphs (their capture replaced by a call on the CPU), sums."""

import copy
import logging
from functools import partial

import pytest
import torch
from test_compiled_step import make_steps as make_steps_with
from test_compiled_step import same_states, some_batch, squared_error

from dwiml_func import adam, epoch_fn, init_state, jit_step, module_loss, radam, train_step
from dwiml_func.compiled._torch_private import missing
from dwiml_func.compiled.replay import Replays
from dwiml_func.compiled.sums import VectorSums, add_vectors
from dwiml_func.core.metrics import Sum, add_metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.skipif(bool(missing("eager")), reason="this torch cannot compile steps: see test_torch_private.py"),
]
make_steps = partial(make_steps_with, backend="eager")


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 1)
    )


def rate(step: int) -> float:
    return 0.1 / (1 + step)


def take_steps(step, state, batches):
    for batch in batches:
        state, _ = step(state, batch, lr=rate(state.step))
    return state


@pytest.mark.parametrize("non_finite", ["raise", "defer"])
def test_a_replayed_step_follows_schedule_dropout_and_buffers_to_the_bit(non_finite):
    options = {"optimizer": radam(), "donate": True, "non_finite": non_finite, "max_compilations": 4}
    batches = [some_batch(number, size) for number, size in enumerate([8, 8, 8, 4, 8, 4, 4, 8])]
    start, compiled, _ = make_steps(make_model(), **options)
    state = take_steps(compiled, copy.deepcopy(start), batches)
    captured = []
    compiled._replays = Replays(max_graphs=2, capture=lambda step: captured.append(step) or step)
    replayed = take_steps(compiled, copy.deepcopy(start), batches)
    assert same_states(replayed, state)
    assert [*map(float, replayed.sums["loss"])] == [*map(float, state.sums["loss"])]
    assert (len(captured), compiled.num_cuda_graphs, compiled.cuda_graphs_reason) == (2, 2, None)
    kept = copy.deepcopy(replayed)
    other = take_steps(compiled, copy.deepcopy(start), batches)  # a run of its own tensors: a third graph
    assert same_states(other, state)
    assert same_states(replayed, kept)
    assert compiled.cuda_graphs_reason == "more than 2 graphs would be needed"


def test_what_cannot_be_captured_says_why_once_and_runs(caplog):
    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    start, compiled, eager = make_steps(donate=True)
    compiled._replays = Replays(max_graphs=2, capture=refuse)
    with caplog.at_level(logging.WARNING):
        state = take_steps(compiled, copy.deepcopy(start), [some_batch(1)] * 5)
    messages = [record.message for record in caplog.records if record.name == "dwiml_func.compiled.replay"]
    assert messages == [
        "Training steps run without CUDA graphs from now on: operation not permitted when stream is capturing"
    ]
    torch.testing.assert_close(state.params, take_steps(eager, start, [some_batch(1)] * 5).params)
    with pytest.raises(ValueError, match="Expected donate=True with cuda_graphs=True"):
        jit_step(loss_fn=module_loss(make_model(), squared_error), optimizer=adam(), cuda_graphs=True)


def test_no_number_is_read_in_a_step_with_a_deferred_check(monkeypatch):
    start, compiled, eager = make_steps(donate=True, non_finite="defer")
    batches = [some_batch(number) for number in range(6)]
    reference = epoch_fn(copy.deepcopy(start), batches, step=partial(eager, lr=0.1))
    state = take_steps(compiled, start, batches[:3])  # the first two go through torch.compile
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a number was read"))
        state = take_steps(compiled, state, batches[3:])
    assert float(state.sums["loss"].weight) == float(reference[1]["loss"].weight) == 48
    assert float(state.sums["non_finite"].weight) == 0


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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_on_a_gpu_replays_have_the_bits_of_compiled_steps_and_never_wait():
    def device(batch):
        return tuple(tensor.cuda() for tensor in batch)

    fixed = {"loss_fn": module_loss(make_model(), squared_error), "optimizer": adam(), "donate": True}
    batches = [device(some_batch(number)) for number in range(8)]
    ends = []
    for is_captured in (False, True):
        step = jit_step(**fixed, cuda_graphs=is_captured)
        state = init_state(make_model(), adam(), seed=0).to("cuda")
        state = take_steps(step, state, batches[:4])
        torch.cuda.set_sync_debug_mode("error")
        try:
            state = take_steps(step, state, batches[4:])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ends.append(state.to("cpu"))
        assert (step.num_cuda_graphs, step.cuda_graphs_reason) == (int(is_captured), None)
    assert same_states(*ends)
    on_cpu = partial(train_step, **fixed)
    assert torch.isfinite(next(iter(on_cpu(ends[0], some_batch(1), lr=0.1)[0].params.values()))).all()
