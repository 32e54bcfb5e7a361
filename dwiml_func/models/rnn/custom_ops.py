"""The kernels as operators for torch.compile: each layer is one node of the graph, forward and backward.

Taken apart, a scan over hundreds of time steps would make a graph that takes minutes to compile and fits one batch
only. An operator fits batches of any length. No number may be read from a tensor while a graph is traced, so the layout
of a batch is an operator too (see `packing`), and the rows of each time step are given by the lengths of the sequences.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from dwiml_func.models.rnn.kernels import KERNELS
from dwiml_func.models.rnn.scan import State, Weights

__all__ = ["compiled_scan"]


def compiled_scan(rnn_key: str, x: Tensor, lengths: Tensor, weights: Weights, state: State) -> tuple[Tensor, State]:
    """What `plain_scan` computes, for a graph of `torch.compile`, with first gradients by `torch.autograd`.

    `lengths` (S,) int64 are those of the sequences, longest first; they add up to the rows of x.
    """
    outputs, *rest = _forward(rnn_key, x, lengths, list(weights), list(state))
    return outputs, tuple(rest[: len(state)])


def _batch_sizes(lengths: Tensor) -> list[int]:
    num_ended = torch.bincount(lengths).cumsum(0)
    return (len(lengths) - num_ended)[:-1].tolist()


@torch.library.custom_op("dwiml_func::rnn_forward", mutates_args=())
def _forward(rnn_key: str, x: Tensor, lengths: Tensor, weights: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    """(outputs, last state, 2 activations)."""
    sizes = _batch_sizes(lengths)
    outputs, last, activations = KERNELS[rnn_key].forward(x, sizes, cast(Weights, tuple(weights)), tuple(state))
    return [outputs, *last, *activations]


@_forward.register_fake
def _(rnn_key: str, x: Tensor, lengths: Tensor, weights: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    num_gates, size = weights[1].shape
    num_rows = x.shape[0]  # not len(x), which would be a constant of the graph
    kept = (2, num_rows, size) if rnn_key == "lstm" else (num_rows, size)
    activations = [x.new_empty(num_rows, num_gates), x.new_empty(kept)]
    return [x.new_empty(num_rows, size), *(torch.empty_like(part) for part in state), *activations]


@torch.library.custom_op("dwiml_func::rnn_backward", mutates_args=())
def _backward(
    rnn_key: str,
    grads: list[Tensor],
    x: Tensor,
    lengths: Tensor,
    weights: list[Tensor],
    saved: list[Tensor],
    wants_x: bool,
) -> list[Tensor]:
    """(gradients of 4 weights, state and, if wanted, x); saved is (state, outputs, 2 activations)."""
    *state, outputs, first, second = saved
    gradients = KERNELS[rnn_key].backward(
        x,
        _batch_sizes(lengths),
        cast(Weights, tuple(weights)),
        tuple(state),
        outputs,
        (first, second),
        grads[0],
        tuple(grads[1:]),
        wants_x,
        True,
    )
    assert gradients.weights is not None
    return [*gradients.weights, *gradients.state, *([] if gradients.x is None else [gradients.x])]


@_backward.register_fake
def _(
    rnn_key: str,
    grads: list[Tensor],
    x: Tensor,
    lengths: Tensor,
    weights: list[Tensor],
    saved: list[Tensor],
    wants_x: bool,
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (*weights, *saved[:-3], *([x] if wants_x else []))]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.rnn_key, x, lengths, weights, state = inputs
    outputs, activations = output[0], output[-2:]
    ctx.num_states = len(state)
    ctx.save_for_backward(x, lengths, *weights, *state, outputs, *activations)


def _gradients(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, lengths, *rest = ctx.saved_tensors
    weights, saved = rest[:4], rest[4:]
    like = (saved[-3], *saved[:-3])
    given = [torch.zeros_like(y) if grad is None else grad for grad, y in zip(grads, like, strict=False)]
    wants_x = ctx.needs_input_grad[1]
    results = _backward(ctx.rnn_key, [g.contiguous() for g in given], x, lengths, weights, saved, wants_x)
    return None, results[-1] if wants_x else None, None, results[:4], results[4 : 4 + ctx.num_states]


_forward.register_autograd(_gradients, setup_context=_setup_context)
