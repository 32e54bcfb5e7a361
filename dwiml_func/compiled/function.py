"""A function of a batch as a `torch.compile` graph without breaks, or the reason why it runs without compilation."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from dwiml_func._checks import listed
from dwiml_func.compiled import _torch_private as private
from dwiml_func.compiled.direct import Heard

__all__ = ["NO_KEY", "CompiledFunction", "as_float64"]


class CompiledFunction:
    """A compiled function `(batch, **others) -> results`, tensors in and out.

    The function's arguments are called `batch`, `params`, `buffers`, `opt_state` or `numbers`. With `dynamic` the first
    size of each tensor in a batch may vary within one graph. A batch that needs more than `max_compilations` graphs
    turns compilation off. Numbers in a batch are constants of a graph until one changes: from then on they are tensors
    to the function, unless it cannot take them so, as where it loops so many times.

    Attributes:
        num_compilations: graphs compiled so far.
        compile_seconds: duration of the calls that compiled them.
        eager_reason: why calls return None from now on; None while they run compiled.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        dynamic: bool,
        max_compilations: int,
        backend: str,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if max_compilations < 1:
            raise ValueError(f"Expected max_compilations of at least 1. Received: {max_compilations}")
        if options and backend != "inductor":
            raise ValueError(f"Expected options with the backend 'inductor' only. Received: {backend!r}")
        self.num_compilations = 0
        self.compile_seconds = 0.0
        self.eager_reason: str | None = None
        self._heard: Heard | None = None
        self._function = function
        self._dynamic = dynamic
        self._max_compilations = max_compilations
        self._backend, self._options = backend, dict(options or {})
        self._graph: Callable[..., Any] | None = None
        self._is_compiling = False
        self._shapes_seen: set[Any] = set()
        self._numbers: tuple[float, ...] | None = None  # of the first batch
        self._numbers_are: Literal["constant", "tensors", "unchanged"] = "unchanged"

    def __call__(self, batch: Any, **others: Any) -> Any:
        """Run the graph, after compiling it for a batch that fits no graph yet.

        The batch is a tensor, or tuples, lists, mappings and dataclasses of tensors. The result is None where the
        function cannot be compiled as a whole, with a warning for the first time.
        """
        return self.hear(batch, **others)[0]

    def hear(self, batch: Any, **others: Any) -> tuple[Any, Heard | None]:
        """Call it, and tell what graph that came to; None where there was not just one."""
        self._heard = None
        results = self._run(batch, **others)
        heard, self._heard = self._heard, None
        return results, heard

    def _run(self, batch: Any, **others: Any) -> Any:
        if self.eager_reason is not None:
            return None
        given = batch
        if self._numbers_are != "constant" and (numbers := tuple(_numbers(batch))):
            if self._numbers is None:
                self._numbers = numbers
            elif numbers != self._numbers:
                self._numbers_are = "tensors"
            if self._numbers_are == "tensors":
                batch = _with_tensors(batch)
        first = 1 if self._dynamic else 0  # of the sizes that distinguish batches
        shapes = tuple(tensor.shape[first:] for tensor in _tensors(batch))
        if self._graph is not None and shapes in self._shapes_seen:
            try:
                return self._graph(batch=batch, **others)
            except Exception as error:
                if not private.is_about_tracing(error):
                    raise
                # No graph fits these tensors: their shapes are known, but not their dtypes or strides.
        try:
            results = self._compile_and_run(batch, others)
        except _NumbersNeeded:
            self._numbers_are = "constant"
            return self._run(given, **others)
        if results is not None:
            self._shapes_seen.add(shapes)
        return results

    def _compile_and_run(self, batch: Any, others: Mapping[str, Any]) -> Any:
        """Run a batch that may need a new graph; None if it cannot be compiled."""
        num_before, start = self.num_compilations, time.perf_counter()
        try:
            if self._graph is None:
                if lacks := private.missing(self._backend):
                    return self._run_eagerly(f"jit_step needs torch 2.13, {torch.__version__} lacks {listed(lacks)}")
                self._graph = private.compile_whole(self._function, self._compile, self._max_compilations + 1)
            if self._dynamic:
                for tensor in _tensors(batch):
                    if tensor.dim() > 0:
                        private.mark_dynamic(tensor)
            with private.tracing():
                self._is_compiling = True
                return self._graph(batch=batch, **others)
        except Exception as error:
            if (
                self._numbers_are == "tensors"
                and private.is_about_tracing(error)
                and self.num_compilations < self._max_compilations
            ):
                raise _NumbersNeeded from None
            return self._run_eagerly(_shortened(error))
        finally:
            self._is_compiling = False
            if self.num_compilations > num_before:
                self.compile_seconds += time.perf_counter() - start

    def _run_eagerly(self, reason: str) -> None:
        self.eager_reason = reason
        logging.getLogger(__name__).warning("Training steps run without compilation from now on: %s", reason)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any], **_: Any) -> Any:
        if not self._is_compiling:
            raise RuntimeError("only `_compile_and_run` makes graphs, under its settings")
        if self._backend == "eager" and any("checkpoint" in str(node.target) for node in graph.graph.nodes):
            raise RuntimeError("the backend 'eager' computes activations again with other random numbers")
        if self.num_compilations == self._max_compilations:
            raise RuntimeError(
                f"the batches need more than {self.num_compilations} graphs: their shapes, dtypes, or numbers that the "
                f"code branches or loops by differ"
            )
        self.num_compilations += 1
        compiled = private.compile_graph(graph, inputs, self._backend, self._options)

        def run(*inputs: Any) -> Any:
            outputs, direct = compiled(*inputs)
            self._heard = Heard(direct, inputs, outputs)
            return outputs

        return run


def as_float64(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a () float64 tensor within a graph, on the device of `like`."""
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64)
    return like.new_full((), value, dtype=torch.float64)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for part in _parts(value):
            yield from _tensors(part)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, tuple | list):
        return value
    return [getattr(value, field.name) for field in fields(value)] if is_dataclass(value) else ()


class _NumbersNeeded(Exception):
    """A function cannot be traced with tensors for the numbers of its batch."""


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    else:
        for part in _parts(value):
            yield from _numbers(part)


def _with_tensors(value: Any) -> Any:
    """A batch whose numbers are () tensors on the CPU, int64 and float64."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
    if isinstance(value, Mapping):
        return {name: _with_tensors(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [_with_tensors(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value):
        copied = copy.copy(value)
        for field in fields(value):
            object.__setattr__(copied, field.name, _with_tensors(getattr(value, field.name)))  # it may be frozen
        return copied
    return value


class _NoKey:
    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError("a key cannot be used in a compiled step")


NO_KEY: Any = _NoKey()
"""Placeholder for a key in a graph, where a key's numbers would be constants."""


def _shortened(error: Exception) -> str:
    """The first line of torch's explanation, and the last place in the user's code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    places = [line for line in lines if line.startswith('File "')]
    location = f" ({places[-1]})" if places else ""
    if len(lines) > 1 and lines[0].startswith("backend="):  # torch's "backend='...' raised:"
        lines = lines[1:]
    return f"{lines[0] if lines else type(error).__name__}{location}"
