"""The modules: one LSTM or GRU layer, and a stack of them, over packed rows (see `packing`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import dropout

from dwiml_func._checks import check_choice, check_number
from dwiml_func._transforms import is_transformed
from dwiml_func.models.rnn.autograd import kernel_scan
from dwiml_func.models.rnn.cudnn import cudnn_scan
from dwiml_func.models.rnn.custom_ops import compiled_scan
from dwiml_func.models.rnn.scan import State, Weights, plain_scan
from dwiml_func.models.rnn.single_step import StepMemory, layer_memory

__all__ = ["RecurrentLayer", "StackedRNN"]

Scan = Callable[[str, Tensor, Sequence[int], Weights, State], tuple[Tensor, State]]
"""See `plain_scan`."""

BatchSizes = Sequence[int] | Tensor
"""Rows of each time step, or in a graph of torch.compile the (S,) int64 lengths of the sequences, longest first."""

_NUM_STATES = {"lstm": 2, "gru": 1}  # tensors in the carried state
_NUM_GATES = {"lstm": 4, "gru": 3}
_MOST_LAYERS = 1000


class RecurrentLayer(torch.nn.Module):
    """One LSTM or GRU layer, with the parameters of `torch.nn.LSTM` or `torch.nn.GRU`: names, order, initial values."""

    def __init__(self, rnn_key: str, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.rnn_key = rnn_key
        self.hidden_size = hidden_size
        num_rows = _NUM_GATES[rnn_key] * hidden_size
        bound = 1 / math.sqrt(hidden_size)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        # Made in torch's order, so that a seed gives torch's values.
        self.weight_ih_l0 = parameter(num_rows, input_size)
        self.weight_hh_l0 = parameter(num_rows, hidden_size)
        self.bias_ih_l0 = parameter(num_rows)
        self.bias_hh_l0 = parameter(num_rows)

    @property
    def weights(self) -> Weights:
        """The four parameters, in torch's order."""
        return self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0

    def forward(self, x: Tensor, batch_sizes: BatchSizes) -> Tensor:
        """Run the layer over packed rows x (P, input_size), from a state of zeros, to outputs (P, hidden_size)."""
        return self.run(x, batch_sizes)[0]

    def run(self, x: Tensor, batch_sizes: BatchSizes, state: State | None = None) -> tuple[Tensor, State]:
        """Run the layer from a given state (None: zeros): the outputs, and each sequence's state after its last row.

        Under `torch.autocast` the products with the weight matrices are taken in its dtype; gates, states and outputs
        stay in that of the parameters. On CUDA, cuDNN runs the whole layer in autocast's dtype.
        """
        weights, device = self.weights, x.device
        if not torch.is_autocast_enabled(device.type):
            return self._scan(x, batch_sizes, weights, state)
        # By itself, autocast would also lower gates and states in some of the scans, and would not reach the others.
        dtype = torch.get_autocast_dtype(device.type)
        lowered = (weights[0].to(dtype), weights[1].to(dtype), *weights[2:])
        with torch.autocast(device.type, enabled=False):
            return self._scan(x.to(weights[0].dtype), batch_sizes, lowered, state)

    def _scan(self, x: Tensor, batch_sizes: BatchSizes, weights: Weights, state: State | None) -> tuple[Tensor, State]:
        if state is None:
            zeros = x.new_zeros(_num_sequences(batch_sizes), self.hidden_size)
            state = (zeros,) * _NUM_STATES[self.rnn_key]
        if isinstance(batch_sizes, Tensor):
            return compiled_scan(self.rnn_key, x, batch_sizes, weights, state)
        return _scan_for(x.device)(self.rnn_key, x, batch_sizes, weights, state)


def _scan_for(device: torch.device) -> Scan:
    """The fastest scan that works on this device under the active transforms."""
    if torch.compiler.is_compiling():
        return plain_scan
    if device.type == "cuda" and torch.backends.cudnn.enabled and not is_transformed():
        return cudnn_scan
    return kernel_scan


