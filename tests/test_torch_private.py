"""Claims about the private switches of torch that `jit_step` needs: without them steps run eagerly, with a reason."""

import logging
import weakref
from contextlib import ExitStack
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_compiled_step import make_steps, run, same_states

from dwiml_func.compiled import _torch_private
from dwiml_func.compiled._torch_private import compile_graph, compile_whole, is_about_tracing, tracing

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
LACKING = {
    "torch 2.11": ["recompile_limit", "isolate_recompiles"],
    "a setting": ["torch._dynamo.config.trace_autograd_ops"],
    "a function": ["torch._dynamo.maybe_mark_dynamic"],
    "a module": ["torch._functorch.config"],
    "a setting of inductor": ["torch._inductor.config.cpp.enable_loop_tail_vec"],
}


@pytest.mark.parametrize("lacks", LACKING.values(), ids=LACKING)
def test_a_torch_without_the_private_switches_runs_eager_steps_and_says_why(monkeypatch, caplog, lacks):
    if "recompile_limit" in lacks:
        compile_of_2_11 = torch.compile

        def old_compile(model=None, *, fullgraph=False, dynamic=None, backend="inductor", mode=None, options=None):
            return compile_of_2_11(model, fullgraph=fullgraph, backend=backend, options=options)

        monkeypatch.setattr(torch, "compile", old_compile)
    else:
        monkeypatch.setattr(_torch_private, "import_module", lambda path: without(import_module(path), path, lacks))
    start, compiled, eager = make_steps(dynamic=True, backend="inductor")
    with caplog.at_level(logging.WARNING):
        actual, _ = run(compiled, start, 3)
    [record] = (record for record in caplog.records if record.name == "dwiml_func.compiled.function")
    assert f"jit_step needs torch 2.13, {torch.__version__} lacks" in record.message
    assert all(name in record.message for name in lacks)
    assert compiled.num_compilations == 0
    assert same_states(actual, run(eager, start, 3)[0])


def without(module, path, lacks):
    """A module of torch without some of its names, or none where it is lacking itself."""
    if path in lacks:
        raise ImportError(path)

    class Older:
        def __getattr__(self, name):
            if f"{path}.{name}" in lacks:
                raise AttributeError(name)
            return getattr(module, name)

    return Older()


TRACED_WITH = {
    "torch._dynamo.config": {
        "trace_autograd_ops": True,
        "specialize_float": True,
        "assume_static_by_default": True,
        "automatic_dynamic_shapes": False,
    },
    "torch._functorch.config": {"enable_autograd_cache": False},
    "torch.fx.experimental._config": {"use_duck_shape": False, "backed_size_oblivious": True},
}
COMPILED_WITH = {"size_asserts": False, "fx_graph_cache": False, "fallback_random": True}
COMPILED_WITH |= {"cpp.enable_loop_tail_vec": False}


def test_a_graph_is_traced_under_the_same_settings_whatever_torch_has_and_torch_keeps_its_own():
    def now() -> dict[str, Any]:
        return {path: {name: getattr(import_module(path), name) for name in names} for path, names in opposite.items()}

    opposite = {path: {name: not value for name, value in names.items()} for path, names in TRACED_WITH.items()}
    with ExitStack() as stack:
        for path, settings in opposite.items():
            stack.enter_context(import_module(path).patch(**settings))
        with pytest.raises(KeyError) as within, tracing():
            raise KeyError(now())
        assert now() == opposite
    assert within.value.args == (TRACED_WITH,)


def test_a_function_is_compiled_whole_with_its_own_number_of_graphs_and_guards_of_its_arguments_only(monkeypatch):
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.update(options) or function)
    assert compile_whole(len, max, 5) is len
    own = asked.pop("options")["guard_filter_fn"]
    assert asked == {"fullgraph": True, "backend": max, "recompile_limit": 5, "isolate_recompiles": True}
    guarded = {"": True, "L['batch']": True, "L['params']['a']": True, "buffers": True, "opt_state": True}
    guarded |= {"L['numbers'][0]": True, "L['batches']": False, "L['self']": False, "loss_fn": False, "a batch": False}
    guards = [SimpleNamespace(name=name, is_global=False) for name in guarded]
    assert own(guards) == list(guarded.values())
    assert own([SimpleNamespace(name="L['batch']", is_global=True)]) == [False]


def test_errors_of_tracing_are_those_of_dynamo():
    from torch._dynamo import exc

    assert is_about_tracing(exc.FailOnRecompileLimitHit("9 graphs"))
    assert is_about_tracing(exc.Unsupported("a branch"))
    assert not is_about_tracing(RuntimeError("9 graphs"))


