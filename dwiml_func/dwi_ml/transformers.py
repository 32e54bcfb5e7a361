"""Transformers in dwi_ml's files: which class, and tensors that are kept in another form there.

dwi_ml keeps three projections for attention where `Attention` has one parameter, and saves the table of positions.

Source: dwi_ml, `transformer_models.py`, `transformers_from_torch.py` and `positional_encoding.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dwiml_func.models.transformers.tokens import sinusoidal_encoding

__all__ = ["DEFAULT_MAX_LEN", "MODEL_TYPES", "TRANSFORMERS", "joined_state", "split_state"]

MODEL_TYPES = {
    "learn2track": "Learn2TrackModel",
    "tto": "OriginalTransformerModel",
    "tts": "TransformerSrcOnlyModel",
    "ttst": "TransformerSrcAndTgtModel",
    "autoencoder": "ModelAE",
}
"""The content of dwi_ml's `model_type.txt` for each of our models."""

TRANSFORMERS = ("tto", "tts", "ttst")
"""Of these, the ones whose tensors are in another form there."""

DEFAULT_MAX_LEN = 1000
"""dwi_ml's `max_len`, where ours has none."""

_POSITIONS = "position_encoding_layer.pos_emb"
_JOINED = "in_proj_weight"
_PARTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_ORDER = (
    "input_embedding_layer.",
    _POSITIONS,
    "direction_getter.",
    "embedding_layer_t.",
    "modified_torch_transformer.",
)


def joined_state(state: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The tensors of dwi_ml's `model_state.pkl` as our model has them; ValueError for positions other than sines."""
    joined = {}
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".")
        if name == _POSITIONS:
            _check_positions(tensor, source)
        elif last == _PARTS[0] and all(f"{prefix}.{part}" in state for part in _PARTS):
            joined[f"{prefix}.{_JOINED}"] = torch.cat([state[f"{prefix}.{part}"] for part in _PARTS])
        elif last not in _PARTS or f"{prefix}.{_JOINED}" not in joined:
            joined[name] = tensor
    return joined


def split_state(state: Mapping[str, Tensor], *, max_len: int | None) -> dict[str, Tensor]:
    """The reverse of `joined_state`, in dwi_ml's order."""
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".")
        if last == _JOINED:
            split |= {f"{prefix}.{part}": third.clone() for part, third in zip(_PARTS, tensor.chunk(3), strict=True)}
        else:
            split[name] = tensor
    size = next(tensor.shape[1] for name, tensor in split.items() if name.endswith(_PARTS[0]))
    split[_POSITIONS] = sinusoidal_encoding(torch.arange(max_len or DEFAULT_MAX_LEN), size)[None]
    return {name: split[name] for start in _ORDER for name in split if name.startswith(start)}


def _check_positions(table: Tensor, source: str) -> None:
    if table.dim() == 3 and table.shape[0] == 1 and table.shape[2] % 2 == 0:
        expected = sinusoidal_encoding(torch.arange(table.shape[1]), table.shape[2])[None]
        if table.dtype == expected.dtype and torch.allclose(table, expected, atol=1e-5, rtol=0):
            return
    raise ValueError(f"{source}: {_POSITIONS}: expected the sinusoidal encoding (1, max_len, features).")
