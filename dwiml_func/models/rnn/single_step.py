"""One time step of a stack of recurrent layers at a time, for tracking: weights prepared once, memory written in place.

A layer's input, its hidden state and a one lie side by side in a row, and the weights one block below the
other, so a step of a layer is one matrix product; the short operations after it are those of `kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dwiml_func.models.rnn.scan import State, Weights
from dwiml_func.models.rnn.step_loops import tanh_of_sigmoid

__all__ = ["LayerMemory", "StepMemory", "layer_memory"]

_MINUS_ONE = torch.tensor(-1.0)  # on the CPU, as all of this module


@dataclass(frozen=True, slots=True, eq=False)
class LayerMemory:
    """One layer of R sequences.

    rows (R, F + H + 1): the input of the newest step, the hidden state, ones. cell (R, H): of LSTM, else scratch.
    weights (F + H + 1, 4 H), gates (R, 4 H): columns of LSTM as in `Weights`; of GRU reset, update, and the shares of
    the input and of the hidden state in the candidate.
    """

    rnn_key: str
    rows: Tensor
    cell: Tensor
    weights: Tensor
    gates: Tensor

    @property
    def hidden(self) -> Tensor:
        """(R, H)."""
        return self.rows[:, -1 - self.cell.shape[1] : -1]

    @property
    def state(self) -> State:
        """The state in other memory."""
        hidden = self.hidden.clone(memory_format=torch.contiguous_format)
        return (hidden, self.cell.clone()) if self.rnn_key == "lstm" else (hidden,)

    def forget(self, numbers: Tensor) -> None:
        """Write zeros into the state of some rows (L,) int64."""
        self.hidden.index_fill_(0, numbers, 0)
        self.cell.index_fill_(0, numbers, 0)

    def run(self, x: Tensor) -> Tensor:
        """Read x (R, F), and return the hidden state (R, H), which the next step overwrites."""
        size, hidden, cell = self.cell.shape[1], self.hidden, self.cell
        self.rows[:, : x.shape[1]] = x
        gates = torch.mm(self.rows, self.weights, out=self.gates)
        if self.rnn_key == "gru":
            reset, update, candidate, share = gates.split(size, dim=1)
            gates[:, : 2 * size].sigmoid_()
            tanh_of_sigmoid(candidate.addcmul_(reset, share).sigmoid_(), _MINUS_ONE)
            return torch.lerp(candidate, hidden, update, out=hidden)
        in_gate, forget_gate, candidate, out_gate = gates.sigmoid_().split(size, dim=1)
        tanh_of_sigmoid(candidate, _MINUS_ONE)
        cell.mul_(forget_gate).addcmul_(in_gate, candidate)
        tanh = tanh_of_sigmoid(torch.add(cell, cell, out=candidate).sigmoid_(), _MINUS_ONE)
        return torch.mul(tanh, out_gate, out=hidden)


@dataclass(frozen=True, slots=True, eq=False)
class StepMemory:
    """What a stack remembers of R sequences. `is_new` (R,) bool: where the next step begins new ones."""

    layers: tuple[LayerMemory, ...]
    is_new: Tensor | None = None

    @property
    def state(self) -> tuple[State, ...]:
        """The state in other memory, as `StackedRNN.run` takes it."""
        states = tuple(layer.state for layer in self.layers)
        if self.is_new is None:
            return states
        return tuple(tuple(part.masked_fill(self.is_new[:, None], 0) for part in state) for state in states)

    def forget(self, rows: Tensor) -> StepMemory:
        """The memory in which new sequences begin in rows (R,) bool."""
        return replace(self, is_new=rows if self.is_new is None else rows | self.is_new)

    def begin(self) -> StepMemory:
        """Forget what is to be forgotten, in place."""
        if self.is_new is None:
            return self
        numbers = self.is_new.nonzero()[:, 0]
        for layer in self.layers:
            layer.forget(numbers)
        return replace(self, is_new=None)


def layer_memory(rnn_key: str, weights: Weights, num_rows: int, state: State | None) -> LayerMemory:
    """The memory of a layer, from a state or from zeros; under `torch.no_grad`.

    The candidate's columns hold twice the weights: its tanh comes from a sigmoid, as in `kernels`.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    (num_columns, size), num_features = weight_hh.shape, weight_ih.shape[1]
    if rnn_key == "lstm":
        below = torch.cat([weight_ih, weight_hh, (bias_ih + bias_hh)[:, None]], dim=1).t().contiguous()
        below[:, 2 * size : 3 * size] *= 2
    else:
        below = weight_ih.new_zeros(num_features + size + 1, num_columns + size)
        gates = 2 * size
        below[:num_features, : gates + size] = weight_ih.t()
        below[num_features:-1, :gates] = weight_hh[:gates].t()
        below[num_features:-1, gates + size :] = weight_hh[gates:].t()
        below[-1, :gates] = bias_ih[:gates] + bias_hh[:gates]
        below[-1, gates : gates + size], below[-1, gates + size :] = bias_ih[gates:], bias_hh[gates:]
        below[:, gates:] *= 2
    rows = weight_ih.new_zeros(num_rows, num_features + size + 1)
    rows[:, -1] = 1
    memory = LayerMemory(rnn_key, rows, rows.new_zeros(num_rows, size), below, rows.new_empty(num_rows, below.shape[1]))
    for part, given in zip((memory.hidden, memory.cell), state or (), strict=False):
        part.copy_(given)
    return memory
