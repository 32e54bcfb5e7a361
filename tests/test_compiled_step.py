"""Claims about `dwiml_func.compiled.step`: what `train_step` computes, compiled once, for any step and batch."""

import logging
import math
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from test_composed_steps import COMPOSED
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dwiml_func import Key, adam, adamw, init_state, module_loss, radam, sgd, train_step
from dwiml_func.compiled import _torch_private as private
from dwiml_func.compiled.function import CompiledFunction, _numbers, _shortened, _with_tensors, as_float64
from dwiml_func.compiled.gradient import JitGradient
from dwiml_func.compiled.step import jit_step
from dwiml_func.core.loss import LossOut
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.rng import torch_rng

# Torch's own compiler stack warns of what it will change in itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.compiles,
]


def squared_error(model, batch):
    inputs, targets = batch
    return (model(inputs) - targets).square().mean(), len(inputs), {"first_output": model(inputs)[0, 0]}


def make_model(dropout: float = 0.0) -> torch.nn.Module:
    with torch_rng(Key(5)):
        return torch.nn.Sequential(
            torch.nn.Linear(3, 6), torch.nn.Dropout(dropout), torch.nn.Tanh(), torch.nn.Linear(6, 1)
        )


def some_batch(number: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, 3, generator=generator), torch.randn(size, 1, generator=generator)


def make_steps(model=None, compute_batch_loss=squared_error, optimizer=None, backend="eager", **options):
    """The first state, a compiled step and an eager one; unless told, of what is traced in half the time of Adam."""
    if model is None:
        with torch_rng(Key(5)):
            model = torch.nn.Linear(3, 1)
    optimizer = sgd(momentum=0.9) if optimizer is None else optimizer
    loss_fn = module_loss(model, compute_batch_loss)
    jit_options = {name: options.pop(name) for name in ("dynamic", "max_compilations") if name in options}
    options = {"loss_fn": loss_fn, "optimizer": optimizer, **options}
    compiled = jit_step(**options, **jit_options, backend=backend)
    return init_state(model, optimizer, seed=3), compiled, partial(train_step, **options)


def run(step, state, num_steps: int, sizes=(8,)):
    metrics = []
    for number in range(num_steps):
        batch = some_batch(number, sizes[number % len(sizes)])
        state, sums = step(state, batch, lr=0.1 / (number + 1))
        metrics.append(sums)
    return state, metrics


def same_states(first, second) -> bool:
    leaves = [tree_leaves((state.params, state.buffers, state.opt_state)) for state in (first, second)]
    return all(torch.equal(*pair) for pair in zip(*leaves, strict=True))


@pytest.mark.parametrize(
    ("optimizer", "clip_grad", "backend"),
    [
        (sgd(momentum=0.9), 0.1, "eager"),
        (adam(weight_decay=0.1), None, "aot_eager"),
        (adamw(), 0.1, "eager"),
        (radam(), 1, "eager"),
    ],
)
def test_compiled_steps_are_those_of_train_step(optimizer, clip_grad, backend):
    start, compiled, eager = make_steps(make_model(0.5), optimizer=optimizer, clip_grad=clip_grad, backend=backend)
    start = start.replace(epoch=3, batch=2)  # the steps done do not tell the address of the random numbers
    actual, actual_sums = run(compiled, start, 7)
    expected, expected_sums = run(eager, start, 7)
    assert compiled.num_compilations == 1
    assert compiled.eager_reason is None
    torch.testing.assert_close(actual.params, expected.params)
    torch.testing.assert_close(actual.opt_state, expected.opt_state)
    assert (actual.step, actual.batch, actual.epoch, actual.key) == (7, 9, 3, start.key)
    for ours, theirs in zip([*actual_sums, actual.sums], [*expected_sums, expected.sums], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7)


