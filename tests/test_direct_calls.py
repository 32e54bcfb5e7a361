"""Claims about graphs that are called directly: bitwise identical, only where calls are alike, also in a loop."""

import math
import weakref
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from test_compiled_step import Annealed, make_model, run, same_states, some_batch, squared_error
from test_compiled_step import make_steps as make_steps_with
from test_composed_steps import COMPOSED
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dwiml_func import adam, adamw, epoch_fn, init_state, jit_step, module_loss, sgd, train_step
from dwiml_func.compiled import _torch_private as private
from dwiml_func.compiled import direct, fold
from dwiml_func.compiled import step as step_module
from dwiml_func.compiled.gradient import JitGradient
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.optim import accumulate, chain, skip_not_finite
from dwiml_func.types import Sum

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.compiles,
]


make_steps = partial(make_steps_with, backend="eager")


@pytest.fixture(scope="module")
def plain() -> Any:
    """The first state and a compiled step that several tests take."""
    return make_steps()[:2]


def without_direct_calls(compiled):
    compiled._direct.find = lambda leaves: None
    return compiled


def count_traced(compiled) -> list:
    """A list that grows with each call that goes through torch.compile."""
    calls, hear = [], compiled.graph.hear
    compiled.graph.hear = lambda *args, **others: calls.append(args) or hear(*args, **others)
    return calls


