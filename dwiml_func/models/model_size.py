"""Whether a model fits into memory, found out before any of it is taken."""

from __future__ import annotations

import math
import os
from functools import partial

from dwiml_func.data.neighborhood import Neighborhood
from dwiml_func.models.config import ModelConfig
from dwiml_func.models.model_directory import build_model, model_shapes

__all__ = ["require_memory"]

_BYTES = 4 * 4  # a parameter, its gradient and two moments, float32


def require_memory(config: ModelConfig, *, nb_features: int, neighborhood: Neighborhood | None = None) -> None:
    """Refuse a model that cannot be trained in this machine's memory, whatever the batches are.

    Args:
        config: the options.
        nb_features: features of the input volume at a point.
        neighborhood: where around each point the volume is read too.

    Raises:
        ValueError: its parameters, their gradients and moments take more than all memory.

    Example:
        >>> require_memory(ModelConfig(rnn_layer_sizes=(10**9,)), nb_features=3)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: The layers of this model are too large (rnn_layer_sizes (1000000000,)): it has ...
    """
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    build = partial(build_model, config, nb_features=nb_features, neighborhood=neighborhood)
    try:
        num_parameters: float = sum(tensor.numel() for tensor in model_shapes(build).values())
    except OverflowError:
        num_parameters = math.inf
    if _BYTES * num_parameters > available:
        count = f"{num_parameters:.3g}" if math.isfinite(num_parameters) else "more than 1e18"
        raise ValueError(
            f"The layers of this model are too large (rnn_layer_sizes {config.rnn_layer_sizes}): it has {count} "
            f"parameters, training takes {_BYTES} bytes for each, and this machine has {available / 1e9:.3g} GB of "
            f"memory. Choose smaller ones."
        )
