"""Stacked LSTM or GRU layers of any sizes, over the packed layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import dropout

from dwiml_func._transforms import is_transformed
from dwiml_func.models.rnn.autograd import packed_scan
from dwiml_func.models.rnn.cudnn import native_scan
from dwiml_func.models.rnn.custom_ops import compiled_scan
from dwiml_func.models.rnn.scan import State, Weights, plain_scan

__all__ = ["RecurrentLayer", "StackedRNN"]

Scan = Callable[[str, Tensor, Sequence[int], Weights, State], tuple[Tensor, State]]
"""(rnn_key, x, batch_sizes, weights, state) to the outputs and the last state, see `plain_scan`."""

BatchSizes = Sequence[int] | Tensor
"""Rows of each time step; or, in a graph of torch.compile, (S,) int64: the sequences' lengths, longest first."""

_NUM_STATES = {"lstm": 2, "gru": 1}  # tensors in the carried state
_NUM_GATES = {"lstm": 4, "gru": 3}


class RecurrentLayer(torch.nn.Module):
    """One LSTM or GRU layer, with the parameters of `torch.nn.LSTM` or `torch.nn.GRU`: names, order and initial values.

    Args:
        rnn_key: "lstm" or "gru".
        input_size: features of an input row.
        hidden_size: features of an output row.

    Raises:
        ValueError: the key is neither, or a size is below 1.

    Example:
        >>> layer = RecurrentLayer("gru", 2, 3)
        >>> layer(torch.zeros(5, 2), [3, 1, 1]).shape
        torch.Size([5, 3])
    """

    def __init__(self, rnn_key: str, input_size: int, hidden_size: int) -> None:
        super().__init__()
        if rnn_key not in _NUM_GATES:
            raise ValueError(f"Expected an rnn_key among {', '.join(_NUM_GATES)}. Received: {rnn_key!r}")
        if input_size < 1 or hidden_size < 1:
            raise ValueError(f"Expected layer sizes of at least 1. Received: {input_size} to {hidden_size}")
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
        """The four parameters, in torch's order.

        Example:
            >>> [tuple(weight.shape) for weight in RecurrentLayer("gru", 2, 3).weights]
            [(9, 2), (9, 3), (9,), (9,)]
        """
        return self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0

    def forward(self, x: Tensor, batch_sizes: BatchSizes) -> Tensor:
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
        return self.run(x, batch_sizes)[0]

    def run(self, x: Tensor, batch_sizes: BatchSizes, state: State | None = None) -> tuple[Tensor, State]:
        """Run the layer over all time steps, from a given state, and return the last one too.

        Under `torch.autocast` the products with the weight matrices are taken in its dtype; gates, states and outputs
        stay in that of the parameters. On CUDA, cuDNN's own layers run in it, whose states are kept in it too.

        Args:
            x: (P, input_size) float, packed.
            batch_sizes: rows of each time step; they do not increase and add up to P, which is at least 1.
            state: of the S = batch_sizes[0] sequences before their first row: (h,) for GRU, (h, c) for LSTM, each
                (S, hidden_size). None stands for zeros.

        Returns:
            The outputs (P, hidden_size), packed, and the state of each sequence after its last row.

        Example:
            >>> layer = RecurrentLayer("gru", 2, 3)
            >>> outputs, (hidden,) = layer.run(torch.zeros(4, 2), [2, 2])
            >>> torch.equal(hidden, outputs[2:])
            True
        """
        weights, device = self.weights, x.device
        if not torch.is_autocast_enabled(device.type):
            return self._scan(x, batch_sizes, weights, state)
        # What autocast does by itself would be to run gates and states in its dtype too, or only some of the ways to
        # run a layer in it at all.
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
    """The fastest way to run a layer that works here."""
    if torch.compiler.is_compiling():
        return plain_scan
    if device.type == "cuda" and torch.backends.cudnn.enabled and not is_transformed():
        return native_scan
    return packed_scan


