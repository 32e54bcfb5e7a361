"""The gradient of a loss as one compiled graph, for steps that add the gradients of shards."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor

from dwiml_func.compiled.function import NO_KEY, CompiledFunction, as_float64
from dwiml_func.core.gradients import AutodiffBackend, is_differentiated, value_and_grad
from dwiml_func.core.loss import LossFn, LossOut
from dwiml_func.core.loss_check import check_loss_fn
from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.types import Buffers, Params

__all__ = ["JitGradient"]

_MAX_COMPILATIONS = 8  # as of `jit_step`


class JitGradient:
    """`value_and_grad` of one loss, compiled: a `gradient_fn` for `train_step` or `sharded_value_and_grad`.

    The arguments are those of `jit_step`.
    """

    def __init__(self, loss_fn: LossFn, *, dynamic: bool = False, backend: str = "inductor") -> None:
        def graph(batch: Any, params: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Any, ...]:
            out, grads = value_and_grad(loss_fn, params, buffers, batch, key=NO_KEY)
            pairs = {
                name: tuple(as_float64(part, out.loss) for part in mean) if isinstance(mean, tuple) else mean
                for name, mean in out.aux.items()
            }
            return out.loss, as_float64(out.weight, out.loss), out.buffers, pairs, grads

        self._loss_fn = loss_fn
        self._is_stochastic = getattr(loss_fn, "stochastic", True)
        self.graph = CompiledFunction(graph, dynamic=dynamic, max_compilations=_MAX_COMPILATIONS, backend=backend)

    def __call__(
        self,
        loss_fn: LossFn,
        params: Params,
        buffers: Buffers,
        batch: Any,
        *,
        key: Key,
        backend: AutodiffBackend | None = None,
    ) -> tuple[LossOut, dict[str, Tensor]]:
        if loss_fn is not self._loss_fn:
            raise ValueError("Expected the loss that was compiled. Received: another one.")
        if is_differentiated(params):  # a compiled graph would cut off autograd's
            return value_and_grad(loss_fn, params, buffers, batch, key=key, backend=backend)
        check_loss_fn(loss_fn, params, buffers, batch, key=key)
        with torch_rng(key) if self._is_stochastic else nullcontext():
            results = self.graph(batch, params=dict(params), buffers=dict(buffers))
        if results is None:
            return value_and_grad(loss_fn, params, buffers, batch, key=key, backend=backend)
        loss, weight, new_buffers, aux, grads = results
        return LossOut(loss, weight, new_buffers, aux), grads
