"""The options of a model, under the names and with the defaults of dwi_ml's training script."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from tyro.constructors import PrimitiveConstructorSpec

from dwiml_func._checks import STRICT
from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.data.config import BatchConfig, DataConfig
from dwiml_func.data.neighborhood import Neighborhood
from dwiml_func.models.autoencoder.autoencoder import Autoencoder
from dwiml_func.models.autoencoder.config import DEFAULT_NB_POINTS, AutoencoderOptions
from dwiml_func.models.direction_getters import DIRECTION_GETTERS, DirectionGetterKey, make_direction_getter
from dwiml_func.models.learn2track import Learn2Track
from dwiml_func.models.transformers.config import TransformerOptions
from dwiml_func.models.transformers.transformer import Transformer

__all__ = [
    "GETTER_OPTIONS",
    "ModelConfig",
    "build_model",
    "check_getter_for_compressed",
    "check_model",
    "model_shapes",
]

_OneWithoutValue = Annotated[
    float | None,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[X]",
        instance_from_str=lambda strings: float(strings[0]) if strings else 1.0,
        is_instance=lambda value: isinstance(value, float),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""An option that may be left out, given without a value (1.0) or given with a number."""

GETTER_OPTIONS = {
    "dg_dropout": "dropout",
    "add_eos": "add_eos",
    "eos_weight": "eos_weight",
    "add_entropy_to_gauss": "entropy_weight",
    "dg_nb_gaussians": "nb_gaussians",
    "dg_nb_clusters": "n_cluster",
    "dg_sphere": "sphere",
    "normalize_targets": "normalize_targets",
    "normalize_outputs": "normalize_outputs",
}
"""Options of the direction getter, and their names as arguments of `make_direction_getter` (dwi_ml's `dg_args`)."""


