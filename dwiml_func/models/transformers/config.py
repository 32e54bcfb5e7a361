"""The options of the transformers, under the names and with the defaults of dwi_ml's training script."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["TransformerOptions"]


@dataclass(frozen=True, kw_only=True)
class TransformerOptions:
    """The options that only transformers have; see `Transformer`."""

    max_len: int | None = None
    """With transformers: the longest streamline that the model may read, in points. None: any."""
    nheads: int = 8
    """With transformers: number of attention heads; they divide the number of features after the embeddings."""
    n_layers_e: int = 6
    """With transformers: number of layers of the encoder."""
    n_layers_d: int | None = None
    """With tto: number of layers of the decoder. None: as many as the encoder has."""
    ffnn_hidden_size: int | None = None
    """With transformers: number of features between the two linear layers of each layer. None: half of the model's."""
    dropout_rate: float = 0.1
    """With transformers: probability of dropping a value, also of attention's weights."""
    activation: Literal["relu", "gelu"] = "relu"
    """With transformers: function between the two linear layers of each layer."""
    norm_first: bool = False
    """With transformers: normalise before attention and linear layers, instead of after them."""
    position_encoding: Literal["sinusoidal", "relational"] = "sinusoidal"
    """With transformers: how a point's place along its streamline is told. There is no relational encoding yet, as in
    dwi_ml."""
    sos_token_type: str = "as_label"
    """With tto and ttst: form of the previous direction and of the start (SOS): as_label, or a sphere of dipy whose
    vertices are classes."""
    target_embedding_key: Literal["no_embedding", "nn_embedding"] = "nn_embedding"
    """With tto and ttst: first layer on the previous direction: none, or a linear layer and ReLU."""
    target_embedded_size: int | None = None
    """With ttst and target embedding nn_embedding: number of features."""