OPTIONS = {
    "pure": {"optimizer": adam(weight_decay=0.1), "clip_grad": 0.1},
    "donated": {"optimizer": sgd(momentum=0.9), "donate": True},
    "chain": {"optimizer": COMPOSED["chain"], "donate": True},
    "deferred": {"optimizer": sgd(momentum=0.9), "non_finite": "defer"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_direct_calls_and_runs_of_them_have_the_bits_of_traced_ones(options, monkeypatch):
    in_runs = []

    def fold_alike(state: Any, *rest: Any, **others: Any) -> Any:
        end, batch = fold.fold_alike(state, *rest, **others)
        in_runs.append(end.batch - state.batch)
        return end, batch

    monkeypatch.setattr(step_module, "fold_alike", fold_alike)
    batches = [some_batch(number, size) for number, size in enumerate([8] * 4 + [4] + [8] * 2)]
    start, compiled, _ = make_steps(make_model(0.5), **options)
    calls = count_traced(compiled)
    step = partial(compiled, lr=0.1)
    actual, sums = epoch_fn(start.replace(epoch=2), batches, step=step)
    assert len(calls) == 3  # two of the first size, and the fifth
    assert in_runs == ([] if "non_finite" in options else [2, 1])
    assert (actual.step, actual.epoch, actual.batch) == (7, 3, 0)
    for is_traced in (False, True):
        if is_traced:
            without_direct_calls(compiled)
        start, *_ = make_steps(make_model(0.5), **options)
        expected, expected_sums = epoch_fn(start.replace(epoch=2), batches, step=step, on_batch=lambda *_: None)
        assert same_states(actual, expected)
        assert sums == expected_sums
    assert len(calls) == 3 + 1 + 7  # the second batch of the other size was still unknown


def test_where_a_part_of_the_state_stays_the_rest_is_still_that_of_the_step():
    model = make_model(0.0)
    next(model.parameters()).requires_grad_(False)
    start, compiled, eager = make_steps(model, optimizer=adam())
    calls = count_traced(compiled)
    (state, _), (expected, _) = run(compiled, start, 5), run(eager, start, 5)
    assert len(calls) == 2
    torch.testing.assert_close(state.params, expected.params)


def test_calls_that_are_not_alike_go_through_torch_compile_and_are_right():
    start, compiled, eager = make_steps(make_model(), optimizer=sgd(), max_compilations=20)
    state, _ = run(compiled, start, 3)
    calls, (inputs, targets) = count_traced(compiled), some_batch(1)
    others = {
        "other strides": (inputs.t().contiguous().t(), targets),
        "watched": (inputs, targets),
        "other settings": (inputs, targets),
        "deterministic": (inputs, targets),
    }
    for number, (name, batch) in enumerate(others.items(), start=1):
        mode = torch.overrides.BaseTorchFunctionMode() if name == "watched" else nullcontext()
        torch.use_deterministic_algorithms(name == "deterministic")
        with mode, torch.autocast("cpu", enabled=name == "other settings"):
            actual, _ = compiled(state, batch, lr=0.1)
            expected, _ = eager(state, batch, lr=0.1)
        torch.testing.assert_close(actual.params, expected.params)
        assert len(calls) == number, name
        torch.use_deterministic_algorithms(False)
    compiled(state, (inputs, targets), lr=0.1)  # the last settings stay
    compiled(state, (inputs, targets), lr=0.1)
    assert len(calls) == len(others) + 1
    strided = state.replace(params={name: param.t().contiguous().t() for name, param in state.params.items()})
    compiled(strided, (inputs, targets), lr=0.1)
    assert len(calls) == len(others) + 2


def test_an_autocast_that_the_first_calls_did_not_see_is_not_passed_by():
    def loss(model, batch):
        inputs, _ = batch
        return (torch.mm(inputs, inputs.t()).float() * model(inputs)).square().mean(), 1

    start, compiled, eager = make_steps(compute_batch_loss=loss)
    run(compiled, start, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, sums = compiled(start, some_batch(1), lr=0.1)
        _, expected = eager(start, some_batch(1), lr=0.1)
    _, plain = eager(start, some_batch(1), lr=0.1)
    assert sums["loss"].total == pytest.approx(expected["loss"].total, rel=1e-6)
    assert sums["loss"].total != pytest.approx(plain["loss"].total, rel=1e-6)


def test_a_run_stops_at_the_batch_that_is_not_finite_with_the_steps_before_it_taken():
    inputs, targets = some_batch(9)
    start, compiled, _ = make_steps(donate=True)
    batches = [some_batch(number) for number in range(5)]
    with pytest.raises(NonFiniteError, match=r"loss is inf in epoch 1, batch 6 \(step 6\)"):
        compiled.fold(start, [*batches, (inputs, targets + math.inf)], lr=0.1)


def test_a_run_stops_at_a_gradient_that_is_not_finite_while_the_loss_is():
    def loss(model, batch):
        return squared_error(model, batch)[0] + (model.weight.sum() * batch[0].sum()).abs().sqrt(), len(batch[0])

    start, compiled, eager = make_steps(compute_batch_loss=loss)
    inputs, targets = some_batch(9)
    batches = [*(some_batch(number) for number in range(5)), (0 * inputs, targets)]
    for step in (partial(compiled, lr=0.1), partial(eager, lr=0.1)):
        with pytest.raises(NonFiniteError, match=r"gradient norm is nan in epoch 1, batch 6 \(step 6\)"):
            epoch_fn(start, batches, step=step)


class Opaque:
    def __init__(self, pair: Any) -> None:
        self.pair = pair


def test_a_run_ends_at_a_batch_of_a_kind_that_is_unknown_and_another_begins_after_it():
    def loss(model, batch):
        return squared_error(model, batch.pair if isinstance(batch, Opaque) else batch)

    start, compiled, eager = make_steps(compute_batch_loss=loss)
    batches = [some_batch(number) for number in range(9)]
    mixed = [Opaque(batch) if number in (3, 4, 7) else batch for number, batch in enumerate(batches)]
    ends = [epoch_fn(start, mixed, step=partial(step, lr=0.1)) for step in (compiled, eager)]
    torch.testing.assert_close(ends[0][0].params, ends[1][0].params)
    assert (ends[0][0].step, ends[0][1]["loss"].weight) == (9, 72)


def test_no_step_is_taken_after_one_that_was_noted_as_not_finite_also_not_in_a_run(plain):
    start, compiled = plain
    batches = [some_batch(number) for number in range(6)]
    run(compiled, start, 3)
    noted = {"non_finite": Sum(2.0, 1.0), "other": Sum(3.0, 4.0)}
    end = compiled.fold(start.replace(sums=noted, step=5), batches, lr=0.1)
    assert same_states(end, start)
    assert {name: end.sums[name] for name in noted} == noted
    assert (end.step, end.batch, end.sums["loss"].weight) == (11, 6, 48)


def test_once_compilation_is_off_every_step_is_one_of_train_step(plain, monkeypatch):
    start, compiled = plain
    state, _ = run(compiled, start, 4)
    taken: list[int] = []

    def noted(*args: Any, **others: Any) -> Any:
        taken.append(1)
        return train_step(*args, **others)

    monkeypatch.setattr(compiled, "eager", partial(noted, **compiled.eager.keywords))
    compiled(state, some_batch(1), lr=0.1)
    assert not taken
    monkeypatch.setattr(compiled.graph, "eager_reason", "it branches")
    compiled(state, some_batch(1), lr=0.1)
    compiled.fold(state, [some_batch(1)] * 3, lr=0.1)
    assert len(taken) == 4


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_number_that_is_differentiated_is_not_left_to_a_graph_that_is_known(name):
    options: dict[str, Any] = {"loss_fn": module_loss(make_model(), squared_error), "optimizer": adamw}
    compiled, eager = jit_step(**options, backend="eager"), partial(train_step, **options)
    start = init_state(make_model(), adamw(), seed=3)
    rates = {"lr": torch.tensor(0.1), "weight_decay": torch.tensor(0.5)}
    for number in range(3):
        compiled(start, some_batch(number), **rates)
    rates[name].requires_grad_()
    gradients = []
    for step in (compiled, eager):
        state, _ = step(start, some_batch(1), **rates)
        gradients += torch.autograd.grad(torch.stack([p.sum() for p in state.params.values()]).sum(), rates[name])
    assert torch.equal(*gradients)


def test_a_graph_that_ran_while_someone_watched_is_not_learned():
    calls, batch = direct.DirectCalls(), torch.ones(2)
    state, numbers = ({"w": torch.ones(2)}, {}, {}), torch.zeros(1)
    leaves = direct.leaves_of(batch, state, 0)
    assert leaves is not None
    heard = direct.Heard(lambda *inputs: inputs, (batch, leaves.state[0]), (leaves.state[0], numbers))
    options: dict[str, Any] = {"values": numbers, "names": ("loss",), "policy": "raise"}
    with torch.overrides.BaseTorchFunctionMode():
        for _ in range(3):
            calls.learn(leaves, leaves, numbers, heard, **options)
        assert calls.find(leaves) is None
    assert calls.find(leaves) is None
    grown = leaves._replace(structures=({}, {}, {}))
    for _ in range(3):  # a state of another structure than before
        calls.learn(leaves, grown, numbers, heard, **options)
    assert calls.find(leaves) is None
    for _ in range(2):
        calls.learn(leaves, leaves, numbers, heard, **options)
    assert calls.find(leaves) is not None


@pytest.mark.parametrize(
    "constants", [[(3,), (4,)], [(3,), (3, 3)], [(3, 4), (3,)], [(torch.ones(1),), (torch.ones(1),)], [("a",), ("b",)]]
)
def test_a_graph_whose_constants_change_is_not_called_directly(constants):
    calls, numbers, weight, batch = direct.DirectCalls(), torch.zeros(1), torch.ones(1), torch.ones(2)
    leaves = direct.leaves_of(batch, ({"w": weight}, {}, {}), 0)
    assert leaves is not None
    for own in constants:
        heard = direct.Heard(lambda *inputs: inputs, (batch, weight, *own), (weight, numbers))
        calls.learn(leaves, leaves, numbers, heard, values=numbers, names=("loss",), policy="raise")
    assert calls.find(leaves) is None


def test_a_batch_that_skips_too_often_ends_a_run():
    inputs, targets = some_batch(9)
    start, compiled, eager = make_steps(optimizer=chain(skip_not_finite(3), sgd()))
    bad = (inputs * math.nan, targets)
    batches = [some_batch(1), some_batch(2), some_batch(3), *[bad] * 9]
    messages = []
    for step in (partial(compiled, lr=0.1), partial(eager, lr=0.1)):
        with pytest.raises(NonFiniteError) as error:
            epoch_fn(start, batches, step=step)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_run_of_direct_calls_takes_the_weight_decay_of_its_step():
    start = init_state(make_model(), adamw(), seed=3)
    options = {"loss_fn": module_loss(make_model(), squared_error), "optimizer": adamw}
    batches, steps = [some_batch(number) for number in range(6)], (jit_step(**options, backend="eager"), train_step)
    ends = [
        epoch_fn(start, batches, step=partial(step, **bound, lr=0.1, weight_decay=2.0))[0]
        for step, bound in zip(steps, ({}, options), strict=True)
    ]
    torch.testing.assert_close(ends[0].params, ends[1].params)


def test_a_tensor_that_a_batch_holds_twice_does_not_stand_for_two():
    def loss(model, batch):
        return (model(batch[0]) - batch[1].sum(1, keepdim=True)).square().mean(), len(batch[0])

    start, compiled, eager = make_steps(compute_batch_loss=loss)
    (one, _), (other, _) = some_batch(1), some_batch(2)
    for _ in range(4):
        compiled(start, (one, one), lr=0.1)
    actual, expected = (step(start, (one, other), lr=0.1)[0] for step in (compiled, eager))
    torch.testing.assert_close(actual.params, expected.params)


def test_values_of_other_names_types_and_numbers_are_of_other_kinds():
    x, y = torch.zeros(1), torch.ones(1)
    frozen = Annealed((x, y), 0.5, 1)
    values: list[Any] = [x, (x,), [x], (x, x), {"a": x}, {"b": x}, {"a": x, "b": x}, {"b": x, "a": x}, OrderedDict(a=x)]
    values += [{"a": x, "b": each} for each in (1, 2, True, 1.0, None, "1", b"1", {}, {"c": x}, (x,))]
    values += [frozen, replace(frozen, cycle=2), replace(frozen, is_last=True), {"a": {"a": x}}, {}, ()]
    structures = [direct.flatten(value, []) for value in values]
    assert len(set(structures)) == len(values)
    leaves: list[Tensor] = []
    tree = {"a": {"b": x, "c": {"d": y}}, "e": y, "f": {}}
    structure = direct.flatten(tree, leaves)
    assert list(map(id, leaves)) == list(map(id, (x, y, y)))
    assert direct.rebuild(structure, iter([y, x, x])) == {"a": {"b": y, "c": {"d": x}}, "e": x, "f": {}}
    direct.flatten((frozen, [y]), found := [])
    assert list(map(id, found)) == list(map(id, (x, y, y)))
    for unknown in (object(), {1}, (x, object())):
        with pytest.raises(TypeError, match="Expected tensors, numbers, texts and containers of such"):
            direct.flatten(unknown, [])
        assert direct.leaves_of(unknown, ({}, {}, {}), None) is None
    kinds = {direct.leaves_of(x, ({"w": x}, {}, {}), more).kind for more in (0, 1)}  # type: ignore[union-attr]
    kinds |= {direct.leaves_of(batch, ({"w": x}, {}, {}), 0).kind for batch in (x, torch.ones(2))}  # type: ignore[union-attr]
    assert len(kinds) == 3


def test_a_graph_is_called_directly_from_the_third_call_on_and_few_kinds_are_kept(monkeypatch):
    monkeypatch.setattr(direct, "_MAX_KINDS", 2)
    calls, numbers = direct.DirectCalls(), torch.zeros(1)

    def call(size: int, *, is_written: bool = False, unknown: str = "") -> bool:
        batch, weight = torch.ones(size), torch.full((size,), 2.0)
        leaves = direct.leaves_of(batch, ({"w": weight}, {}, {}), is_written)
        assert leaves is not None
        if found := calls.find(leaves):
            (new,), values = found(leaves.batch, leaves.state, numbers)
            assert (new is weight) == is_written
            assert (new.tolist(), values.tolist()) == ([3.0] * size, [6.0])
            return True

        def graph(*inputs: Any) -> Any:  # in another order, with a number that is no leaf
            weight, factor, batch = inputs
            new = weight.add_(batch) if is_written else weight + batch
            return torch.full((1,), 2.0 * factor), *(() if is_written else (new,))

        inputs = weight, 3, batch
        outputs = graph(*inputs)
        state = {"w": weight if is_written else outputs[-1].clone() if unknown == "state" else outputs[-1]}
        values = outputs[0].clone() if unknown == "values" else outputs[0]
        after = direct.leaves_of(batch, (state, {}, {}), None)
        assert after is not None
        heard = direct.Heard(graph, inputs, outputs)
        calls.learn(leaves, after, numbers, heard, values=values, names=("loss",), policy="raise")
        return False

    assert [call(size) for size in (1, 1, 1, 2, 2, 2, 1)] == [False, False, True, False, False, True, True]
    # A third kind takes the place of the first, the oldest.
    assert [call(size) for size in (3, 3, 3, 2, 1, 1, 1)] == [False, False, True, True, False, False, True]
    assert [call(4, is_written=True) for _ in range(3)] == [False, False, True]
    for unknown in ("state", "values"):  # what a graph did not return is not found again
        assert not any(call(5, unknown=unknown) for _ in range(4))


def test_what_a_call_checks_of_tensors_and_of_those_who_watch():
    like = private.tensor_guard([torch.ones(2, 3), torch.ones(1)])
    assert like(torch.zeros(2, 3), torch.zeros(1))
    first = [torch.zeros(3, 3), torch.zeros(3, 2).t(), torch.zeros(2, 3).double()]
    first += [torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, device="meta")]
    assert not any(like(other, torch.zeros(1)) for other in first)
    assert (private.tensor_guard([])(), private.tensor_guard([])(torch.ones(1))) == (True, False)

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    assert not private.is_watched()
    for mode in (torch.overrides.BaseTorchFunctionMode(), Watching()):
        with mode:
            assert private.is_watched()


def test_a_run_takes_a_rate_that_is_a_tensor_and_averages_micro_batches_by_their_points():
    optimizer = chain(accumulate(2), sgd())
    start, compiled, eager = make_steps(optimizer=optimizer)
    batches = [some_batch(number, size) for number, size in enumerate((8, 2, 8, 2, 8, 2, 8, 8, 8, 8))]
    ends = [
        epoch_fn(start, batches, step=partial(step, lr=rate))[0]
        for step in (compiled, eager)
        for rate in (0.1, torch.tensor(0.1, dtype=torch.float64))
    ]
    for end in ends[1:]:
        torch.testing.assert_close(end.params, ends[0].params)


def test_a_function_around_a_module_loss_draws_what_the_loss_draws():
    """Only `module_loss` itself may say that it draws nothing."""
    inner = module_loss(make_model(0.5), squared_error)

    def loss_fn(*args: Any, **options: Any) -> Any:
        return inner(*args, **options)

    start = init_state(make_model(0.5), sgd(), seed=3)
    options = {"loss_fn": loss_fn, "optimizer": sgd()}
    for step in (
        jit_step(**options, backend="eager"),
        partial(train_step, gradient_fn=JitGradient(loss_fn, backend="eager"), **options),
    ):
        torch.manual_seed(5)  # not what it draws from
        end, _ = run(step, start, 3)
        torch.testing.assert_close(end.params, run(partial(train_step, **options), start, 3)[0].params)


@pytest.mark.parametrize("policy", ["raise", "defer"])
def test_who_asks_for_another_policy_than_skipping_gets_it(policy):
    start, compiled, eager = make_steps(optimizer=chain(skip_not_finite(3), sgd()), non_finite=policy)
    inputs, targets = some_batch(1)
    for step in (compiled, eager):
        with pytest.raises(NonFiniteError, match=r"not finite in|is nan in"):
            epoch_fn(start, [some_batch(0), (inputs * math.nan, targets)], step=partial(step, lr=0.1))


def test_a_step_keeps_no_state_and_no_batch(plain):
    start, compiled = plain
    state, _ = run(compiled, start, 4)
    batch = some_batch(1)
    state, _ = compiled(state, batch, lr=0.1)

    tensors = [weakref.ref(tensor) for tensor in (*state.params.values(), *batch)]
    del state, batch
    assert [tensor() for tensor in tensors] == [None] * len(tensors)


def test_tensors_that_a_loss_closes_over_are_inputs_of_its_graph_too():
    weights = torch.tensor([1.0, 2.0, 3.0])

    def loss(model, batch):
        return squared_error(model, (batch[0] * weights, batch[1]))

    start, compiled, eager = make_steps(compute_batch_loss=loss)
    calls = count_traced(compiled)
    actual, _ = run(compiled, start, 5)
    assert len(calls) == 2
    torch.testing.assert_close(actual.params, run(eager, start, 5)[0].params)
    start, compiled, eager = make_steps(compute_batch_loss=loss)
    states = [start, start]
    for number in range(4):  # another tensor each time: no graph may keep one
        weights = torch.tensor([1.0, 2.0, 3.0]) + number
        states = [step(state, some_batch(1), lr=0.1)[0] for step, state in zip((compiled, eager), states, strict=True)]
        torch.testing.assert_close(states[0].params, states[1].params)


@pytest.mark.parametrize("is_code", [True, False])
def test_a_direct_call_is_inductors_code_unless_torch_changes_outputs_around_it(
    is_code: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view of an input that is an output is made by torch, outside the code.

    The code is called from C++; the second time that cannot be made, and Python calls it.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    heard: list[Any] = []
    in_cpp: list[bool] = []
    generate = CppWrapperCpu.generate

    def generated(wrapper: Any, is_inference: bool) -> Any:
        in_cpp.append(is_code)
        if not is_code:
            raise NotImplementedError
        return generate(wrapper, is_inference)

    monkeypatch.setattr(CppWrapperCpu, "generate", generated)

    def function(batch: Tensor) -> tuple[Tensor, ...]:
        return (batch.add_(1).sum(),) if is_code else (batch.add_(1), batch.t())

    def backend(graph: torch.fx.GraphModule, inputs: list[Any], **_: Any) -> Any:
        run = private.compile_graph(graph, inputs, "inductor", {})

        def call(*inputs: Any) -> Any:
            outputs, direct = run(*inputs)
            heard[:] = inputs, outputs, direct
            return outputs

        return call

    first, second = torch.ones(2, 3), torch.ones(2, 3)
    with private.tracing():
        private.compile_whole(function, backend, 1)(first)
    inputs, outputs, direct = heard
    own = direct(*(second if value is first else value for value in inputs))
    assert ("compile_graph" in direct.__qualname__) == is_code
    assert in_cpp == [is_code]
    assert torch.equal(first, second)
    assert all(torch.equal(one, other) for one, other in zip(own, outputs, strict=True))