class Inductor:
    """In place of inductor: it notes the settings that it is given, and its code calls the graph."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, around: str = "nothing", fails_with: tuple[Any, ...] = ()):
        self.asked: list[dict[str, Any]] = []
        self.around, self.fails_with = around, fails_with
        module = import_module("torch._inductor.compile_fx")
        monkeypatch.setattr(module, "compile_fx", self.compile_fx)
        monkeypatch.setattr(module, "compile_fx_inner", self.compile_inner)

    def compile_inner(self, graph: Any, inputs: Any) -> Any:
        def code(inputs: list[Any]) -> Any:
            given, inputs[:] = list(inputs), []
            return graph(*given)

        code.current_callable = lambda inputs: ("own code", *inputs)  # type: ignore[attr-defined]
        return code

    def compile_fx(self, graph: Any, inputs: Any, *, inner_compile: Any, config_patches: dict[str, Any]) -> Any:
        self.asked.append(config_patches)
        if config_patches.get("cpp_wrapper") in self.fails_with:
            raise NotImplementedError("no such code")
        code = inner_compile(graph, inputs)
        assert code._boxed_call

        def compiled(*inputs: Any) -> Any:
            given = [value + 0 for value in inputs] if self.around == "inputs" else list(inputs)
            outputs = code(given)
            return [value + 0 for value in outputs] if self.around == "outputs" else outputs

        def guarded(*inputs: Any) -> Any:
            return compiled(*inputs)

        guarded._torchdynamo_orig_callable = compiled  # type: ignore[attr-defined]
        self.compiled = compiled
        return guarded


def doubled(*inputs: Any) -> list[Any]:
    return [2 * value for value in inputs]


GRAPH: Any = doubled


@pytest.mark.parametrize(
    ("inputs", "options", "wrappers"),
    [
        ([torch.ones(2)], {}, [True]),
        ([torch.ones(2), 3], {}, [None]),  # a size that varies
        ([torch.ones(2, device="meta"), torch.ones(2)], {}, [None]),
        ([torch.ones(2)], {"cpp_wrapper": False}, [False]),
        ([torch.ones(2), 3], {"cpp_wrapper": True}, [True]),
    ],
)
def test_inductor_gets_the_settings_of_steps_below_those_asked_for(inputs, options, wrappers, monkeypatch):
    inductor = Inductor(monkeypatch)
    compile_graph(GRAPH, inputs, "inductor", {"size_asserts": True, **options})
    assert [settings.pop("cpp_wrapper", None) for settings in inductor.asked] == wrappers
    assert inductor.asked == [COMPILED_WITH | {"size_asserts": True}]


@pytest.mark.parametrize(
    ("inputs", "options", "fails_with", "wrappers"),
    [
        ([torch.ones(2)], {}, (True,), [True, None]),
        ([torch.ones(2)], {}, (True, None), [True, None]),
        ([torch.ones(2)], {"cpp_wrapper": True}, (True,), [True]),
        ([torch.ones(2), 3], {}, (None,), [None]),
    ],
)
def test_code_that_cannot_be_made_for_cpp_is_made_for_python_unless_cpp_was_asked_for(
    inputs, options, fails_with, wrappers, monkeypatch
):
    inductor = Inductor(monkeypatch, fails_with=fails_with)
    if fails_with == (True,) and not options:
        run = compile_graph(GRAPH, inputs, "inductor", options)
        assert torch.equal(run(torch.ones(2))[0][0], torch.full((2,), 2.0))
    else:
        with pytest.raises(NotImplementedError, match="no such code"):
            compile_graph(GRAPH, inputs, "inductor", options)
    assert [settings.get("cpp_wrapper") for settings in inductor.asked] == wrappers
    assert {name: inductor.asked[-1][name] for name in COMPILED_WITH} == COMPILED_WITH


@pytest.mark.parametrize(
    ("around", "autocast_on", "is_own"),
    [
        ("nothing", "", True),
        ("inputs", "", False),
        ("outputs", "", False),
        ("nothing", "cpu", False),
        ("nothing", "cuda", False),
    ],
)
def test_direct_calls_are_inductors_own_code_where_torch_does_nothing_around_it(
    around, autocast_on, is_own, monkeypatch
):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == autocast_on)
    inductor = Inductor(monkeypatch, around=around)
    compiled = compile_graph(GRAPH, [torch.ones(1), torch.ones(2)], "inductor", {})
    seen = []
    for _ in range(2):
        inputs = torch.ones(1), torch.ones(2)
        outputs, direct = compiled(*inputs)
        assert list(map(len, outputs)) == [1, 2]
        if is_own:
            assert direct(*inputs) == ("own code", *inputs)
        else:
            assert direct is inductor.compiled
        seen += [weakref.ref(value) for value in (*inputs, *outputs)]
        del inputs, outputs
    assert [tensor() for tensor in seen] == [None] * 8


def test_direct_calls_of_other_backends_are_their_graphs():
    graph = torch.fx.symbolic_trace(lambda x: (2 * x,))
    outputs, direct = compile_graph(graph, [torch.ones(1)], "eager", {})(torch.ones(1))
    assert outputs == direct(torch.ones(1)) == (2,)
