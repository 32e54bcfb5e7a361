"""Stacked LSTM or GRU layers of any sizes, as a scan over the packed layout in plain torch operations.

On CPU, `torch.nn.LSTM` on a packed sequence has a backward that grows with the square of the length, and it does not
run under `torch.func`. Here every operation of a time step has a gradient of that time step's size, so the scan is
linear in the number of points, and it runs under `torch.autograd`, `torch.func.grad` and `torch.func.vmap`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

__all__ = ["RecurrentLayer", "StackedRNN"]

_State = tuple[Tensor, ...]  # of the sequences that still run; the first tensor is the output
_Cell = Callable[[Tensor, _State], _State]


class RecurrentLayer(torch.nn.Module):
    """One LSTM or GRU layer, with the parameters of `torch.nn.LSTM` or `torch.nn.GRU`: names, order and initial values.

    Args:
        rnn_key: "lstm" or "gru".
        input_size: features of an input row.
        hidden_size: features of an output row.

    Raises:
        ValueError: the key is neither, or a size is below 1.

    Source: the equations in the documentation of `torch.nn.LSTM` (Hochreiter and Schmidhuber, 1997, with forget gates)
        and of `torch.nn.GRU` (Cho et al., 2014, with the reset gate after the matrix product).

    Example:
        >>> layer = RecurrentLayer("gru", 2, 3)
        >>> layer(torch.zeros(5, 2), [3, 1, 1]).shape
        torch.Size([5, 3])
    """

    def __init__(self, rnn_key: str, input_size: int, hidden_size: int) -> None:
        super().__init__()
        if rnn_key not in _SCANS:
            raise ValueError(f"Expected an rnn_key among {', '.join(_SCANS)}. Received: {rnn_key!r}")
        if input_size < 1 or hidden_size < 1:
            raise ValueError(f"Expected layer sizes of at least 1. Received: {input_size} to {hidden_size}")
        self.rnn_key = rnn_key
        num_gates, _ = _SCANS[rnn_key]
        bound = 1 / math.sqrt(hidden_size)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        # Made in torch's order, so that a seed gives torch's values.
        self.weight_ih_l0 = parameter(num_gates * hidden_size, input_size)
        self.weight_hh_l0 = parameter(num_gates * hidden_size, hidden_size)
        self.bias_ih_l0 = parameter(num_gates * hidden_size)
        self.bias_hh_l0 = parameter(num_gates * hidden_size)

    def forward(self, x: Tensor, batch_sizes: Sequence[int]) -> Tensor:
        """Run the layer over all time steps, from a state of zeros.

        Args:
            x: (P, input_size) float, packed.
            batch_sizes: rows of each time step; they do not increase and add up to P, which is at least 1.

        Returns:
            (P, hidden_size), packed.

        Example:
            >>> RecurrentLayer("lstm", 2, 3)(torch.zeros(4, 2), [2, 2]).shape
            torch.Size([4, 3])
        """
        _, scan = _SCANS[self.rnn_key]
        return scan(x, batch_sizes, self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0)


class StackedRNN(torch.nn.Module):
    """Recurrent layers on top of each other; between two of them dropout, then ReLU.

    Args:
        rnn_key: "lstm" or "gru".
        input_size: features of an input row.
        layer_sizes: features of each layer's output.
        dropout: probability of dropping a value between layers when training, 0 <= dropout < 1.

    Raises:
        ValueError: an argument is not one of those above.

    Source: dwi_ml, `stacked_rnn.py` (which layers, in which order, under which parameter names).

    Example:
        >>> rnn = StackedRNN("lstm", 4, (8, 6))
        >>> rnn.output_size, rnn(torch.zeros(5, 4), [3, 1, 1]).shape
        (6, torch.Size([5, 6]))
    """

    def __init__(self, rnn_key: str, input_size: int, layer_sizes: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        if len(layer_sizes) == 0:
            raise ValueError("Expected the size of at least one recurrent layer. Received: none")
        if not 0 <= dropout < 1:
            raise ValueError(f"Expected a dropout of at least 0 and below 1. Received: {dropout}")
        self.input_size = input_size
        self.output_size = layer_sizes[-1]
        self.dropout = dropout
        self._names = [f"rnn_{number}" for number in range(len(layer_sizes))]
        sizes = pairwise([input_size, *layer_sizes])
        for name, (layer_input_size, layer_size) in zip(self._names, sizes, strict=True):
            self.add_module(name, RecurrentLayer(rnn_key, layer_input_size, layer_size))

    def forward(self, x: Tensor, batch_sizes: Sequence[int]) -> Tensor:
        """Run all layers over all time steps, from states of zeros.

        Args:
            x: (P, input_size) float, packed, see `dwiml_func.models.packing`.
            batch_sizes: rows of each time step; they do not increase and add up to P, which is at least 1.

        Returns:
            (P, output_size), packed.

        Raises:
            ValueError: `x` does not have `input_size` columns, or the batch sizes do not fit.

        Example:
            >>> StackedRNN("gru", 4, (8,))(torch.zeros(3, 4), [2, 1]).shape
            torch.Size([3, 8])
        """
        if x.ndim != 2 or x.shape[1] != self.input_size:
            raise ValueError(f"Expected x of shape (P, {self.input_size}). Received: {tuple(x.shape)}")
        if sum(batch_sizes) != len(x) or any(now > before for before, now in pairwise([len(x), *batch_sizes, 1])):
            raise ValueError(
                f"Expected batch sizes of at least 1 that do not increase and add up to {len(x)}, the rows of x. "
                f"Received: {list(batch_sizes)}"
            )
        for number, name in enumerate(self._names):
            if number > 0:
                x = dropout(x, self.dropout, self.training).relu()
            x = self.get_submodule(name)(x, batch_sizes)
        return x


def _scan(cell: _Cell, rows: Tensor, batch_sizes: Sequence[int], state: _State) -> Tensor:
    """Fold a cell over the time steps of packed rows; returns the outputs of all steps, packed."""
    outputs = []
    num_running = batch_sizes[0]
    # One split and one cat: their gradients are one cat and views. Slicing step by step would fill P rows a step.
    for num_rows, step_rows in zip(batch_sizes, rows.split(batch_sizes), strict=True):
        if num_rows < num_running:
            state = tuple(part[:num_rows] for part in state)
            num_running = num_rows
        state = cell(step_rows, state)
        outputs.append(state[0])
    return torch.cat(outputs)


def _scan_lstm(
    x: Tensor, batch_sizes: Sequence[int], weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Tensor:
    projected = linear(x, weight_ih, bias_ih + bias_hh)  # the input's share of the gates, all time steps in one GEMM
    recurrent = weight_hh.t()

    def cell(rows: Tensor, state: _State) -> _State:
        hidden, memory = state
        input_gate, forget_gate, candidate, output_gate = torch.addmm(rows, hidden, recurrent).chunk(4, dim=1)
        memory = torch.addcmul(forget_gate.sigmoid() * memory, input_gate.sigmoid(), candidate.tanh())
        return output_gate.sigmoid() * memory.tanh(), memory

    zeros = projected.new_zeros(batch_sizes[0], weight_hh.shape[1])
    return _scan(cell, projected, batch_sizes, (zeros, zeros))


def _scan_gru(
    x: Tensor, batch_sizes: Sequence[int], weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Tensor:
    projected = linear(x, weight_ih, bias_ih)
    hidden_size = weight_hh.shape[1]

    def cell(rows: Tensor, state: _State) -> _State:
        (hidden,) = state
        # The reset gate scales the hidden state's share of the candidate, so the two shares are not added before.
        gate_rows, candidate_rows = rows.split([2 * hidden_size, hidden_size], dim=1)
        gates, candidate = linear(hidden, weight_hh, bias_hh).split([2 * hidden_size, hidden_size], dim=1)
        reset, update = (gate_rows + gates).sigmoid().chunk(2, dim=1)
        candidate = torch.addcmul(candidate_rows, reset, candidate).tanh()
        return (torch.lerp(candidate, hidden, update),)

    return _scan(cell, projected, batch_sizes, (projected.new_zeros(batch_sizes[0], hidden_size),))


_SCANS = {"lstm": (4, _scan_lstm), "gru": (3, _scan_gru)}  # number of gates, and how to run them
