"""What compiled steps need of torch beyond its documented interface. `missing` names what a torch lacks of it.

Other rooms use private things of torch that all supported versions have: the `_foreach_` operations
(`optim/_foreach.py`), `torch._C._are_functorch_transforms_active` and what is beneath `vmap` (`_transforms.py`,
`ensemble/rng.py`), `torch.utils._pytree` for states as trees, and in `core/stateless.py` the dicts `_parameters` and
`_buffers` of a module, a tensor's `_version`, `_backward_hooks` and `_post_accumulate_grad_hooks`, and the caches
`_flat_weights` and `_flat_weight_refs` of recurrent layers. `core/loss_check.py` asks nodes of a backward pass for
`_saved_sparse`, and `experiment/audit/lockstep.py` digests tensors within `torch._C._DisableTorchDispatch`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from operator import is_
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "compile_graph",
    "compile_whole",
    "is_about_tracing",
    "is_watched",
    "mark_dynamic",
    "missing",
    "settings_guard",
    "tensor_guard",
    "tracing",
]

_ARGUMENTS = (
    "options",  # guard_filter_fn, see `_guards_of_arguments`
    "recompile_limit",  # graphs of one function; torch's own limit counts those of all
    "isolate_recompiles",  # functions with the same code do not look through each other's graphs
)
_TRACING = {
    "torch._dynamo.config": {
        "trace_autograd_ops": True,  # torch.autograd.grad within the graph
        "specialize_float": True,  # Python's numbers are constants
        "assume_static_by_default": True,  # sizes vary only where `mark_dynamic` says so
        "automatic_dynamic_shapes": False,  # also after a second size was seen
    },
    "torch._functorch.config": {
        "enable_autograd_cache": False,  # it does not know when an operator of this package changes
    },
    "torch.fx.experimental._config": {
        "use_duck_shape": False,  # sizes that are equal in one batch are not the same size
        "backed_size_oblivious": True,  # a size of 1 is not a constant
    },
}
_INDUCTOR = {
    "size_asserts": False,  # guards check the arguments already
    "fx_graph_cache": False,  # as enable_autograd_cache
    "fallback_random": True,  # use torch's generators, which `torch_rng` seeds, as an eager step does
    "cpp.enable_loop_tail_vec": False,  # else the end of a loop depends on the sizes of the first batch
}
_FUNCTIONS = {
    "torch._dynamo": ("lookup_backend", "maybe_mark_dynamic"),
    "torch._dynamo.exc": ("FailOnRecompileLimitHit", "TorchDynamoException"),
    "torch._C._dynamo.guards": ("GlobalStateGuard", "TensorGuards"),
    "torch._C": ("_len_torch_dispatch_stack", "_len_torch_function_stack"),
}
_ARGUMENT = re.compile(r"$|(L\[')?(params|buffers|opt_state|batch|numbers)\b")  # of a guard's name; shapes have none


def missing(backend: str) -> list[str]:
    """The names of what this torch lacks to compile with a backend; empty if it lacks nothing."""
    needed: dict[str, Iterable[str]] = {**_FUNCTIONS, **_TRACING}
    if backend == "inductor":
        needed |= {
            "torch._inductor.compile_fx": ("compile_fx", "compile_fx_inner"),
            "torch._inductor.config": _INDUCTOR,
        }
    has = inspect.signature(torch.compile).parameters
    lacks = [f"torch.compile({name}=)" for name in _ARGUMENTS if name not in has]
    for path, names in needed.items():
        try:
            module = import_module(path)
        except ImportError:
            lacks.append(path)
        else:
            lacks += [f"{path}.{name}" for name in names if not hasattr(module, name)]
    return lacks


def compile_whole(function: Callable[..., Any], backend: Callable[..., Any], max_graphs: int) -> Callable[..., Any]:
    """`torch.compile` of a whole function, which calls `backend(graph, inputs)` for each new graph."""
    return torch.compile(
        function,
        fullgraph=True,
        backend=backend,  # type: ignore[arg-type]  # torch declares the type that backends had
        options={"guard_filter_fn": _guards_of_arguments},
        recompile_limit=max_graphs,
        isolate_recompiles=True,
    )


def _guards_of_arguments(guards: list[Any]) -> list[bool]:
    """The guards that each call checks: all of the arguments', none of what is fixed."""
    return [not guard.is_global and _ARGUMENT.match(guard.name) is not None for guard in guards]


