"""Models that learn tractography, their direction getters, and the baselines that they are compared with.

Names are loaded at their first use, so that one model does not load another.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwiml_func.models.autoencoder.autoencoder import Autoencoder, compute_reconstruction_loss
    from dwiml_func.models.direction_getters import make_direction_getter
    from dwiml_func.models.learn2track import Learn2Track, compute_batch_loss
    from dwiml_func.models.transformers.transformer import Transformer

__all__ = [
    "Autoencoder",
    "Learn2Track",
    "Transformer",
    "compute_batch_loss",
    "compute_reconstruction_loss",
    "load_model",  # pyright: ignore[reportUnsupportedDunderAll]
    "make_direction_getter",
]

_MODULES = {
    "Autoencoder": "models.autoencoder.autoencoder",
    "Learn2Track": "models.learn2track",
    "Transformer": "models.transformers.transformer",
    "compute_batch_loss": "models.learn2track",
    "compute_reconstruction_loss": "models.autoencoder.autoencoder",
    "load_model": "experiment.model_store",  # offered here, not used: the rooms below `experiment` do not import it
    "make_direction_getter": "models.direction_getters",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"dwiml_func.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
