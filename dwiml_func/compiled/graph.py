"""A function of a batch as one torch.compile graph, however the sizes of batches vary; or the reason why it is not."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = ["NO_KEY", "CompiledFunction", "as_float64"]

_ARGUMENT = re.compile(r"$|(L\[')?(params|buffers|opt_state|batch|numbers)\b")  # of a guard's name; shapes have none
_INDUCTOR = {
    "size_asserts": False,  # guards look at the arguments already
    "fx_graph_cache": False,  # it does not know when an operator of this package changes
    "fallback_random": True,  # torch's own generators draw, those that `torch_rng` seeds, as in an eager step
    "cpp.enable_loop_tail_vec": False,  # how a loop ends would depend on the sizes of the batch that was compiled for
}


class CompiledFunction:
    """A compiled function `(batch, **others) -> results`, tensors in and out.

    Args:
        function: what to compile. Its arguments are called `batch`, `params`, `buffers`, `opt_state` or `numbers`.
        dynamic: whether the first size of each tensor in a batch may vary from batch to batch within one graph.
        max_compilations: graphs at most; a batch that would need one more turns compilation off.
        backend: a backend of torch.compile.

    Attributes:
        num_compilations: graphs compiled so far.
        compile_seconds: time of the calls that compiled them.
        eager_reason: why calls give None from now on; None where they run compiled.

    Example:
        >>> double = CompiledFunction(lambda batch: 2 * batch, dynamic=False, max_compilations=1, backend="eager")
        >>> double(torch.ones(1)), double.num_compilations
        (tensor([2.]), 1)
    """

    def __init__(self, function: Callable[..., Any], *, dynamic: bool, max_compilations: int, backend: str) -> None:
        if max_compilations < 1:
            raise ValueError(f"Expected max_compilations of at least 1. Received: {max_compilations}")
        self.num_compilations = 0
        self.compile_seconds = 0.0
        self.eager_reason: str | None = None
        self._is_compiling = False
        self._dynamic = dynamic
        self._backend = backend
        self._shapes_seen: set[Any] = set()
        self._graph = torch.compile(
            function,
            fullgraph=True,
            backend=self._compile,  # type: ignore[arg-type]
            options={"guard_filter_fn": _guards_of_arguments},
            recompile_limit=max_compilations,
            isolate_recompiles=True,
        )

    def __call__(self, batch: Any, **others: Any) -> Any:
        """Run the graph; the first call compiles, and those that bring a batch which no graph fits.

        Args:
            batch: a tensor, or tuples, lists, mappings and dataclasses of tensors.
            others: the function's other arguments, by name.

        Returns:
            What the function does; None where it cannot be compiled as a whole, with a warning for the first time.
        """
        if self.eager_reason is not None:
            return None
        first = 1 if self._dynamic else 0  # of the sizes that tell batches apart
        shapes = tuple(tensor.shape[first:] for tensor in _tensors(batch))
        if shapes in self._shapes_seen:
            try:
                return self._graph(batch=batch, **others)
            except Exception as error:
                if not _is_about_tracing(error):
                    raise
                # No graph fits these tensors, of shapes that are known but of another dtype, with other strides, ...
        results = self._compile_and_run(batch, others)
        if results is not None:
            self._shapes_seen.add(shapes)
        return results

    def _compile_and_run(self, batch: Any, others: Mapping[str, Any]) -> Any:
        """Run a batch for which a graph may have to be made; None where none can be."""
        from torch._dynamo import config as dynamo
        from torch._functorch import config as functorch
        from torch.fx.experimental import _config as symbolic_shapes

        if self._dynamic:
            for tensor in _tensors(batch):
                if tensor.dim() > 0:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        num_before, start = self.num_compilations, time.perf_counter()
        try:
            # Python's numbers are constants. Sizes that happen to be equal in one batch are not taken for the same
            # size, nor a size of 1 for a constant.
            tracing = dynamo.patch(
                trace_autograd_ops=True,
                specialize_float=True,
                assume_static_by_default=True,
                automatic_dynamic_shapes=False,
            )
            no_cache = functorch.patch(enable_autograd_cache=False)  # see _INDUCTOR
            with no_cache, tracing, symbolic_shapes.patch(use_duck_shape=False, backed_size_oblivious=True):  # type: ignore[attr-defined]
                self._is_compiling = True
                return self._graph(batch=batch, **others)
        except Exception as error:
            self.eager_reason = _shortened(error)
            message = "Training steps run without compilation from here on: %s"
            logging.getLogger(__name__).warning(message, self.eager_reason)
            return None
        finally:
            self._is_compiling = False
            if self.num_compilations > num_before:
                self.compile_seconds += time.perf_counter() - start

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any], **_: Any) -> Any:
        if not self._is_compiling:
            raise RuntimeError("a graph is made by `_compile_and_run` alone, which sets how")
        self.num_compilations += 1
        if self._backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(graph, inputs, config_patches=_INDUCTOR)
        return torch._dynamo.lookup_backend(self._backend)(graph, inputs)


def as_float64(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor within a graph.

    Args:
        value: a number, or a () tensor.
        like: a tensor on the same device.

    Returns:
        () float64.

    Example:
        >>> as_float64(2, torch.zeros(()))
        tensor(2., dtype=torch.float64)
    """
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64)
    return like.new_full((), value, dtype=torch.float64)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a batch: a tensor, or tuples, lists, mappings and dataclasses of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _guards_of_arguments(guards: list[Any]) -> list[bool]:
    """Which of torch's guards are looked at in each call: all of the arguments' and none of what is fixed."""
    return [not guard.is_global and _ARGUMENT.match(guard.name) is not None for guard in guards]


def _is_about_tracing(error: Exception) -> bool:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return isinstance(error, TorchDynamoException | FailOnRecompileLimitHit)


class _NoKey:
    """A key's numbers would be frozen in a graph."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError("a key cannot be used in a compiled step")


NO_KEY: Any = _NoKey()
"""Stands for a key in a graph."""


def _shortened(error: Exception) -> str:
    """The first line of torch's explanation, and the place in the user's code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    places = [line for line in lines if line.startswith('File "')]
    place = f" ({places[-1]})" if places else ""
    return f"{lines[0] if lines else type(error).__name__}{place}"