class StackedRNN(torch.nn.Module):
    """Recurrent layers on top of each other, each followed by its normalization and, except the last, dropout, ReLU.

    With `use_skip_connection`, every layer after the first also receives the input, after the output of the layer
    below, and the output of the stack is the outputs of all layers, as the next layer receives them, then the input.

    Source: dwi_ml, `stacked_rnn.py` (which layers, in which order, under which parameter names). Skip connections are
        those of Graves, arXiv:1308.0850; layer normalization is that of Ba et al., arXiv:1607.06450.
    """

    def __init__(
        self,
        rnn_key: str,
        input_size: int,
        layer_sizes: Sequence[int],
        dropout: float = 0.0,
        *,
        use_skip_connection: bool = False,
        use_layer_normalization: bool = False,
    ) -> None:
        super().__init__()
        check_choice("rnn_key", rnn_key, _NUM_GATES)
        if not 0 < len(layer_sizes) <= _MOST_LAYERS:
            raise ValueError(f"rnn_layer_sizes: expected 1 to {_MOST_LAYERS} layers, received {len(layer_sizes)}.")
        for layer_size in layer_sizes:
            check_number("rnn_layer_sizes", layer_size, at_least=1)
        if input_size < 1:
            raise ValueError(f"input_size: expected at least 1, received {input_size}.")
        check_number("dropout", dropout, at_least=0, below=1)
        self.input_size = input_size
        self.output_size = sum(layer_sizes) + input_size if use_skip_connection else layer_sizes[-1]
        self.dropout = dropout
        self.use_skip_connection = use_skip_connection
        self.use_layer_normalization = use_layer_normalization
        self.num_layers = len(layer_sizes)
        num_skipped = input_size if use_skip_connection else 0
        sizes = pairwise([input_size - num_skipped, *layer_sizes])
        for number, (size_below, layer_size) in enumerate(sizes):
            self.add_module(f"rnn_{number}", RecurrentLayer(rnn_key, size_below + num_skipped, layer_size))
            if use_layer_normalization:
                self.add_module(f"layer_norm_{number}", torch.nn.LayerNorm(layer_size))

    def forward(self, x: Tensor, batch_sizes: BatchSizes) -> Tensor:
        """Run all layers over packed rows x (P, input_size), from states of zeros, to outputs (P, output_size).

        `batch_sizes` has the rows of each time step; they do not increase and add up to P, which is at least 1.
        """
        return self.run(x, batch_sizes)[0]

    def run(
        self, x: Tensor, batch_sizes: BatchSizes, state: Sequence[State] | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Run all layers from given states (None: zeros): the outputs, and for each layer each sequence's last state.

        `state` has (h,) for GRU or (h, c) for LSTM for each layer, each (S, that layer's size), S = batch_sizes[0].
        Running a sequence in pieces, each from the state returned for the piece before, gives the same outputs as
        running it whole. When sequences end between two pieces, keep the rows of the state that continue.
        """
        layers = self._layers
        self._check_rows(x, batch_sizes, layers[0].weight_ih_l0.dtype)
        if state is not None:
            _check_state(layers, _num_sequences(batch_sizes), state)
        last_states = []

        def run_layer(number: int, x: Tensor) -> Tensor:
            x, last_state = layers[number].run(x, batch_sizes, None if state is None else state[number])
            last_states.append(last_state)
            return x

        return self._through(x, run_layer), tuple(last_states)

    def run_step(self, x: Tensor, memory: StepMemory) -> tuple[Tensor, StepMemory]:
        """Read one row a sequence, x (S, input_size), in place: what `run` gives, without gradients, to rounding."""
        memory = memory.begin()
        return self._through(x, lambda number, x: memory.layers[number].run(x)), memory

    def step_memory(self, num_sequences: int, state: Sequence[State] | None = None) -> StepMemory:
        """The memory for `run_step`, of states as in `run` or of new sequences."""
        states: Sequence[State | None] = [None] * self.num_layers if state is None else state
        layers = zip(self._layers, states, strict=True)
        return StepMemory(
            tuple(layer_memory(layer.rnn_key, layer.weights, num_sequences, given) for layer, given in layers)
        )

    def _through(self, x: Tensor, run_layer: Callable[[int, Tensor], Tensor]) -> Tensor:
        inputs, outputs = x, []
        for number in range(self.num_layers):
            x = run_layer(number, x)
            if self.use_layer_normalization:
                x = self.get_submodule(f"layer_norm_{number}")(x)
            if number + 1 < self.num_layers:
                x = dropout(x, self.dropout, self.training).relu()
            outputs.append(x)
            if self.use_skip_connection:
                x = torch.cat([x, inputs], dim=1)
        return torch.cat([*outputs, inputs], dim=1) if self.use_skip_connection else x

    @property
    def _layers(self) -> list[RecurrentLayer]:
        return [cast(RecurrentLayer, self.get_submodule(f"rnn_{number}")) for number in range(self.num_layers)]

    def _check_rows(self, x: Tensor, batch_sizes: BatchSizes, dtype: torch.dtype) -> None:
        if x.ndim != 2 or x.shape[1] != self.input_size:
            raise ValueError(f"Expected x of shape (P, {self.input_size}). Received: {tuple(x.shape)}.")
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"Expected x of {dtype}, as the parameters. Received: {x.dtype}. Convert one of them.")
        if isinstance(batch_sizes, Tensor):
            return  # no number can be read from a tensor while a graph is traced
        if sum(batch_sizes) != len(x) or any(now > before for before, now in pairwise([len(x), *batch_sizes, 1])):
            raise ValueError(
                f"Expected batch sizes of at least 1 that do not increase and add up to {len(x)}, the rows of x. "
                f"Received: {list(batch_sizes)}."
            )


def _num_sequences(batch_sizes: BatchSizes) -> int:
    return len(batch_sizes) if isinstance(batch_sizes, Tensor) else batch_sizes[0]


def _check_state(layers: Sequence[RecurrentLayer], num_sequences: int, state: Sequence[State]) -> None:
    expected = [[(num_sequences, layer.hidden_size)] * _NUM_STATES[layer.rnn_key] for layer in layers]
    received = [[tuple(part.shape) for part in layer_state] for layer_state in state]
    if received != expected:
        raise ValueError(f"Expected a state of shapes {expected}, a list for each layer. Received: {received}.")
    dtype = layers[0].weight_ih_l0.dtype
    if wrong := {part.dtype for layer_state in state for part in layer_state} - {dtype}:
        raise ValueError(f"Expected a state of {dtype}, as the parameters. Received: {wrong.pop()}.")
