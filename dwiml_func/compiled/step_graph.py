"""What a compiled step computes: gradients, clipping, optimizer and metrics, tensors in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dwiml_func._trees import choose
from dwiml_func.compiled.function import NO_KEY, as_float64
from dwiml_func.core.gradients import value_and_grad
from dwiml_func.core.loss import LossFn
from dwiml_func.core.non_finite import NonFinite, can_skip, is_bad_step, skip_metrics, spoil
from dwiml_func.core.step import clip_and_measure
from dwiml_func.optim.chain import resolve_optimizer, update_where, update_with
from dwiml_func.types import Optimizer, OptState, Sum

__all__ = ["make_graph", "merged"]


def make_graph(
    loss_fn: LossFn,
    optimizer: Optimizer | Callable[..., Optimizer],
    clip_grad: float | None,
    donate: bool,
    non_finite: NonFinite | None,
) -> Callable[..., tuple[Any, ...]]:
    """A whole step from tensors to tensors, which `torch.compile` or a CUDA graph gets.

    With `donate` it writes into the tensors of parameters and optimizer state where it can. Under `torch.compile` it
    returns None for these, see `_write`.
    """

    def graph(
        batch: Any,
        params: dict[str, Tensor],
        buffers: dict[str, Tensor],
        opt_state: dict[str, Any],
        numbers: Tensor,
    ) -> tuple[Any, ...]:
        lr, step, blocked, *decay = numbers.unbind()
        own = resolve_optimizer(optimizer, *(decay or [None]))
        out, grads = value_and_grad(loss_fn, params, buffers, batch, key=NO_KEY)
        grads, norm, metrics = clip_and_measure(out, grads, clip_grad)
        skips = non_finite in (None, "skip") and can_skip(opt_state)
        # Tensors that are not finite are never committed. The caller checks `values` afterwards.
        is_bad = is_bad_step(out.loss, norm)
        if skips:
            in_float64 = {name: Sum(*(as_float64(part, out.loss) for part in own)) for name, own in metrics.items()}
            grads, metrics = spoil(grads, is_bad), skip_metrics(is_bad, in_float64)
        keep_old = is_bad | (blocked > 0)
        keep_own = blocked > 0 if skips else keep_old
        is_compiled = torch.compiler.is_compiling()
        given = own, grads, opt_state, params
        rates = {"lr": lr, "step": step, "weight": as_float64(out.weight, out.loss) if own.uses_weight else 1}
        if donate and not is_compiled:
            new_params, new_opt_state = update_where(*given, **rates, keep_old=keep_own)
        else:
            new_params, new_opt_state = update_with(*given, **rates, donate=False)
            new_params = choose(keep_own, params, new_params)
            new_opt_state = choose(keep_own, opt_state, new_opt_state)
        new_buffers = choose(keep_old, buffers, out.buffers)
        sums = [number for sum_ in metrics.values() for number in sum_]
        first_bad = as_float64(is_bad & (blocked == 0), out.loss)
        scalars = (out.loss, norm, first_bad * step, first_bad, *sums)
        values = torch.stack([as_float64(value, out.loss) for value in scalars])
        if donate and is_compiled and own.is_elementwise:
            # Others have counts, for which torch would compile twice, see `_write`.
            written, written_state = _write(params, new_params), _write(opt_state, new_opt_state)
            return written, new_buffers, written_state, tuple(metrics), values
        return new_params, new_buffers, new_opt_state, tuple(metrics), values

    return graph


def _write(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a tree into an old one, and return it with None for what was copied: the old one may lack some leaves."""
    # () tensors are not copied. torch.compile traces a function twice where it writes in place and has () float64 or
    # int64 tensors on the CPU as arguments, and the second trace of torch 2.13 lacks the copies into those.
    rest: dict[str, Any] = {}
    for name, leaf in new.items():
        if not isinstance(leaf, Tensor):
            rest[name] = _write(old.get(name, {}), leaf)
        elif name in old and leaf.dim() > 0:
            old[name].copy_(leaf)
            rest[name] = None
        else:
            rest[name] = leaf
    return rest


def merged(old: OptState, rest: Mapping[str, Any]) -> dict[str, Any]:
    """The tree that `_write` has written."""
    return {
        name: old[name] if leaf is None else leaf if isinstance(leaf, Tensor) else merged(old.get(name, {}), leaf)
        for name, leaf in rest.items()
    }