class StackedRNN(torch.nn.Module):
    """Recurrent layers on top of each other; after each layer its normalization, and between two dropout, then ReLU.

    Args:
        rnn_key: "lstm" or "gru".
        input_size: features of an input row.
        layer_sizes: features of each layer's output.
        dropout: probability of dropping a value between layers when training, 0 <= dropout < 1.
        use_skip_connection: every layer after the first receives the input too, after the output of the layer below;
            the output of the stack is the outputs of all layers, as the next layer receives them, then the input.
        use_layer_normalization: normalize the features of each layer's output, the last one's too.

    Raises:
        ValueError: an argument is not one of those above.

    Source: dwi_ml, `stacked_rnn.py` (which layers, in which order, under which parameter names). Skip connections are
        those of Graves, arXiv:1308.0850; layer normalization is that of Ba et al., arXiv:1607.06450.

    Example:
        >>> rnn = StackedRNN("lstm", 4, (8, 6), use_skip_connection=True)
        >>> rnn.output_size, rnn(torch.zeros(5, 4), [3, 1, 1]).shape
        (18, torch.Size([5, 18]))
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
        if len(layer_sizes) == 0:
            raise ValueError("Expected the size of at least one recurrent layer. Received: none")
        if not 0 <= dropout < 1:
            raise ValueError(f"Expected a dropout of at least 0 and below 1. Received: {dropout}")
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
        """Run all layers over all time steps, from states of zeros.

        Args:
            x: (P, input_size) float, packed, see `dwiml_func.models.rnn.packing`.
            batch_sizes: rows of each time step; they do not increase and add up to P, which is at least 1.

        Returns:
            (P, output_size), packed.

        Raises:
            ValueError: `x` does not have `input_size` columns, or the batch sizes do not fit.

        Example:
            >>> StackedRNN("gru", 4, (8,))(torch.zeros(3, 4), [2, 1]).shape
            torch.Size([3, 8])
        """
        return self.run(x, batch_sizes)[0]

    def run(
        self, x: Tensor, batch_sizes: BatchSizes, state: Sequence[State] | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Run all layers over all time steps, from given states, and return the last ones too.

        A sequence in pieces, each from the state that the piece before it returned, gives what the whole sequence
        gives. When sequences end between two pieces, keep the rows of the state that go on.

        Args:
            x: (P, input_size) float, packed, see `dwiml_func.models.rnn.packing`.
            batch_sizes: rows of each time step; they do not increase and add up to P, which is at least 1.
            state: for each layer the state of the S = batch_sizes[0] sequences before their first row: (h,) for GRU,
                (h, c) for LSTM, each (S, that layer's size). None stands for zeros.

        Returns:
            The outputs (P, output_size), packed, and for each layer the state of each sequence after its last row.

        Raises:
            ValueError: `x` does not have `input_size` columns, or the batch sizes or the state do not fit.

        Example:
            >>> rnn = StackedRNN("lstm", 4, (8, 6)).eval()
            >>> whole = rnn(torch.ones(6, 4), [2, 2, 2])
            >>> first, state = rnn.run(torch.ones(2, 4), [2])
            >>> rest, state = rnn.run(torch.ones(4, 4), [2, 2], state)
            >>> torch.allclose(torch.cat([first, rest]), whole)
            True
        """
        self._check_rows(x, batch_sizes)
        layers = [cast(RecurrentLayer, self.get_submodule(f"rnn_{number}")) for number in range(self.num_layers)]
        if state is not None:
            _check_state(layers, _num_sequences(batch_sizes), state)
        inputs, outputs, last_states = x, [], []
        for number, layer in enumerate(layers):
            x, last_state = layer.run(x, batch_sizes, None if state is None else state[number])
            last_states.append(last_state)
            if self.use_layer_normalization:
                x = self.get_submodule(f"layer_norm_{number}")(x)
            if number + 1 < self.num_layers:
                x = dropout(x, self.dropout, self.training).relu()
            outputs.append(x)
            if self.use_skip_connection:
                x = torch.cat([x, inputs], dim=1)
        if self.use_skip_connection:
            x = torch.cat([*outputs, inputs], dim=1)
        return x, tuple(last_states)

    def _check_rows(self, x: Tensor, batch_sizes: BatchSizes) -> None:
        if x.ndim != 2 or x.shape[1] != self.input_size:
            raise ValueError(f"Expected x of shape (P, {self.input_size}). Received: {tuple(x.shape)}")
        if isinstance(batch_sizes, Tensor):
            return  # nothing can be read of a tensor while a graph is traced
        if sum(batch_sizes) != len(x) or any(now > before for before, now in pairwise([len(x), *batch_sizes, 1])):
            raise ValueError(
                f"Expected batch sizes of at least 1 that do not increase and add up to {len(x)}, the rows of x. "
                f"Received: {list(batch_sizes)}"
            )


def _num_sequences(batch_sizes: BatchSizes) -> int:
    return len(batch_sizes) if isinstance(batch_sizes, Tensor) else batch_sizes[0]


def _check_state(layers: Sequence[RecurrentLayer], num_sequences: int, state: Sequence[State]) -> None:
    expected = [[(num_sequences, layer.hidden_size)] * _NUM_STATES[layer.rnn_key] for layer in layers]
    received = [[tuple(part.shape) for part in layer_state] for layer_state in state]
    if received != expected:
        raise ValueError(f"Expected a state of shapes {expected}, a list for each layer. Received: {received}")
