"""Encoder and decoder layers over flat rows, with the parameters of torch's own layers.

One parameter `in_proj_weight` holds the projections of queries, keys and values, one below the other; dwi_ml keeps
three.

Source: Vaswani et al., "Attention Is All You Need", 2017; `norm_first`: Xiong et al., "On Layer Normalization in the
Transformer Architecture", 2020; dwi_ml, `transformers_from_torch.py` (which layers, under which names).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import dropout, gelu, linear, relu

from dwiml_func.models.transformers.attention import Sequences
from dwiml_func.models.transformers.cache import CachedLine, CachedStep

__all__ = ["Activation", "Attention", "Decoder", "DecoderLayer", "Encoder", "EncoderDecoder", "EncoderLayer", "Rows"]

Activation = Literal["relu", "gelu"]
"""Between the two linear layers of a layer."""
_ACTIVATIONS = {"relu": relu, "gelu": gelu}


Rows = Sequences | CachedStep | CachedLine
"""How rows attend: all rows of sequences at once, the newest row of each, or all of one that grows on later."""


class Attention(torch.nn.Module):
    """Multi-head causal attention, with output projection."""

    def __init__(self, size: int, num_heads: int, dropout_rate: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.in_proj_weight = torch.nn.Parameter(torch.empty(3 * size, size))
        self.in_proj_bias = torch.nn.Parameter(torch.zeros(3 * size))
        self.out_proj = torch.nn.Linear(size, size)
        for weight in self.in_proj_weight.detach().chunk(3):
            torch.nn.init.xavier_uniform_(weight)
        torch.nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, memory: Tensor | None, sequences: Rows) -> Tensor:
        """Rows (N, d) attend to rows of `memory` (N, d), or with None to themselves."""
        rate = self.dropout_rate if self.training else 0.0
        return self.out_proj(sequences.attend(self.project(x, memory), num_heads=self.num_heads, dropout_rate=rate))

    def project(self, x: Tensor, memory: Tensor | None) -> Tensor:
        """Queries of `x`, keys and values of `memory`, or with None of `x`, next to each other: (N, 3 d)."""
        if memory is None:
            return linear(x, self.in_proj_weight, self.in_proj_bias)
        size = x.shape[-1]
        query = linear(x, self.in_proj_weight[:size], self.in_proj_bias[:size])
        keys_and_values = linear(memory, self.in_proj_weight[size:], self.in_proj_bias[size:])
        return torch.cat([query, keys_and_values], dim=-1)


class _Layer(torch.nn.Module):
    """What both layers have: self-attention, two linear layers, norms."""

    attends_to_memory: ClassVar[bool]

    def __init__(
        self, size: int, num_heads: int, hidden_size: int, dropout_rate: float, activation: Activation, norm_first: bool
    ) -> None:
        super().__init__()
        self.dropout_rate = dropout_rate
        self.norm_first = norm_first
        self.activation = _ACTIVATIONS[activation]
        self.self_attn = Attention(size, num_heads, dropout_rate)
        if self.attends_to_memory:  # in torch's order of parameters
            self.multihead_attn = Attention(size, num_heads, dropout_rate)
        self.linear1 = torch.nn.Linear(size, hidden_size)
        self.linear2 = torch.nn.Linear(hidden_size, size)
        self.norm1 = torch.nn.LayerNorm(size)
        self.norm2 = torch.nn.LayerNorm(size)
        if self.attends_to_memory:
            self.norm3 = torch.nn.LayerNorm(size)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout_rate, self.training)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self._drop(self.linear2(self._drop(self.activation(self.linear1(x)))))


class EncoderLayer(_Layer):
    """Causal self-attention, then two linear layers, each with a residual connection and a norm."""

    attends_to_memory = False

    def forward(self, x: Tensor, sequences: Rows) -> Tensor:
        """Map rows (N, d) to rows (N, d)."""
        if self.norm_first:
            x = x + self._drop(self.self_attn(self.norm1(x), None, sequences))
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x + self._drop(self.self_attn(x, None, sequences)))
        return self.norm2(x + self._feed_forward(x))


class DecoderLayer(_Layer):
    """Causal self-attention, causal attention to the encoder's rows, then two linear layers."""

    attends_to_memory = True

    def forward(self, x: Tensor, memory: Tensor, sequences: Rows) -> Tensor:
        """Map rows (N, d) to rows (N, d); `memory` (N, d) are the encoder's."""
        if self.norm_first:
            x = x + self._drop(self.self_attn(self.norm1(x), None, sequences))
            x = x + self._drop(self.multihead_attn(self.norm2(x), memory, sequences))
            return x + self._feed_forward(self.norm3(x))
        x = self.norm1(x + self._drop(self.self_attn(x, None, sequences)))
        x = self.norm2(x + self._drop(self.multihead_attn(x, memory, sequences)))
        return self.norm3(x + self._feed_forward(x))


class Encoder(torch.nn.Module):
    """Encoder layers, one after the other, without a last norm, as in dwi_ml."""

    def __init__(self, layers: Iterable[EncoderLayer]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: Tensor, sequences: Rows) -> Tensor:
        """Map rows (N, d) to rows (N, d)."""
        for layer in self.layers:
            x = layer(x, sequences)
        return x


class Decoder(torch.nn.Module):
    """Decoder layers, one after the other, without a last norm."""

    def __init__(self, layers: Iterable[DecoderLayer]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: Tensor, memory: Tensor, sequences: Rows) -> Tensor:
        """Map rows (N, d) to rows (N, d); `memory` (N, d) are the encoder's."""
        for layer in self.layers:
            x = layer(x, memory, sequences)
        return x


class EncoderDecoder(torch.nn.Module):
    """An encoder, and a decoder that attends to it; matrices start as in `torch.nn.Transformer`."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        for module in self.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.xavier_uniform_(module.weight)

    def forward(self, x: Tensor, y: Tensor, sequences: Rows) -> Tensor:
        """Encode rows x (N, d), and decode rows y (N, d)."""
        return self.decoder(y, self.encoder(x, sequences), sequences)