def test_code_made_by_inductor_draws_what_an_eager_step_draws_and_leaves_the_generator_alone():
    start, compiled, eager = make_steps(make_model(0.5), optimizer=COMPOSED["chain"], backend="inductor")
    torch.manual_seed(1)
    generator = torch.get_rng_state()
    actual, sums = run(compiled, start, 4)
    assert torch.equal(torch.get_rng_state(), generator)
    expected, expected_sums = run(eager, start, 4)
    assert compiled.eager_reason is None
    assert [s["loss"].total for s in sums] == pytest.approx([s["loss"].total for s in expected_sums], rel=1e-5)
    torch.testing.assert_close(actual.params, expected.params)
    torch.manual_seed(2)
    again, _ = run(compiled, start, 4)
    assert same_states(again, actual)
    inputs, targets = some_batch(4)
    for state, step in ((actual, compiled), (expected, eager)):  # chain skips a step
        after, sums = step(state, (inputs * torch.nan, targets), lr=0.1)
        assert sums["skipped"].total == 1
        assert all(torch.equal(after.params[name], param) for name, param in state.params.items())


def test_a_new_graph_continues_bitwise():
    start, first, _ = make_steps(make_model(0.5), optimizer=sgd(momentum=0.9), backend="inductor")
    whole, _ = run(first, start, 5)
    state, _ = run(first, start, 2)
    _, second, _ = make_steps(make_model(0.5), optimizer=sgd(momentum=0.9), backend="inductor")
    for number in range(2, 5):
        state, _ = second(state, some_batch(number), lr=0.1 / (number + 1))
    assert same_states(state, whole)


@pytest.mark.parametrize("donate", [False, True])
def test_batches_of_all_sizes_share_one_dynamic_graph(donate):
    start, compiled, eager = make_steps(dynamic=True, donate=donate, backend="aot_eager")
    copy = start.replace(
        params={name: p.clone() for name, p in start.params.items()},
        opt_state={kind: {name: t.clone() for name, t in m.items()} for kind, m in start.opt_state.items()},
    )
    sizes = (6, 8, 1, 3, 50, 2)
    actual, sums = run(compiled, start, 12, sizes)
    expected, _ = run(eager, copy, 12, sizes)
    assert compiled.num_compilations == 1
    assert [s["loss"].weight for s in sums[:6]] == list(sizes)
    torch.testing.assert_close(actual.params, expected.params)


def test_without_dynamic_shapes_each_shape_has_its_graph_up_to_a_limit(caplog):
    start, compiled, eager = make_steps(optimizer=sgd(), max_compilations=2)
    with caplog.at_level(logging.WARNING):
        actual, _ = run(compiled, start, 9, sizes=(8, 4, 8, 2))
    assert compiled.num_compilations == 2
    assert "the batches need more than 2 graphs: their shapes, dtypes, or numbers" in str(compiled.eager_reason)
    assert [record.name for record in caplog.records] == ["dwiml_func.compiled.function"]  # torch itself says nothing
    expected, _ = run(eager, start, 9, sizes=(8, 4, 8, 2))
    torch.testing.assert_close(actual.params, expected.params)


@dataclass(frozen=True)
class Annealed:
    pair: tuple[Tensor, Tensor]
    strength: float
    cycle: int
    is_last: bool = False


def annealed_error(model, batch):
    inputs, targets = batch.pair
    penalty = sum(parameter.square().sum() for parameter in model.parameters())
    error = (model(inputs) - targets).square().mean()
    return error + batch.strength * penalty / (batch.cycle + 1) + 0.1 * batch.is_last, len(inputs)


def repeated_error(model, batch):
    inputs, targets = batch.pair
    for _ in range(batch.cycle):
        inputs = torch.tanh(inputs)
    return batch.strength * (model(inputs) - targets).square().mean(), len(inputs)


@pytest.mark.parametrize(
    ("loss", "most", "num_graphs"), [(annealed_error, 8, 2), (repeated_error, 8, 4), (repeated_error, 2, 2)]
)
def test_numbers_of_a_batch_that_change_get_one_graph_unless_the_code_needs_them(loss, most, num_graphs, caplog):
    options = {"optimizer": sgd(), "donate": False, "max_compilations": most}
    state, compiled, eager = make_steps(torch.nn.Linear(3, 1), loss, **options)
    for number in range(4):
        batch = Annealed(some_batch(number), 0.3 / (number + 1), number % 3)
        expected, _ = eager(state, batch, lr=0.1)
        state, _ = compiled(state, batch, lr=0.1)
        for name, param in expected.params.items():
            torch.testing.assert_close(state.params[name], param, rtol=1e-6, atol=1e-7)
    assert compiled.num_compilations == num_graphs
    assert ("the code branches or loops by" in str(compiled.eager_reason)) == (most == num_graphs)
    assert len([record for record in caplog.records if record.name.startswith("dwiml_func")]) == (most == num_graphs)


