"""The time steps of a block of packed rows, one after the other, in place: the recurrence of LSTM and GRU.

What does not depend on the recurrence is done for the whole block, in `kernels`. The loops run without Python between
their operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwiml_func.models.rnn.scan import add_product
from dwiml_func.models.rnn.torchscript import without_python

__all__ = ["gru_backward_steps", "gru_forward_steps", "lstm_backward_steps", "lstm_forward_steps", "tanh_of_sigmoid"]


@without_python
def lstm_forward_steps(
    sizes: list[int],
    gates: Tensor,
    cells: Tensor,
    tanhs: Tensor,
    outputs: Tensor,
    hidden: Tensor,
    cell: Tensor,
    for_hidden: Tensor,
    minus_one: Tensor,
) -> tuple[Tensor, Tensor]:
    """The time steps of a block forward, from the input's share in `gates`; returns the last hidden state and cell."""
    size = hidden.shape[1]
    steps, new_cells = gates.split(sizes), cells.split(sizes)
    step_tanhs, new_hidden = tanhs.split(sizes), outputs.split(sizes)
    in_gate, forget_gate = gates[:, :size].split(sizes), gates[:, size : 2 * size].split(sizes)
    candidate, out_gate = gates[:, 2 * size : 3 * size].split(sizes), gates[:, 3 * size :].split(sizes)
    for i, num_rows in enumerate(sizes):
        if num_rows < hidden.shape[0]:
            hidden, cell = hidden[:num_rows], cell[:num_rows]
        add_product(steps[i], hidden, for_hidden).sigmoid_()
        tanh_of_sigmoid(candidate[i], minus_one)
        torch.mul(forget_gate[i], cell, out=new_cells[i]).addcmul_(in_gate[i], candidate[i])
        tanh = torch.add(new_cells[i], new_cells[i], out=step_tanhs[i]).sigmoid_()
        tanh_of_sigmoid(tanh, minus_one)
        torch.mul(tanh, out_gate[i], out=new_hidden[i])
        hidden, cell = new_hidden[i], new_cells[i]
    return hidden, cell


@without_python
def lstm_backward_steps(
    sizes: list[int],
    before: Tensor,
    grad_hidden: Tensor,
    forget_gate: Tensor,
    slopes: Tensor,
    grad_gates: Tensor,
    grad_cell: Tensor,
    weight_hh: Tensor,
) -> None:
    """The time steps of a block backward, in place; `before` is the hidden state's gradient before the block."""
    size = grad_cell.shape[1]
    hidden_steps, step_grads = grad_hidden.split(sizes), grad_gates.split(sizes)
    forget, slope = forget_gate.split(sizes), slopes.split(sizes)
    by_cell = grad_gates.unflatten(1, (4, size))[:, :3].split(sizes)
    by_hidden = grad_gates[:, 3 * size :].split(sizes)
    running = grad_cell[:0]
    running_of_three = running
    for i in range(len(sizes) - 1, -1, -1):
        num_rows, step_hidden = sizes[i], hidden_steps[i]
        if running.shape[0] < num_rows:
            running = grad_cell[:num_rows]
            running_of_three = running.unsqueeze(1)
        running.addcmul_(step_hidden, slope[i])
        by_hidden[i].mul_(step_hidden)
        by_cell[i].mul_(running_of_three)
        running.mul_(forget[i])
        add_product((hidden_steps[i - 1] if i > 0 else before)[:num_rows], step_grads[i], weight_hh)


@without_python
def gru_forward_steps(
    sizes: list[int],
    gates: Tensor,
    shares: Tensor,
    outputs: Tensor,
    hidden: Tensor,
    for_gates: Tensor,
    for_candidate: Tensor,
    minus_one: Tensor,
) -> Tensor:
    """As `lstm_forward_steps`, with the hidden state's bias in `shares`."""
    size = hidden.shape[1]
    reset_update, candidates = gates[:, : 2 * size].split(sizes), gates[:, 2 * size :].split(sizes)
    reset, update = gates[:, :size].split(sizes), gates[:, size : 2 * size].split(sizes)
    step_shares, new_hidden = shares.split(sizes), outputs.split(sizes)
    for i, num_rows in enumerate(sizes):
        if num_rows < hidden.shape[0]:
            hidden = hidden[:num_rows]
        share, candidate = step_shares[i], candidates[i]
        add_product(reset_update[i], hidden, for_gates).sigmoid_()
        add_product(share, hidden, for_candidate)
        candidate.addcmul_(reset[i], share)
        tanh_of_sigmoid(candidate.add_(candidate).sigmoid_(), minus_one)
        torch.lerp(candidate, hidden, update[i], out=new_hidden[i])
        hidden = new_hidden[i]
    return hidden


@without_python
def gru_backward_steps(
    sizes: list[int], before: Tensor, grad_hidden: Tensor, update: Tensor, grad_gates: Tensor, weight_hh: Tensor
) -> None:
    """As `lstm_backward_steps`."""
    hidden_steps, keep, step_grads = grad_hidden.split(sizes), update.split(sizes), grad_gates.split(sizes)
    by_hidden = grad_gates.unflatten(1, (3, grad_hidden.shape[1])).split(sizes)
    for i in range(len(sizes) - 1, -1, -1):
        step_hidden = hidden_steps[i]
        by_hidden[i].mul_(step_hidden.unsqueeze(1))
        step_before = (hidden_steps[i - 1] if i > 0 else before)[: sizes[i]]
        add_product(step_before.addcmul_(step_hidden, keep[i]), step_grads[i], weight_hh)


def tanh_of_sigmoid(doubled: Tensor, minus_one: Tensor) -> Tensor:
    """In place, from the sigmoid of 2 z to the tanh of z, which is 2 sigmoid(2 z) - 1: a product with 2 rounds nothing.

    On CPU this takes a third of the time of torch's tanh. Its error is that of a number near 1, not of the value: 2e-7
    in float32, as much as the rounding of the sums that it is added to.
    """
    return torch.add(minus_one, doubled, alpha=2, out=doubled)
