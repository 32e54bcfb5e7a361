"""A compiled step that is compiled ahead, always on the same batch, and measured beside an eager one.

What the compiler makes of a size that varies may depend on the first batch it sees. A run that is resumed, or an epoch
that is trained again, therefore compiles for the batch that the whole run began with.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from dwiml_func.compiled.graph import CompiledFunction
from dwiml_func.core.state import TrainState
from dwiml_func.core.step import NonFiniteError
from dwiml_func.types import Metrics

__all__ = ["CompilationReport", "WarmUpStep"]

_REPEATS = 3


class CompilationReport(NamedTuple):
    """What compilation cost, and what it brings.

    Args:
        seconds: time of compilation.
        eager_step: seconds of a step without compilation, on the first batch.
        compiled_step: seconds of a compiled step, on the same batch.

    Example:
        >>> CompilationReport(seconds=30.0, eager_step=0.2, compiled_step=0.1).break_even
        300
    """

    seconds: float
    eager_step: float
    compiled_step: float

    @property
    def break_even(self) -> int | None:
        """Number of steps after which compilation has paid off; None where it does not."""
        gain = self.eager_step - self.compiled_step
        return round(self.seconds / gain) if gain > 0 else None

    def __str__(self) -> str:
        pays = "which does not pay off" if self.break_even is None else f"paid off after {self.break_even} steps"
        return (
            f"Compiled in {self.seconds:.1f} s: a step takes {1000 * self.compiled_step:.1f} ms instead of "
            f"{1000 * self.eager_step:.1f} ms, {pays}"
        )


class WarmUpStep:
    """A compiled step that is compiled at its first call, for a given batch, before it takes that call's step.

    Args:
        step: the step.
        eager: the same step without a graph.
        graph: what is compiled in the step.
        first_batch: gives the batch to compile for.

    Attributes:
        graph: the same.
        report: what compilation cost and brings; None before the first call, and where steps run eagerly.

    Example:
        >>> step = jit_step(loss_fn=loss_fn, optimizer=optimizer)  # doctest: +SKIP
        >>> step = WarmUpStep(step, eager=step.eager, graph=step.graph, first_batch=lambda: batch)  # doctest: +SKIP
        >>> state, metrics = step(state, batch, lr=0.001)  # doctest: +SKIP
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
        """Take one optimizer step, see `train_step`.

        Args:
            state: the run before the step.
            batch: what the loss takes.
            lr: learning rate.

        Returns:
            The run after the step and the batch's sums.
        """
        if self._first_batch is not None:
            self._warm_up(state, self._first_batch())
            self._first_batch = None
        return self._step(state, batch, lr=lr)

    def _warm_up(self, state: TrainState, batch: Any) -> None:
        """Compile, and measure a few steps of both kinds, on copies that are thrown away."""
        try:
            rehearsal, _ = self._step(_copy(state), batch, lr=0.0)
            times: dict[Callable[..., Any], list[float]] = {self._step: [], self._eager: []}
            for _ in range(1 + _REPEATS):
                for step, seconds in times.items():
                    start = time.perf_counter()
                    rehearsal, _ = step(rehearsal, batch, lr=0.0)
                    seconds.append(time.perf_counter() - start)
        except NonFiniteError:  # the training itself meets it, and says where
            return
        if self.graph.eager_reason is None:
            compiled, eager = (statistics.median(seconds[1:]) for seconds in times.values())
            self.report = CompilationReport(self.graph.compile_seconds, eager, compiled)


def _copy(state: TrainState) -> TrainState:
    def copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in tensors.items()}

    return state.replace(
        params=copy(state.params),
        buffers=copy(state.buffers),
        opt_state={kind: copy(moments) for kind, moments in state.opt_state.items()},
        epoch=0,
        batch=0,
        sums={},
    )
