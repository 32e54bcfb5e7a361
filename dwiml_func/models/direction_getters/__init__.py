"""Direction getters: the last layers of a model, which turn its features into directions, and the loss of those.

Each stands in a module of its own; `DIRECTION_GETTERS` has them by key.
"""

from collections.abc import Callable

from dwiml_func.models.direction_getters.cosine_regression import CosineRegression
from dwiml_func.models.direction_getters.direction_getter import DirectionGetter

__all__ = ["DIRECTION_GETTERS", "CosineRegression", "DirectionGetter"]

DIRECTION_GETTERS: dict[str, Callable[..., DirectionGetter]] = {
    "cosine-regression": CosineRegression,
}
"""The getters by their keys on the command line: `DIRECTION_GETTERS[dg_key](input_size, dropout=...)`."""
