"""LSTM and GRU as a scan over the packed layout in plain torch operations, which every torch transform can handle.

On CPU, `torch.nn.LSTM` on a packed sequence has a backward that grows with the square of the length, and it does not
run under `torch.func`. Here every operation of a time step has a gradient of that time step's size, so the scan is
linear in the number of points, and it runs under `torch.autograd` at any order, `torch.func.vmap`, `torch.func.jvp`
and `torch.compile`. The scan of `autograd` is faster where only first gradients are needed.

Matrix products are taken in the dtype of their second factor: under autocast a layer's weight matrices are bfloat16.
Gates, states and sums of gradients stay in float32, where a forget gate near 1 and a small step of the cell are not
rounded away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["State", "Weights", "add_product", "plain_scan", "write_product"]

State = tuple[Tensor, ...]
"""What a layer carries from row to row: (h,) for GRU, (h, c) for LSTM, each (S, H), one row per sequence."""

Weights = tuple[Tensor, Tensor, Tensor, Tensor]
"""weight_ih (G H, F), weight_hh (G H, H), bias_ih (G H,), bias_hh (G H,); G is 4 for LSTM, 3 for GRU. Gates are in
torch's order (LSTM: input, forget, candidate, output; GRU: reset, update, candidate)."""

_Cell = Callable[[Tensor, State], State]


def plain_scan(
    rnn_key: str, x: Tensor, batch_sizes: Sequence[int], weights: Weights, state: State
) -> tuple[Tensor, State]:
    """Run one layer over packed rows x (P, F): the outputs (P, H), and each sequence's state after its last row.

    `batch_sizes` has the number of rows of each time step, S in the first; `state` is that before the first rows.

    Source: the equations in the documentation of `torch.nn.LSTM` (Hochreiter and Schmidhuber, 1997, with forget gates)
        and of `torch.nn.GRU` (Cho et al., 2014, with the reset gate after the matrix product).
    """
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    if rnn_key == "lstm":
        # The input's share of the gates, all time steps in one matrix product.
        rows, cell = _linear(x, weight_ih, bias_ih + bias_hh), _lstm_cell(weight_hh)
    else:
        rows, cell = _linear(x, weight_ih, bias_ih), _gru_cell(weight_hh, bias_hh)
    return _scan(cell, rows, batch_sizes, state)


def _scan(cell: _Cell, rows: Tensor, batch_sizes: Sequence[int], state: State) -> tuple[Tensor, State]:
    outputs = []
    ended = []  # states of sequences that have no more rows; those that end last come first in the layout
    num_running = batch_sizes[0]
    # One split and one cat: their gradients are one cat and views. Slicing step by step would fill P rows a step.
    for num_rows, step_rows in zip(batch_sizes, rows.split(list(batch_sizes)), strict=True):
        if num_rows < num_running:
            ended.append([part[num_rows:] for part in state])
            state = tuple(part[:num_rows] for part in state)
            num_running = num_rows
        state = cell(step_rows, state)
        outputs.append(state[0])
    last = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True)) if ended else state
    return torch.cat(outputs), last


def _lstm_cell(weight_hh: Tensor) -> _Cell:
    recurrent = weight_hh.t()

    def cell(rows: Tensor, state: State) -> State:
        hidden, memory = state
        same = hidden.dtype == recurrent.dtype
        gates = torch.addmm(rows, hidden, recurrent) if same else rows + _product(hidden, recurrent)
        input_gate, forget_gate, candidate, output_gate = gates.chunk(4, dim=1)
        memory = torch.addcmul(forget_gate.sigmoid() * memory, input_gate.sigmoid(), candidate.tanh())
        return output_gate.sigmoid() * memory.tanh(), memory

    return cell


def _gru_cell(weight_hh: Tensor, bias_hh: Tensor) -> _Cell:
    hidden_size = weight_hh.shape[1]

    def cell(rows: Tensor, state: State) -> State:
        (hidden,) = state
        # The reset gate scales the hidden state's share of the candidate, so the two shares are not added before.
        gate_rows, candidate_rows = rows.split([2 * hidden_size, hidden_size], dim=1)
        gates, candidate = _linear(hidden, weight_hh, bias_hh).split([2 * hidden_size, hidden_size], dim=1)
        reset, update = (gate_rows + gates).sigmoid().chunk(2, dim=1)
        candidate = torch.addcmul(candidate_rows, reset, candidate).tanh()
        return (torch.lerp(candidate, hidden, update),)

    return cell


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(x, weight, bias) if x.dtype == weight.dtype else _product(x, weight.t()) + bias


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a.to(b.dtype) @ b


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add the product of a (N, F) and b (F, G) to `total` (N, G) in place."""
    return total.addmm_(a, b) if a.dtype == b.dtype == total.dtype else total.add_(_product(a, b))


def write_product(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Write the product of a (N, F) and b (F, G), plus a bias (G,) in the dtype of `out`, into `out` (N, G)."""
    if a.dtype == b.dtype == out.dtype:
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    return out.copy_(_product(a, b)) if bias is None else torch.add(bias, _product(a, b), out=out)
