"""Claims about the private switches of torch that `jit_step` needs: without them steps run eagerly, with a reason."""

import logging
from importlib import import_module

import pytest
import torch
from test_compiled_step import make_steps, run, same_states

from dwiml_func.compiled import _torch_private

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
