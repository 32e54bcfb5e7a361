"""torch's own recurrent layers, on the packed or the padded layout, which are cuDNN's on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwiml_func.models.rnn.scan import State, Weights

__all__ = ["cudnn_scan"]


def cudnn_scan(
    rnn_key: str, x: Tensor, batch_sizes: Sequence[int], weights: Weights, state: State
) -> tuple[Tensor, State]:
    """What `plain_scan` computes, by torch's own LSTM or GRU: fastest on CUDA (cuDNN), slowest on CPU.

    On CUDA it has first gradients only. If the weight matrices are in a lower precision, everything runs in it. With
    some CUDA versions runs are reproducible only with the environment variable `CUBLAS_WORKSPACE_CONFIG=:16:8`, as
    torch documents for its recurrent layers.

    Where all time steps have the same number of rows, as in the padded layout, nothing is packed: cuDNN then has its
    fastest kernels, and nobody waits for the device.
    """
    dtype, kept = weights[0].dtype, x.dtype
    x, layer_state = x.to(dtype), [part.unsqueeze(0).to(dtype) for part in state]
    # cuDNN differentiates only what ran in training mode; without dropout that mode changes no value.
    options = (True, 1, 0.0, torch.is_grad_enabled(), False)  # biases, layers, dropout, training, both directions
    parameters = _in_one_piece([weight.to(dtype) for weight in weights])
    given = layer_state if rnn_key == "lstm" else layer_state[0]
    run: Any = torch.lstm if rnn_key == "lstm" else torch.gru
    if batch_sizes[0] == batch_sizes[-1]:
        outputs, *last = run(x.unflatten(0, (-1, batch_sizes[0])), given, parameters, *options, False)  # time first
        outputs = outputs.flatten(0, 1)
    else:
        outputs, *last = run(x, torch.tensor(batch_sizes), given, parameters, *options)
    return outputs.to(kept), tuple(part.squeeze(0).to(kept) for part in last)


def _in_one_piece(weights: Sequence[Tensor]) -> list[Tensor]:
    """The same values in one block of memory, as cuDNN needs; it would copy them with a warning otherwise."""
    piece = torch.cat([weight.flatten() for weight in weights])
    parts = piece.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
