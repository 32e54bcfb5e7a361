"""LSTM and GRU over the packed layout: outputs and gradients by hand, written in place into buffers.

What does not depend on the recurrence is one operation over the rows of many time steps: the input's share of the
gates; in the backward the slopes of the gates and the gradients of the weights and of the input. A time step keeps one
matrix product and a few short operations in place. All of it runs block by block, over as many time steps as fit a
core's cache: over all rows at once the short operations would spend most of their time waiting for memory. These
functions know nothing of autograd; `autograd` and `custom_ops` connect them to it. Products are taken in the dtype of
the weight matrices, which may be lower than that of everything else (see `scan`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dwiml_func.models.rnn.scan import State, Weights, add_product, write_product
from dwiml_func.models.rnn.step_loops import (
    gru_backward_steps,
    gru_forward_steps,
    lstm_backward_steps,
    lstm_forward_steps,
)
from dwiml_func.models.rnn.time_steps import TimeSteps

__all__ = ["KERNELS", "Gradients", "Kernel"]

# out = grad * y * (1 - y) and out = grad * (1 - y * y): one pass each, where a formula would take three.
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class Gradients(NamedTuple):
    """Gradients of a layer's inputs, each with its input's shape; None where it was not asked for."""

    x: Tensor | None
    state: State
    weights: Weights | None


class Kernel(NamedTuple):
    """How one kind of layer runs forward and backward. Neither function changes what it is given.

    forward: (x, batch_sizes, weights, state), as in `plain_scan`, to the outputs (P, H), the last state, and the
        activations: two tensors that the backward needs.
    backward: (x, batch_sizes, weights, state, outputs, activations, gradient of the outputs (P, H), gradients of the
        last state, whether x's gradient is wanted, whether the weights' are) to the gradients.
    """

    forward: Callable[[Tensor, Sequence[int], Weights, State], tuple[Tensor, State, tuple[Tensor, Tensor]]]
    backward: Callable[
        [Tensor, Sequence[int], Weights, State, Tensor, tuple[Tensor, ...], Tensor, State, bool, bool], Gradients
    ]


def _lstm_forward(
    x: Tensor, batch_sizes: Sequence[int], weights: Weights, state: State
) -> tuple[Tensor, State, tuple[Tensor, Tensor]]:
    time = TimeSteps(batch_sizes)
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    size = weight_hh.shape[1]
    gates = x.new_empty(len(x), 4 * size)
    outputs, cells_and_tanhs = x.new_empty(len(x), size), x.new_empty(2, len(x), size)
    cells, tanhs = cells_and_tanhs
    bias = bias_ih + bias_hh
    for_input, for_hidden = _transposed_copy(weight_ih), _transposed_copy(weight_hh)  # products are faster so
    for share in (for_input, for_hidden, bias):
        share[..., 2 * size : 3 * size] *= 2  # the candidate's, so that one sigmoid serves all gates
    minus_one = x.new_tensor(-1)
    hidden, cell = state
    for steps, rows in time.blocks:
        write_product(gates[rows], x[rows], for_input, bias)
        into = gates[rows], cells[rows], tanhs[rows], outputs[rows]
        hidden, cell = lstm_forward_steps(time.sizes[steps], *into, hidden, cell, for_hidden, minus_one)
    return outputs, (time.last_rows(outputs), time.last_rows(cells)), (gates, cells_and_tanhs)


def _lstm_backward(
    x: Tensor,
    batch_sizes: Sequence[int],
    weights: Weights,
    state: State,
    outputs: Tensor,
    activations: tuple[Tensor, ...],
    grad_outputs: Tensor,
    grad_last: State,
    wants_x: bool,
    wants_weights: bool,
) -> Gradients:
    time = TimeSteps(batch_sizes)
    weight_ih, weight_hh, _, _ = weights
    size = weight_hh.shape[1]
    gates, (cells, tanhs) = activations
    # First the slopes of the gates by the cell (input, forget, candidate) or by the hidden state (output), then in the
    # loop multiplied in place by the gradient of that.
    grad_gates = gates.new_empty(time.most_rows, 4 * size)
    slopes = gates.new_empty(len(grad_gates), size)  # of the cell by the hidden state
    grad_x = x.new_empty(x.shape) if wants_x else None
    grad_ih, grad_hh, grad_bias = (x.new_zeros(shape) for shape in ((x.shape[1], 4 * size), (size, 4 * size), 4 * size))
    grad_hidden = time.with_last(grad_outputs, grad_last[0])
    grad_state, grad_cell = torch.zeros_like(state[0]), grad_last[1].clone(memory_format=torch.contiguous_format)
    for block in reversed(time.blocks):
        steps, rows = block
        in_gate, forget_gate, candidate, out_gate = gates[rows].split(size, dim=1)
        block_grads, block_slopes = grad_gates[: len(in_gate)], slopes[: len(in_gate)]
        grad_in, grad_forget, grad_candidate, grad_out = block_grads.split(size, dim=1)
        _sigmoid_backward(candidate, in_gate, grad_input=grad_in)
        _sigmoid_backward(time.rows_before(cells, block, state[1]), forget_gate, grad_input=grad_forget)
        _tanh_backward(in_gate, candidate, grad_input=grad_candidate)
        _sigmoid_backward(tanhs[rows], out_gate, grad_input=grad_out)
        _tanh_backward(out_gate, tanhs[rows], grad_input=block_slopes)
        before = time.step_before(grad_hidden, block, grad_state)
        own = before, grad_hidden[rows], forget_gate, block_slopes, block_grads, grad_cell, weight_hh
        lstm_backward_steps(time.sizes[steps], *own)
        low_grads = block_grads.to(weight_ih.dtype)
        if grad_x is not None:
            write_product(grad_x[rows], low_grads, weight_ih)
        if wants_weights:
            add_product(grad_ih, x[rows].t(), low_grads)  # faster than its transpose
            add_product(grad_hh, time.rows_before(outputs, block, state[0]).t(), low_grads)
            grad_bias += block_grads.sum(0)
    grad_weights = (_transposed(grad_ih, weight_ih), _transposed(grad_hh, weight_hh), grad_bias, grad_bias.clone())
    return Gradients(grad_x, (grad_state, grad_cell), grad_weights if wants_weights else None)


def _gru_forward(
    x: Tensor, batch_sizes: Sequence[int], weights: Weights, state: State
) -> tuple[Tensor, State, tuple[Tensor, Tensor]]:
    time = TimeSteps(batch_sizes)
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    size = weight_hh.shape[1]
    bias = bias_ih.clone()
    bias[: 2 * size] += bias_hh[: 2 * size]
    gates, outputs = x.new_empty(len(x), 3 * size), x.new_empty(len(x), size)
    shares = bias_hh[2 * size :].repeat(len(x), 1)  # the hidden state's shares of the candidates
    for_input = weight_ih.t().contiguous()  # products are faster so
    for_gates, for_candidate = (part.t().contiguous() for part in weight_hh.split([2 * size, size]))
    (hidden,), minus_one = state, x.new_tensor(-1)
    for steps, rows in time.blocks:
        write_product(gates[rows], x[rows], for_input, bias)
        into = gates[rows], shares[rows], outputs[rows]
        hidden = gru_forward_steps(time.sizes[steps], *into, hidden, for_gates, for_candidate, minus_one)
    return outputs, (time.last_rows(outputs),), (gates, shares)


def _gru_backward(
    x: Tensor,
    batch_sizes: Sequence[int],
    weights: Weights,
    state: State,
    outputs: Tensor,
    activations: tuple[Tensor, ...],
    grad_outputs: Tensor,
    grad_last: State,
    wants_x: bool,
    wants_weights: bool,
) -> Gradients:
    time = TimeSteps(batch_sizes)
    weight_ih, weight_hh, _, _ = weights
    size = weight_hh.shape[1]
    gates, shares = activations
    # First the slopes of the reset gate, the update gate and the share by the hidden state, then in the loop multiplied
    # in place by its gradient.
    grad_gates = gates.new_empty(time.most_rows, 3 * size)
    grad_x = x.new_empty(x.shape) if wants_x else None
    grad_ih, grad_hh = x.new_zeros(x.shape[1], 3 * size), x.new_zeros(size, 3 * size)
    grad_bias_ih, grad_bias_hh = x.new_zeros(3 * size), x.new_zeros(3 * size)
    grad_hidden = time.with_last(grad_outputs, grad_last[0])
    grad_state = torch.zeros_like(state[0])
    for block in reversed(time.blocks):
        steps, rows = block
        reset, update, candidate = gates[rows].split(size, dim=1)
        before = time.rows_before(outputs, block, state[0])
        block_grads = grad_gates[: len(before)]
        grad_reset, grad_update, grad_share = block_grads.split(size, dim=1)
        slopes = 1 - update  # of the candidate, before its tanh
        _tanh_backward(slopes, candidate, grad_input=slopes)
        _sigmoid_backward(shares[rows], reset, grad_input=grad_reset)
        grad_reset.mul_(slopes)
        _sigmoid_backward(before - candidate, update, grad_input=grad_update)
        torch.mul(slopes, reset, out=grad_share)
        step_before = time.step_before(grad_hidden, block, grad_state)
        gru_backward_steps(time.sizes[steps], step_before, grad_hidden[rows], update, block_grads, weight_hh)
        if wants_weights:
            add_product(grad_hh, before.t(), block_grads.to(weight_hh.dtype))  # faster than its transpose
            grad_bias_hh += block_grads.sum(0)
        # Now of the candidate: the input's share has no reset gate.
        torch.mul(slopes, grad_hidden[rows], out=grad_share)
        low_grads = block_grads.to(weight_ih.dtype)
        if wants_weights:
            add_product(grad_ih, x[rows].t(), low_grads)
            grad_bias_ih += block_grads.sum(0)
        if grad_x is not None:
            write_product(grad_x[rows], low_grads, weight_ih)
    grad_weights = (_transposed(grad_ih, weight_ih), _transposed(grad_hh, weight_hh), grad_bias_ih, grad_bias_hh)
    return Gradients(grad_x, (grad_state,), grad_weights if wants_weights else None)


def _transposed_copy(weight: Tensor) -> Tensor:
    return weight.t().clone(memory_format=torch.contiguous_format)


def _transposed(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.t().contiguous().to(weight.dtype)


KERNELS = {"lstm": Kernel(_lstm_forward, _lstm_backward), "gru": Kernel(_gru_forward, _gru_backward)}
"""The kernels by rnn_key."""
