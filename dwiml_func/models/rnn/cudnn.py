"""torch's own recurrent layers on the packed layout: cuDNN's where the tensors are on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dwiml_func.models.rnn.scan import State, Weights

__all__ = ["native_scan"]


def native_scan(
    rnn_key: str, x: Tensor, batch_sizes: Sequence[int], weights: Weights, state: State
) -> tuple[Tensor, State]:
    """Run one layer over all time steps, as `torch.nn.LSTM` and `torch.nn.GRU` do: what `plain_scan` computes.

    The fastest way on CUDA, by cuDNN, and the slowest on a CPU. It has first gradients alone there. As torch says of
    its recurrent layers, some versions of CUDA repeat a run to the bit only with the environment variable
    `CUBLAS_WORKSPACE_CONFIG=:16:8`.

    Args:
        rnn_key: "lstm" or "gru".
        x: (P, F) float, packed.
        batch_sizes: T numbers, rows of each time step; they do not increase and add up to P. The first is S.
        weights: the layer's, gates in torch's order. Where the matrices are of a lower precision, so is all.
        state: of the S sequences before their first row.

    Returns:
        The outputs (P, H), packed, and the state of the S sequences, each after its own last row.

    Example:
        >>> weights = (torch.zeros(6, 3), torch.zeros(6, 2), torch.zeros(6), torch.zeros(6))
        >>> outputs, (hidden,) = native_scan("gru", torch.zeros(3, 3), [2, 1], weights, (torch.ones(2, 2),))
        >>> outputs[:, 0], hidden[:, 0]
        (tensor([0.5000, 0.5000, 0.2500]), tensor([0.2500, 0.5000]))
    """
    dtype, kept = weights[0].dtype, x.dtype
    x, layer_state = x.to(dtype), [part.unsqueeze(0).to(dtype) for part in state]
    # cuDNN differentiates only what ran in training mode; without dropout that mode changes no value.
    options = (True, 1, 0.0, torch.is_grad_enabled(), False)  # biases, layers, dropout, training, both directions
    sizes, parameters = torch.tensor(batch_sizes), _in_one_piece([weight.to(dtype) for weight in weights])
    if rnn_key == "lstm":
        outputs, *last = torch.lstm(x, sizes, layer_state, parameters, *options)
    else:
        outputs, *last = torch.gru(x, sizes, layer_state[0], parameters, *options)
    return outputs.to(kept), tuple(part.squeeze(0).to(kept) for part in last)


def _in_one_piece(weights: Sequence[Tensor]) -> list[Tensor]:
    """The same values side by side in memory, as cuDNN wants them; else it copies them itself, with a warning."""
    piece = torch.cat([weight.flatten() for weight in weights])
    parts = piece.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
