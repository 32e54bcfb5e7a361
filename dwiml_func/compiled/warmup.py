"""A warm-up for a compiled step: compile it for the first batch of the run, and measure it beside an eager step.

The code that the compiler makes for a varying size may depend on the batch it compiles for. A resumed run, or an epoch
that is trained again, therefore compiles for the first batch of the whole run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dwiml_func.compiled.function import CompiledFunction
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.state import TrainState
from dwiml_func.types import Metrics

__all__ = ["CompilationReport", "WarmUpStep"]

_REPEATS = 3


class CompilationReport(NamedTuple):
    """Costs and gains of compilation: durations in seconds, of steps on the first batch."""

    seconds: float
    eager_step: float
    compiled_step: float

    @property
    def break_even(self) -> int | None:
        """Number of steps after which compilation has paid off; None if it never does."""
        gain = self.eager_step - self.compiled_step
        return round(self.seconds / gain) if gain > 0 else None

    def __str__(self) -> str:
        pays = "which does not pay off" if self.break_even is None else f"paid off after {self.break_even} steps"
        return (
            f"Compiled in {self.seconds:.1f} s: a step takes {1000 * self.compiled_step:.1f} ms instead of "
            f"{1000 * self.eager_step:.1f} ms, {pays}"
        )


class WarmUpStep:
    """A compiled step whose first call compiles for the batch `first_batch()`, and then takes its own step.

    `graph` is the compiled function within `step`; `eager` is the same step without it. `report` is None before the
    first call, and if steps run eagerly.
    """

    def __init__(
        self,
        step: Callable[..., tuple[TrainState, Metrics]],
        *,
        eager: Callable[..., tuple[TrainState, Metrics]],
        graph: CompiledFunction,
        first_batch: Callable[[], Any],
    ) -> None:
        self.report: CompilationReport | None = None
        self.graph = graph
        self._step, self._eager = step, eager
        self._first_batch: Callable[[], Any] | None = first_batch

    def __call__(self, state: TrainState, batch: Any, *, lr: float | Tensor) -> tuple[TrainState, Metrics]:
        if self._first_batch is not None:
            self._warm_up(state, self._first_batch())
            self._first_batch = None
        return self._step(state, batch, lr=lr)

    def _warm_up(self, state: TrainState, batch: Any) -> None:
        """Compile, and measure a few steps of both kinds, on a copy of the state."""
        start = tree_map(torch.clone, state).replace(epoch=0, batch=0, sums={})
        try:
            rehearsal, _ = self._step(start, batch, lr=0.0)
            times: dict[Callable[..., Any], list[float]] = {self._step: [], self._eager: []}
            for _ in range(1 + _REPEATS):
                for step, seconds in times.items():
                    start = time.perf_counter()
                    rehearsal, _ = step(rehearsal, batch, lr=0.0)
                    seconds.append(time.perf_counter() - start)
        except NonFiniteError:  # the training will raise it too, with the right position
            return
        if self.graph.eager_reason is None:
            compiled, eager = (statistics.median(seconds[1:]) for seconds in times.values())
            self.report = CompilationReport(self.graph.compile_seconds, eager, compiled)
