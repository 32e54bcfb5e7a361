"""LSTM and GRU over the packed layout, values and gradients by hand, into buffers that are written in place.

What does not depend on the recurrence is one operation over all rows: the input's share of the gates; in the backward
the slopes of the gates and the gradients of the weights and of the input. A time step keeps one matrix product and a
few short operations in place. These functions know nothing of autograd: `rnn_packed` gives them to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dwiml_func.models.rnn_scan import State, Weights

__all__ = ["KERNELS", "Gradients", "Kernel"]

# out = grad * y * (1 - y) and out = grad * (1 - y * y): one pass each, where a formula would take three.
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class Gradients(NamedTuple):
    """Gradients of a layer's inputs, each with its input's shape; None where it was not asked for.

    Example:
        >>> Gradients(None, (torch.zeros(2, 3),), None).state[0].shape
        torch.Size([2, 3])
    """

    x: Tensor | None
    state: State
    weights: Weights | None


class Kernel(NamedTuple):
    """How one kind of layer runs forwards and backwards. Neither function changes what it is given.

    Args:
        forward: (x, batch_sizes, weights, state), those of `plain_scan`, to the outputs (P, H), the last state, and the
            activations: two tensors of P rows which the backward needs.
        backward: (x, batch_sizes, weights, state, outputs, activations, gradient of the outputs (P, H), gradients of
            the last state, whether x's gradient is wanted, whether the weights' are) to the gradients.

    Example:
        >>> weights = (torch.zeros(8, 3), torch.zeros(8, 2), torch.zeros(8), torch.zeros(8))
        >>> zeros = torch.zeros(2, 2)
        >>> outputs, last, activations = KERNELS["lstm"].forward(torch.ones(3, 3), [2, 1], weights, (zeros, zeros))
        >>> [tuple(activation.shape) for activation in activations]
        [(3, 8), (3, 2)]
    """

    forward: Callable[[Tensor, Sequence[int], Weights, State], tuple[Tensor, State, tuple[Tensor, Tensor]]]
    backward: Callable[
        [Tensor, Sequence[int], Weights, State, Tensor, tuple[Tensor, ...], Tensor, State, bool, bool], Gradients
    ]


def _lstm_forward(
    x: Tensor, batch_sizes: Sequence[int], weights: Weights, state: State
) -> tuple[Tensor, State, tuple[Tensor, Tensor]]:
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    size = weight_hh.shape[1]
    gates = torch.addmm(bias_ih + bias_hh, x, weight_ih.t())
    cells, outputs = gates.new_empty(len(x), size), gates.new_empty(len(x), size)
    recurrent = weight_hh.t().contiguous()  # a product of few rows is faster so
    hidden, cell = state
    for rows, in_forget, in_gate, forget_gate, candidate, out_gate, new_cell, new_hidden in zip(
        gates.split(batch_sizes),
        gates[:, : 2 * size].split(batch_sizes),
        *(column.split(batch_sizes) for column in gates.split(size, dim=1)),
        cells.split(batch_sizes),
        outputs.split(batch_sizes),
        strict=True,
    ):
        num_rows = len(rows)
        if num_rows < len(hidden):
            hidden, cell = hidden[:num_rows], cell[:num_rows]
        rows.addmm_(hidden, recurrent)
        in_forget.sigmoid_()
        candidate.tanh_()
        out_gate.sigmoid_()
        torch.mul(forget_gate, cell, out=new_cell).addcmul_(in_gate, candidate)
        torch.tanh(new_cell, out=new_hidden).mul_(out_gate)
        hidden, cell = new_hidden, new_cell
    return outputs, (_last_rows(outputs, batch_sizes), _last_rows(cells, batch_sizes)), (gates, cells)


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
    weight_ih, weight_hh, _, _ = weights
    size = weight_hh.shape[1]
    gates, cells = activations
    in_gate, forget_gate, candidate, out_gate = gates.split(size, dim=1)
    # First the gates' slopes by the cell (input, forget, candidate) or by the hidden state (output), then in the loop
    # multiplied in place by the gradient of that.
    grad_gates = torch.empty_like(gates)
    grad_in, grad_forget, grad_candidate, grad_out = grad_gates.split(size, dim=1)
    slopes = cells.tanh()  # of the cell by the hidden state, below
    _sigmoid_backward(candidate, in_gate, grad_input=grad_in)
    _sigmoid_backward(_rows_before(cells, batch_sizes, state[1]), forget_gate, grad_input=grad_forget)
    _tanh_backward(in_gate, candidate, grad_input=grad_candidate)
    _sigmoid_backward(slopes, out_gate, grad_input=grad_out)
    _tanh_backward(out_gate, slopes, grad_input=slopes)

    grad_hidden = _with_last(grad_outputs, batch_sizes, grad_last[0])
    grad_cell = grad_last[1].clone(memory_format=torch.contiguous_format)
    running, running_of_three = grad_cell[:0], grad_cell[:0]
    after = None  # the gates' gradients of the step after
    for step_hidden, slope, by_cell, by_hidden, forget, step_gates in _backwards(
        grad_hidden.split(batch_sizes),
        slopes.split(batch_sizes),
        grad_gates.unflatten(1, (4, size))[:, :3].split(batch_sizes),
        grad_out.split(batch_sizes),
        forget_gate.split(batch_sizes),
        grad_gates.split(batch_sizes),
    ):
        if after is not None:
            (step_hidden if len(after) == len(step_hidden) else step_hidden[: len(after)]).addmm_(after, weight_hh)
        if len(running) < len(step_hidden):
            running = grad_cell[: len(step_hidden)]
            running_of_three = running.unsqueeze(1)
        running.addcmul_(step_hidden, slope)
        by_hidden.mul_(step_hidden)
        by_cell.mul_(running_of_three)
        running.mul_(forget)
        after = step_gates
    grad_state = (torch.mm(grad_gates[: batch_sizes[0]], weight_hh), grad_cell)

    grad_weights = None
    if wants_weights:
        grad_bias = grad_gates.sum(0)
        hidden = _rows_before(outputs, batch_sizes, state[0])
        grad_weights = (grad_gates.t() @ x, grad_gates.t() @ hidden, grad_bias, grad_bias.clone())
    return Gradients(grad_gates @ weight_ih if wants_x else None, grad_state, grad_weights)


def _gru_forward(
    x: Tensor, batch_sizes: Sequence[int], weights: Weights, state: State
) -> tuple[Tensor, State, tuple[Tensor, Tensor]]:
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    size = weight_hh.shape[1]
    bias = bias_ih.clone()
    bias[: 2 * size] += bias_hh[: 2 * size]
    gates = torch.addmm(bias, x, weight_ih.t())
    shares = bias_hh[2 * size :].repeat(len(x), 1)  # the hidden state's shares of the candidates
    outputs = gates.new_empty(len(x), size)
    for_gates, for_candidate = (part.t().contiguous() for part in weight_hh.split([2 * size, size]))
    (hidden,) = state
    for reset_update, reset, update, candidate, share, new_hidden in zip(
        gates[:, : 2 * size].split(batch_sizes),
        *(column.split(batch_sizes) for column in gates.split(size, dim=1)),
        shares.split(batch_sizes),
        outputs.split(batch_sizes),
        strict=True,
    ):
        num_rows = len(reset)
        if num_rows < len(hidden):
            hidden = hidden[:num_rows]
        reset_update.addmm_(hidden, for_gates).sigmoid_()
        share.addmm_(hidden, for_candidate)
        candidate.addcmul_(reset, share).tanh_()
        torch.lerp(candidate, hidden, update, out=new_hidden)
        hidden = new_hidden
    return outputs, (_last_rows(outputs, batch_sizes),), (gates, shares)


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
    weight_ih, weight_hh, _, _ = weights
    size = weight_hh.shape[1]
    gates, shares = activations
    reset, update, candidate = gates.split(size, dim=1)
    before = _rows_before(outputs, batch_sizes, state[0])
    # First the slopes of the reset gate, the update gate and the share by the hidden state, then in the loop multiplied
    # in place by its gradient.
    grad_gates = torch.empty_like(gates)
    grad_reset, grad_update, grad_share = grad_gates.split(size, dim=1)
    slopes = 1 - update  # of the candidate, before its tanh
    _tanh_backward(slopes, candidate, grad_input=slopes)
    _sigmoid_backward(shares, reset, grad_input=grad_reset)
    grad_reset.mul_(slopes)
    _sigmoid_backward(before - candidate, update, grad_input=grad_update)
    torch.mul(slopes, reset, out=grad_share)

    grad_hidden = _with_last(grad_outputs, batch_sizes, grad_last[0])
    grad_state = torch.zeros_like(state[0])
    steps = grad_hidden.split(batch_sizes)
    for step_hidden, step_before, by_hidden, keep, step_gates in _backwards(
        steps,
        (grad_state, *steps[:-1]),
        grad_gates.unflatten(1, (3, size)).split(batch_sizes),
        update.split(batch_sizes),
        grad_gates.split(batch_sizes),
    ):
        num_rows = len(step_hidden)
        by_hidden.mul_(step_hidden.unsqueeze(1))
        if num_rows < len(step_before):
            step_before = step_before[:num_rows]
        step_before.addcmul_(step_hidden, keep).addmm_(step_gates, weight_hh)

    grad_weights_hh = grad_bias_hh = None
    if wants_weights:
        grad_weights_hh, grad_bias_hh = grad_gates.t() @ before, grad_gates.sum(0)
    torch.mul(slopes, grad_hidden, out=grad_share)  # from here on of the candidate: the input's share has no reset gate
    grad_weights = None
    if grad_weights_hh is not None and grad_bias_hh is not None:
        grad_weights = (grad_gates.t() @ x, grad_weights_hh, grad_gates.sum(0), grad_bias_hh)
    return Gradients(grad_gates @ weight_ih if wants_x else None, (grad_state,), grad_weights)


def _backwards(*steps: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(reversed(step) for step in steps), strict=True)


def _rows_before(rows: Tensor, batch_sizes: Sequence[int], first: Tensor) -> Tensor:
    """For each packed row the row of its sequence one step before; `first` before the first step."""
    steps = rows.split(batch_sizes)
    return torch.cat([first, *(step[:num_rows] for step, num_rows in zip(steps, batch_sizes[1:], strict=False))])


def _last_rows(rows: Tensor, batch_sizes: Sequence[int]) -> Tensor:
    """(S, H): each sequence's last row."""
    return rows.index_select(0, _last_indices(batch_sizes, rows.device))


def _with_last(grad_outputs: Tensor, batch_sizes: Sequence[int], grad_last: Tensor) -> Tensor:
    """A copy of the outputs' gradients to which those of the last hidden state are added."""
    grad_hidden = grad_outputs.clone(memory_format=torch.contiguous_format)
    return grad_hidden.index_add_(0, _last_indices(batch_sizes, grad_last.device), grad_last)


def _last_indices(batch_sizes: Sequence[int], device: torch.device) -> Tensor:
    sizes = torch.tensor(batch_sizes)
    lengths = (sizes[:, None] > torch.arange(batch_sizes[0])).sum(0)
    return (sizes.cumsum(0) - sizes)[lengths - 1].add_(torch.arange(batch_sizes[0])).to(device)


KERNELS = {"lstm": Kernel(_lstm_forward, _lstm_backward), "gru": Kernel(_gru_forward, _gru_backward)}
"""The kernels by rnn_key."""