def test_a_batch_of_another_first_size_finds_its_dynamic_graph_at_once_and_leaves_nothing_behind(monkeypatch):
    total = CompiledFunction(lambda batch: batch.sum(), dynamic=True, max_compilations=1, backend="eager")
    assert total(torch.ones(3, 2)) == 6
    monkeypatch.setattr(total, "_compile_and_run", None)
    for size in range(1, 9):
        assert total(torch.ones(size, 2)) == 2 * size
    assert len(total._shapes_seen) == 1


@pytest.mark.parametrize("sizes", [(5, 5), (1, 1), (3, 1)])
def test_sizes_that_are_equal_or_one_in_the_first_batch_may_differ_in_the_next(sizes):
    def total(batch):
        return batch[0].sum() + batch[1].sum()

    graph = CompiledFunction(total, dynamic=True, max_compilations=1, backend="eager")
    for first, second in (sizes, (4, 3), (7, 1), (1, 6)):
        assert graph((torch.ones(first, 2), torch.ones(second))) == 2 * first + second
    assert (graph.num_compilations, graph.eager_reason) == (1, None)


def test_the_time_of_compiling_counts_and_that_of_calls_does_not():
    double = CompiledFunction(lambda batch: 2 * batch, dynamic=False, max_compilations=2, backend="eager")
    spent = [double.compile_seconds]
    for size in (1, 1, 2, 1):
        double(torch.ones(size))
        spent.append(double.compile_seconds)
    assert 0 == spent[0] < spent[1] == spent[2] < spent[3] == spent[4]


class Pair(NamedTuple):
    tensor: Tensor
    number: float


def test_numbers_of_a_batch_become_tensors_and_all_else_stays():
    x = torch.ones(2)
    batch = {"pair": Pair(x, 0.5), "list": [3, True, "a", None], "annealed": Annealed((x, x), 0.25, 7, is_last=True)}
    found: Any = _with_tensors(batch)
    numbers = [found["pair"].number, found["list"][0], found["annealed"].strength, found["annealed"].cycle]
    assert [number.item() for number in numbers] == [0.5, 3, 0.25, 7]
    assert [number.dtype for number in numbers] == [torch.float64, torch.int64, torch.float64, torch.int64]
    assert found["list"][2:] == ["a", None]
    assert found["list"][1] is found["annealed"].is_last is True
    assert (type(found["pair"]), type(found["annealed"]), type(found["list"])) == (Pair, Annealed, list)
    assert all(tensor is x for tensor in (found["pair"].tensor, *found["annealed"].pair))
    assert batch["annealed"] == Annealed((x, x), 0.25, 7, is_last=True)  # not changed


def test_the_numbers_of_a_batch_are_those_of_all_its_parts_but_not_what_is_true_or_false():
    x = torch.ones(2)
    batch = {"pair": Pair(x, 0.5), "list": [3, True, "a", None], "annealed": Annealed((x, x), 0.25, 7, is_last=True)}
    assert list(_numbers((batch, 1))) == [0.5, 3, 0.25, 7, 1]
    assert list(_numbers((x, True, "a"))) == []


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_activations_that_are_computed_again_are_not_left_to_a_backend_that_draws_again(backend):
    def loss(model, batch):
        hidden = checkpoint(model[:2], batch[0], use_reentrant=False)
        return squared_error(model[2:], (hidden, batch[1]))[:2]

    start, compiled, eager = make_steps(make_model(0.5), loss, optimizer=sgd(), backend=backend)
    actual, _ = run(compiled, start, 2)
    torch.testing.assert_close(actual.params, run(eager, start, 2)[0].params)
    assert ("computes activations again" in str(compiled.eager_reason)) == (backend == "eager")


def test_every_graph_is_made_under_the_settings_of_tracing(monkeypatch):
    made, compile_graph = [], private.compile_graph

    def noted(*args: Any) -> Any:
        made.append(import_module("torch.fx.experimental._config").backed_size_oblivious)
        return compile_graph(*args)

    monkeypatch.setattr(private, "compile_graph", noted)
    double = CompiledFunction(lambda batch: 2 * batch, dynamic=False, max_compilations=4, backend="eager")
    for tensor in (torch.ones(2), torch.ones(2, dtype=torch.float64), torch.ones(3), torch.ones(4)[::2]):
        assert torch.equal(double(tensor), 2 * tensor)
    assert (made, double.num_compilations) == ([True] * 4, 4)