@dataclass(frozen=True, kw_only=True)
class _Learn2TrackOptions:
    """Which model, its input, and the options that only Learn2Track has."""

    model: Literal["learn2track", "tto", "tts", "ttst", "autoencoder"] = "learn2track"
    """Learn2Track, a recurrent model; or a transformer: tto (encoder over the input, decoder over the previous
    directions), tts (encoder over the input) or ttst (encoder over both). Or autoencoder, which does not track: it
    learns to describe whole streamlines by few numbers, and reads nothing but their points."""
    input_embedding_key: Literal["no_embedding", "nn_embedding", "cnn_embedding"] | None = None
    """First layers on the input: none, a linear layer and ReLU, or convolutions over a grid neighbourhood and ReLU.
    None: no_embedding with learn2track, nn_embedding with transformers."""
    input_embedded_size: int | None = None
    """With nn_embedding: number of features."""
    nb_cnn_filters: tuple[int, ...] | None = None
    """With cnn_embedding: number of filters of each layer."""
    kernel_size: tuple[int, ...] | None = None
    """With cnn_embedding: side of each layer's cubic kernel, one per layer."""
    nb_previous_dirs: int = 0
    """Number of previous directions given to the model at each point, in addition to the input."""
    prev_dirs_embedding_key: Literal["no_embedding", "nn_embedding"] = "no_embedding"
    """First layer on the previous directions: none, or a linear layer and ReLU."""
    prev_dirs_embedded_size: int | None = None
    """With nn_embedding: number of features for all previous directions together."""
    normalize_prev_dirs: bool = False
    """Normalise the previous directions to unit length."""
    rnn_key: Literal["lstm", "gru"] = "lstm"
    """Recurrent unit."""
    rnn_layer_sizes: tuple[int, ...] = (100, 100)
    """Hidden size of each recurrent layer."""
    use_skip_connection: bool = False
    """Give the input to every recurrent layer, and the outputs of all layers and the input to the direction getter."""
    use_layer_normalization: bool = False
    """Normalise the output of each recurrent layer."""
    dropout: float = 0.0
    """Probability of dropping a value between recurrent layers, and in the embeddings."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(AutoencoderOptions, TransformerOptions, _Learn2TrackOptions):
    """The options of a model and its direction getter, which check their values; see `check_model`."""

    __pydantic_config__: ClassVar = STRICT

    dg_key: DirectionGetterKey = "cosine-regression"
    """Direction getter: the last layers, and the loss."""
    dg_dropout: float = 0.0
    """Probability of dropping a value inside the direction getter."""
    dg_sphere: str | None = None
    """With classification: the dipy sphere whose points are the classes. None: symmetric724."""
    add_entropy_to_gauss: _OneWithoutValue = None
    """With gaussian: weight of the entropy subtracted from the loss; without a value: 1. None: 0."""
    dg_nb_gaussians: int | None = None
    """With gaussian-mixture: number of Gaussians. None: 3."""
    dg_nb_clusters: int | None = None
    """With fisher-von-mises-mixture: number of distributions. None: 3."""
    normalize_targets: _OneWithoutValue = None
    """With regression and gaussian: length given to the true directions; without a value: 1. None: as they are."""
    normalize_outputs: _OneWithoutValue = None
    """With regression: length given to the predicted directions; without a value: 1. None: as they are."""
    add_eos: bool = False
    """Also learn where streamlines end (EOS)."""
    eos_weight: float | None = None
    """With --add-eos, but not with classification: weight of the loss of EOS. None: 1."""

    @property
    def dg_args(self) -> dict[str, Any]:
        """The arguments of `make_direction_getter` that were given."""
        values = {name: getattr(self, option) for option, name in GETTER_OPTIONS.items()}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def embedding_key(self) -> str:
        """The input's embedding that the model has."""
        return self.input_embedding_key or ("no_embedding" if self.model == "learn2track" else "nn_embedding")

    @property
    def drops_nothing(self) -> bool:
        """Whether `dropout` has no place to act: between recurrent layers, or on what an embedding gives."""
        has_place = self.nb_previous_dirs > 0 or self.embedding_key != "no_embedding" or len(self.rnn_layer_sizes) > 1
        return self.dropout > 0 and not has_place

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the model, except `nb_features`, `neighborhood` and `nb_points`, which others decide."""
        if self.model == "autoencoder":
            return {name: getattr(self, name) for name in sorted(_ONLY_AUTOENCODER)}
        excluded = _ONLY_TRANSFORMER if self.model == "learn2track" else _ONLY_LEARN2TRACK
        excluded = {*excluded, *_ONLY_AUTOENCODER, *GETTER_OPTIONS, "input_embedding_key", "position_encoding"}
        own = {name: value for name, value in asdict(self).items() if name not in excluded}
        return {**own, "input_embedding_key": self.embedding_key, "dg_args": self.dg_args}


_ONLY_LEARN2TRACK = frozenset(
    {
        *("nb_previous_dirs", "prev_dirs_embedding_key", "prev_dirs_embedded_size", "normalize_prev_dirs"),
        *("rnn_key", "rnn_layer_sizes", "use_skip_connection", "use_layer_normalization", "dropout"),
    }
)
_ONLY_TRANSFORMER = frozenset({"model", *(field.name for field in fields(TransformerOptions))})
_ONLY_AUTOENCODER = frozenset(field.name for field in fields(AutoencoderOptions))
_ONLY_TRACKING = frozenset(
    {"input_embedding_key", "input_embedded_size", "nb_cnn_filters", "kernel_size", "dg_key", *GETTER_OPTIONS}
)
"""Options that Learn2Track and the transformers share."""


def build_model(
    config: ModelConfig, *, nb_features: int, neighborhood: Neighborhood | None = None, nb_points: int | None = None
) -> Learn2Track | Transformer | Autoencoder:
    """A new model with random parameters from torch's generator.

    `nb_features` are those of the volume at a point; `nb_points` the points of each streamline of an autoencoder.
    """
    if config.model == "autoencoder":
        return Autoencoder(nb_points or DEFAULT_NB_POINTS, **config.arguments)
    if config.model == "learn2track":
        return Learn2Track(nb_features, neighborhood=neighborhood, **config.arguments)
    return Transformer(nb_features, neighborhood=neighborhood, **config.arguments)


def model_shapes(build: Callable[[], torch.nn.Module]) -> dict[str, Tensor]:
    """The state of a model without values, on torch's device "meta", which takes no memory.

    Raises OverflowError if torch cannot represent the size of a tensor.
    """
    try:
        with torch.device("meta"), torch_rng(Key(0)):
            return build().state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:  # torch raises any of them
        if not isinstance(error, OverflowError) and "overflow" not in str(error).lower():
            raise
        raise OverflowError("No machine can hold a model of the sizes in its options.") from None


def check_model(model: ModelConfig, data: DataConfig, batches: BatchConfig) -> None:
    """Raise ValueError for options that make no model, or one that cannot learn from such data.

    It builds the model without memory: each part checks its own options.
    """
    _check_options_of_model(model)
    if model.model == "autoencoder":
        _check_data_of_autoencoder(data, batches)
        with suppress(OverflowError):
            model_shapes(partial(build_model, model, nb_features=1, nb_points=batches.nb_points))
        return
    if model.eos_weight is not None and not model.add_eos:
        raise ValueError(f"eos_weight: requires add_eos, received {model.eos_weight} without it.")
    try:
        model_shapes(partial(make_direction_getter, model.dg_key, 1, **model.dg_args))
    except ValueError as error:  # it begins with the getter's name of the option
        name, _, message = str(error).partition(": ")
        names = {ours: option for option, ours in GETTER_OPTIONS.items()}
        raise ValueError(f"{names.get(name, name)}: {message}") from None
    if model.model == "learn2track" or model.embedding_key != "no_embedding":  # else the data's features decide
        with suppress(OverflowError):  # the memory is checked when the number of features is known
            model_shapes(partial(build_model, model, nb_features=1, neighborhood=data.neighborhood))
    if batches.compress is not None:
        check_getter_for_compressed(model.dg_key, "compress")


def _check_options_of_model(model: ModelConfig) -> None:
    """Raise ValueError for an option that another model has."""
    if model.position_encoding == "relational":
        raise ValueError("position_encoding: there is no relational encoding. Use sinusoidal.")
    others = {
        "learn2track": {"learn2track"},
        "a transformer": {"tto", "tts", "ttst"},
        "autoencoder": {"autoencoder"},
        "that tracks": {"learn2track", "tto", "tts", "ttst"},
    }
    options = (_ONLY_LEARN2TRACK, _ONLY_TRANSFORMER, _ONLY_AUTOENCODER, _ONLY_TRACKING)
    defaults = ModelConfig(model=model.model)
    for (needed, kinds), names in zip(others.items(), options, strict=True):
        given = [name for name in sorted(names) if getattr(model, name) != getattr(defaults, name)]
        if given and model.model not in kinds:
            raise ValueError(f"{', '.join(given)}: requires --model {needed}, received {model.model}.")
    if model.model == "tts" and (model.sos_token_type, model.target_embedding_key) != ("as_label", "nn_embedding"):
        raise ValueError("sos_token_type, target_embedding_key: require model tto or ttst, received tts.")


def _check_data_of_autoencoder(data: DataConfig, batches: BatchConfig) -> None:
    """Raise ValueError for options of the input volume, which is not read, or for streamlines of varying length."""
    names = ("interpolation", "neighborhood_type", "neighborhood_radius", "neighborhood_resolution")
    given = [name for name in names if getattr(data, name) != getattr(DataConfig(), name)]
    if given:
        raise ValueError(f"{', '.join(given)}: requires a --model that reads the input volume, received autoencoder.")
    for name in ("step_size", "compress"):
        if getattr(batches, name) is not None:
            raise ValueError(
                f"{name}: an autoencoder reads streamlines of one number of points. Use nb_points "
                f"({DEFAULT_NB_POINTS} by default)."
            )


def check_getter_for_compressed(dg_key: str, source: str) -> None:
    """Raise ValueError if a getter cannot learn from streamlines that are compressed because of `source`."""
    if not DIRECTION_GETTERS[dg_key].supports_compressed:
        able = ", ".join(key for key, getter in DIRECTION_GETTERS.items() if getter.supports_compressed)
        raise ValueError(
            f"{source}: {dg_key} cannot learn from compressed streamlines, whose steps differ in length. "
            f"Resample them (step_size), or choose one of {able}."
        )