@contextmanager
def tracing() -> Iterator[None]:
    """The settings under which a graph is traced."""
    with ExitStack() as stack:
        for path, settings in _TRACING.items():
            stack.enter_context(import_module(path).patch(**settings))
        yield


def mark_dynamic(tensor: Tensor) -> None:
    """Let the first size of a tensor vary within one graph, where the function allows it."""
    torch._dynamo.maybe_mark_dynamic(tensor, 0)


def compile_graph(
    graph: torch.fx.GraphModule, inputs: list[Any], backend: str, options: Mapping[str, Any]
) -> Callable[..., tuple[Any, Callable[..., Any]]]:
    """A traced graph, compiled by a backend of torch.compile; the options are inductor's.

    It returns the outputs, and what gives them without guards where torch's settings are the same: inductor's own code
    where it had these inputs and outputs, so that what torch does around it changed nothing.

    Where all sizes are fixed, on the CPU, inductor's code calls its kernels from C++ (`cpp_wrapper`), which takes two
    thirds of the time of a small model's step, unless that code cannot be made.
    """
    if backend != "inductor":
        other = torch._dynamo.lookup_backend(backend)(graph, inputs)
        return lambda *inputs: (other(*inputs), _undecorated(other))
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    calls: list[tuple[Any, tuple[Any, ...], Sequence[Any]]] = []

    def compile_inner(*args: Any, **kwargs: Any) -> Any:
        code: Any = compile_fx_inner(*args, **kwargs)

        def call(inputs: list[Any]) -> Any:
            given = tuple(inputs)  # the code empties the list
            outputs = code(inputs)
            calls.append((code, given, outputs))
            return outputs

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def compile_with(**wrapper: Any) -> Any:
        patches = {**_INDUCTOR, **wrapper, **options}
        return compile_fx(graph, inputs, inner_compile=compile_inner, config_patches=patches)  # type: ignore[arg-type]

    is_fixed = all(isinstance(value, Tensor) and value.device.type == "cpu" for value in inputs)
    try:
        compiled = compile_with(cpp_wrapper=True) if is_fixed else compile_with()
    except Exception:
        if not is_fixed or options.get("cpp_wrapper"):
            raise
        compiled = compile_with()

    def run(*inputs: Any) -> tuple[Any, Callable[..., Any]]:
        outputs = compiled(*inputs)
        found = [code for code, given, own in calls if _are_same(given, inputs) and _are_same(own, outputs)]
        calls.clear()
        if not found or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return outputs, _undecorated(compiled)
        own = found[0].current_callable
        return outputs, lambda *inputs: own(list(inputs))

    return run


def _are_same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))


def is_about_tracing(error: Exception) -> bool:
    """Whether an error comes from tracing a function, and not from its graph at work."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return isinstance(error, TorchDynamoException | FailOnRecompileLimitHit)


def settings_guard() -> Callable[[], bool]:
    """A check whether torch's global settings (autocast, gradients, threads, determinism, ...) are those of now."""
    return import_module("torch._C._dynamo.guards").GlobalStateGuard().check


def tensor_guard(tensors: list[Tensor]) -> Callable[..., bool]:
    """A check whether as many tensors have the types, dtypes, devices, sizes and strides of these, and no gradient."""
    if not tensors:
        return lambda *others: not others
    sizes, strides = (
        [list(own) for own in lists] for lists in ([t.shape for t in tensors], [t.stride() for t in tensors])
    )
    guards = import_module("torch._C._dynamo.guards")
    return guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def is_watched() -> bool:
    """Whether a mode sees each operation of torch, such as a counter of operations; compiled code passes it by."""
    return torch._C._len_torch_function_stack() > 0 or torch._C._len_torch_dispatch_stack() > 0


def _undecorated(graph: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled graph without the guard against being traced, for calls that are not; itself where it has none."""
    return getattr(graph, "_torchdynamo_orig_callable", graph)