def test_a_batch_may_hold_numbers_that_are_tensors_where_its_sizes_vary():
    scaled = CompiledFunction(
        lambda batch: batch[0].sum() * batch[1], dynamic=True, max_compilations=1, backend="eager"
    )
    for size in (3, 1, 4):
        assert scaled((torch.ones(size), torch.tensor(0.5 * size))) == 0.5 * size**2
    assert (scaled.num_compilations, scaled.eager_reason) == (1, None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "RuntimeError"),
        ("  \n  it branches  \n\n as told", "it branches"),
        ("backend='x' raised:\nMemoryError: none", "MemoryError: none"),
        ("backend='x' raised:", "backend='x' raised:"),
        ("it says\nbackend='x' raised:", "it says"),
        ('it branches\n  File "a.py", line 1\n  code\n  File "b.py", line 2\n', 'it branches (File "b.py", line 2)'),
    ],
)
def test_a_reason_is_the_first_line_of_an_error_and_the_last_place_in_code(text, told):
    assert _shortened(RuntimeError(text)) == told


def test_steps_and_gradients_compile_up_to_eight_graphs_of_fixed_sizes_by_inductor_unless_told():
    loss_fn = module_loss(make_model(), squared_error)
    step = jit_step(loss_fn=loss_fn, optimizer=adam())
    for graph in (step.graph, JitGradient(loss_fn).graph):
        assert (graph._max_compilations, graph._dynamic, graph._backend, graph._options) == (8, False, "inductor", {})
    assert (step.num_compilations, step.compile_seconds, step.num_cuda_graphs, step.cuda_graphs_reason) == (
        0,
        0,
        0,
        None,
    )
    assert step.eager.keywords["donate"] is False
    assert step.eager.keywords["non_finite"] is step.eager.keywords["clip_grad"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"non_finite": "ignore"}, "Expected non_finite"),
        ({"clip_grad": 0.0}, "Expected a clipping norm above 0"),
        ({"clip_grad": math.nan}, "Expected a clipping norm above 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_step(options, message):
    with pytest.raises(ValueError, match=message):
        jit_step(loss_fn=module_loss(make_model(), squared_error), optimizer=adam(), **options)


def test_a_state_of_another_optimizer_and_a_loss_that_forgets_a_parameter_are_refused_as_by_train_step():
    start, compiled, eager = make_steps(optimizer=sgd(momentum=0.9))
    forgotten = torch.nn.Parameter(torch.ones(()))
    _, forgetful, forgetful_eager = make_steps(
        None, lambda model, batch: (squared_error(model, batch)[0] * forgotten, 1), optimizer=sgd(), backend="eager"
    )
    other = start.replace(opt_state={"momentum": {name: torch.ones(7) for name in start.params}})
    for state, steps in ((other, (compiled, eager)), (start.replace(opt_state={}), (forgetful, forgetful_eager))):
        messages = []
        for step in steps:
            with pytest.raises(ValueError, match=r"opt_state|are not in the state") as error:
                step(state, some_batch(1), lr=0.1)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    assert (compiled.num_compilations, forgetful.num_compilations) == (0, 0)


def test_a_factory_that_must_be_given_its_weight_decay_trains_in_the_memory_of_its_state():
    loss_fn = module_loss(make_model(), squared_error)
    options: dict[str, Any] = {"loss_fn": loss_fn, "optimizer": lambda weight_decay: sgd(weight_decay=weight_decay)}
    ends = []
    for step in (jit_step(**options, donate=True, backend="eager"), partial(train_step, **options)):
        state = init_state(make_model(), sgd(), seed=3)
        for number in range(3):
            state, _ = step(state, some_batch(number), lr=0.1, weight_decay=0.5)
        ends.append(state.params)
    torch.testing.assert_close(*ends)


def test_a_number_of_points_in_a_graph_is_exact_and_has_no_gradient():
    like, many = torch.ones((), requires_grad=True), 2**24 + 1  # float32 has no such number
    for number in (many, torch.tensor(many), torch.tensor(float(many), dtype=torch.float64, requires_grad=True)):
        found = as_float64(number, like)
        assert (found.item(), found.dtype, found.shape, found.requires_grad) == (many, torch.float64, (), False)


@pytest.mark.parametrize("change", ["strides", "dtype"])
def test_a_batch_of_a_known_shape_with_other_strides_or_another_dtype_gets_its_own_graph(change):
    def loss(model, batch):
        return squared_error(model, tuple(tensor.float() for tensor in batch))

    start, compiled, eager = make_steps(compute_batch_loss=loss)
    inputs, targets = some_batch(1)
    other = (inputs.t().contiguous().t(), targets) if change == "strides" else (inputs.double(), targets.double())
    state, expected = start, start
    for batch in ((inputs, targets), other, (inputs, targets), other):
        state, _ = compiled(state, batch, lr=0.1)
        expected, _ = eager(expected, batch, lr=0.1)
    assert compiled.num_compilations == 2
    assert compiled.eager_reason is None
    torch.testing.assert_close(state.params, expected.params)


def test_a_graph_that_needs_no_gradient_is_made_again_for_another_dtype():
    double = CompiledFunction(lambda batch: 2 * batch, dynamic=False, max_compilations=2, backend="eager")
    results = [double(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.float32)]
    assert [result.dtype for result in results] == [torch.float32, torch.float64, torch.float32]
    assert double.num_compilations == 2


def test_errors_of_a_graph_at_work_are_not_taken_for_those_of_its_making():
    graph = CompiledFunction(
        lambda batch: torch.linalg.cholesky(batch), dynamic=False, max_compilations=1, backend="eager"
    )
    assert graph(torch.eye(2)).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
        graph(-torch.eye(2))
    assert graph(4 * torch.eye(2)).tolist() == [[2.0, 0.0], [0.0, 2.0]]
    assert (graph.eager_reason, graph.num_compilations) == (None, 1)


def test_a_model_that_cannot_be_compiled_whole_says_where_it_breaks_and_runs_eagerly(caplog):
    def reads_a_value(model, batch):
        loss, weight, _ = squared_error(model, batch)
        return (loss * 2 if loss.item() > 0.5 else loss), weight

    start, compiled, eager = make_steps(compute_batch_loss=reads_a_value)
    with caplog.at_level(logging.WARNING):
        actual, _ = run(compiled, start, 4)
    [record] = (record for record in caplog.records if record.name == "dwiml_func.compiled.function")
    assert "without compilation" in record.message
    assert "test_compiled_step.py" in record.message
    assert "\n" not in record.message
    assert compiled.num_compilations == 0
    assert same_states(actual, run(eager, start, 4)[0])


def test_a_loss_that_uses_its_key_runs_eagerly_instead_of_with_one_key_for_ever():
    model = make_model()

    def loss_fn(params, buffers, batch, *, key, train):
        with torch_rng(key):
            noise = torch.randn(())
        return LossOut((params["0.weight"].sum() - noise).square(), 1, buffers, {})

    start = init_state(model, sgd(), seed=0)
    compiled = jit_step(loss_fn=loss_fn, optimizer=sgd(), backend="aot_eager")
    actual, _ = run(compiled, start, 3)
    assert compiled.eager_reason is not None
    assert same_states(actual, run(partial(train_step, loss_fn=loss_fn, optimizer=sgd()), start, 3)[0])


def test_a_step_that_is_differentiated_is_that_of_train_step_and_others_stay_compiled():
    start, compiled, eager = make_steps(optimizer=sgd())

    def loss_after(step, lr):
        state, _ = run(step, start, 1)
        state, _ = step(state, some_batch(1), lr=lr)
        return torch.stack([p.square().sum() for p in state.params.values()]).sum()

    lr = torch.tensor(0.1, requires_grad=True)
    expected = torch.func.grad(partial(loss_after, eager))(lr.detach())
    assert torch.equal(torch.func.grad(partial(loss_after, compiled))(lr.detach()), expected)
    (gradient,) = torch.autograd.grad(loss_after(compiled, lr), lr)
    torch.testing.assert_close(gradient, expected)
    run(compiled, start, 2)
    assert (compiled.num_compilations, compiled.eager_reason) == (1, None)
    assert compiled.compile_seconds > 0


@pytest.mark.parametrize("donate", [False, True])
def test_a_step_that_is_not_finite_is_refused_and_leaves_the_state_whole(donate):
    start, compiled, _ = make_steps(donate=donate, backend="aot_eager")
    state, _ = run(compiled, start, 2)
    kept = {name: p.clone() for name, p in state.params.items()}
    means = {name: t.clone() for name, t in state.opt_state["momentum_buffer"].items()}
    inputs, targets = some_batch(9)
    with pytest.raises(NonFiniteError, match=r"loss is inf in epoch 1, batch 3 \(step 3\)"):
        compiled(state, (inputs, targets + math.inf), lr=0.1)
    assert all(torch.equal(state.params[name], kept[name]) for name in kept)
    assert all(torch.equal(state.opt_state["momentum_buffer"][name], means[name]) for name in means)
    state, _ = compiled(state, (inputs, targets), lr=0.1)
    assert state.step == 3


def test_a_deferred_check_keeps_the_old_values_and_notes_the_first_step():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    start, compiled, eager = make_steps(model, non_finite="defer")
    results = []
    for step in (compiled, eager):
        before, _ = run(step, start, 2)
        inputs, targets = some_batch(9)
        state = before
        for batch in ((inputs, targets * math.nan), (inputs, targets), (inputs, targets / 0)):
            state, _ = step(state, batch, lr=0.1)
        assert same_states(state, before)
        results.append(state)
    actual, expected = results
    torch.testing.assert_close(actual.params, expected.params)
    assert [float(x) for x in actual.sums["non_finite"]] == [float(x) for x in expected.sums["non_finite"]] == [2, 1]


def test_nothing_that_came_in_changes_without_donation():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    start, compiled, _ = make_steps(model, backend="aot_eager")
    tensors = [*start.params.values(), *start.buffers.values()]
    before = [(tensor._version, tensor.clone()) for tensor in tensors]
    state, _ = compiled(start, some_batch(0), lr=0.1)
    assert [tensor._version for tensor in tensors] == [version for version, _ in before]
    assert all(torch.equal(tensor, value) for tensor, (_, value) in zip(tensors, before, strict=True))
    assert int(state.buffers["1.num_batches_tracked"]) == 2  # the loss calls the model twice


def test_a_donated_state_gives_its_memory_and_cannot_be_used_again():
    start, compiled, _ = make_steps(donate=True, backend="aot_eager")
    places = {name: p.data_ptr() for name, p in start.params.items()}
    state, _ = compiled(start, some_batch(0), lr=0.1)
    assert {name: p.data_ptr() for name, p in state.params.items()} == places
    with pytest.raises(RuntimeError, match="donated"):
        compiled(start, some_batch(0), lr=0.1)


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match=r"Expected max_compilations of at least 1\. Received: 0"):
        make_steps(max_compilations=0)
    loss_fn = module_loss(make_model(), squared_error)
    with pytest.raises(ValueError, match=r"options with the backend 'inductor' only\. Received: 'eager'"):
        jit_step(loss_fn=loss_fn, optimizer=adam(), backend="eager", options={"cpp_wrapper": True})


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x.double() * self.weight).sum(1, keepdim=True)


@pytest.mark.parametrize("optimizer", [adam(), sgd(momentum=0.9)], ids=["adam", "sgd"])
def test_a_donated_number_in_double_precision_is_trained_too(optimizer):
    start, compiled, eager = make_steps(Scaled(), optimizer=optimizer, donate=True, backend="aot_eager")
    actual, _ = run(compiled, start, 4)
    expected, _ = run(eager, init_state(Scaled(), optimizer, seed=3), 4)
    assert compiled.eager_reason is None
    for name, tensor in expected.params.items():
        torch.testing.assert_close(actual.params[name], tensor, rtol=1e-12, atol=0)


def test_optimizers_of_one_process_compile_a_graph_each_beyond_the_limit_of_torch_for_one_function():
    """torch.compile makes so many graphs of one function, and the updates of all are one function."""
    with import_module("torch._dynamo.config").patch(recompile_limit=2):
        for number in range(4):
            start, step, _ = make_steps(
                torch.nn.Linear(3, 1), optimizer=sgd(momentum=number / 10 + 0.1), max_compilations=1
            )
            run(step, start, 2)
            assert (step.num_compilations, step.eager_reason) == (1, None)
