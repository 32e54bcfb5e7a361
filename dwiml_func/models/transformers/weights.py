"""Attention weights to look at: those of one streamline, by attention, head, row and column, and summaries of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.models.transformers.causal import causal_weights
from dwiml_func.models.transformers.transformer import Transformer

__all__ = ["AttentionSummary", "attention_weights", "summary_of"]


class _Recorded:
    """Rows of one sequence, as `Sequences`, that keep the weights of each attention."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def attend(self, projected: Tensor, *, num_heads: int, dropout_rate: float) -> Tensor:
        """As `Sequences.attend`, with all weights at hand."""
        del dropout_rate  # 0, in evaluation mode
        query, key, value = projected.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)
        weights = causal_weights(query, key)
        self.weights.append(weights)
        return (weights @ value).transpose(0, 1).flatten(1)


def attention_weights(model: Transformer, batch: StreamlineBatch) -> dict[str, Tensor]:
    """The weights of each attention along one streamline, without gradient.

    Returns (heads, L, L) for "encoder_1", ..., and of a tto also "decoder_1", "cross_1", ...: of row i over the rows
    j <= i, in the order of the batch's inputs. Rows sum to 1. The model is in evaluation mode. ValueError for a batch
    of several streamlines.
    """
    if len(batch) != 1:
        raise ValueError(f"Expected a batch of one streamline. Received: {len(batch)}.")
    recorded: Any = _Recorded()
    with torch.no_grad():
        x, y, _ = model.rows(batch)
        model.outputs(x, y, recorded)
    layers: Any = model.modified_torch_transformer
    num_decoder = len(layers.decoder.layers) if model.kind == "tto" else 0
    num_encoder = len(recorded.weights) - 2 * num_decoder
    names = [f"encoder_{number + 1}" for number in range(num_encoder)]
    names += [f"{kind}_{number + 1}" for number in range(num_decoder) for kind in ("decoder", "cross")]
    return dict(zip(names, recorded.weights, strict=True))


class AttentionSummary(NamedTuple):
    """Of each point (L,): what later points make of it, and how far back it looks.

    mean_attention: the mean weight that the point has for itself and the points after it. importance: the share of
        these for which it is important, which is to have more than an even share of their attention. looked_far: how
        many points back those lie, on average, that are important to the point.
    """

    mean_attention: Tensor
    importance: Tensor
    looked_far: Tensor


def summary_of(weights: Tensor) -> AttentionSummary:
    """Summarise weights (L, L), those of a head or means over heads.

    Source: dwi_ml, `tt_visualize_weights.py` (which summaries; there a threshold on rescaled weights).
    """
    steps = torch.arange(len(weights), device=weights.device)
    back = steps[:, None] - steps
    is_important = (weights * (steps[:, None] + 1) > 1 + 1e-5) & (back >= 0)
    num_after = len(weights) - steps
    num_important = is_important.sum(1)
    return AttentionSummary(
        weights.sum(0) / num_after,
        is_important.sum(0) / num_after,
        (is_important * back).sum(1) / num_important.clamp(min=1),
    )
