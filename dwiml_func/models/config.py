"""The options of a model, under the reference's names and with its defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

from tyro.constructors import PrimitiveConstructorSpec

from dwiml_func._checks import STRICT, check_number
from dwiml_func.data.config import BatchConfig, DataConfig
from dwiml_func.models.direction_getters import DIRECTION_GETTERS

__all__ = ["ModelConfig", "check_fitting_data", "check_getter_for_compressed"]

_MOST_LAYERS = 1000

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
"""An option that is left out, given alone, which means 1.0, or given with a number."""

_GETTER_OPTIONS = {
    "add_entropy_to_gauss": "entropy_weight",
    "dg_nb_gaussians": "nb_gaussians",
    "dg_nb_clusters": "n_cluster",
    "dg_sphere": "sphere",
    "normalize_targets": "normalize_targets",
    "normalize_outputs": "normalize_outputs",
}
"""Our names, which are those of the reference's command line, and the direction getters' own."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The Learn2Track model.

    Raises:
        ValueError: a number out of range, or an option that does not belong to the chosen embedding or direction
            getter.

    Example:
        >>> ModelConfig().rnn_layer_sizes
        (100, 100)
        >>> ModelConfig(dg_key="gaussian", normalize_outputs=1.0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: normalize_outputs: gaussian has no such option. Its options: add_entropy_to_gauss, ...
    """

    __pydantic_config__: ClassVar = STRICT

    input_embedding_key: Literal["no_embedding", "nn_embedding", "cnn_embedding"] = "no_embedding"
    """First layers on the input: none, a linear layer and ReLU, or convolutions over a grid neighbourhood and ReLU."""
    input_embedded_size: int | None = None
    """With nn_embedding: its number of features."""
    nb_cnn_filters: tuple[int, ...] | None = None
    """With cnn_embedding: filters of each layer."""
    kernel_size: tuple[int, ...] | None = None
    """With cnn_embedding: side of each layer's cubic kernel, as many as filters."""
    nb_previous_dirs: int = 0
    """Previous directions given to the model at each point, beside the input."""
    prev_dirs_embedding_key: Literal["no_embedding", "nn_embedding"] = "no_embedding"
    """First layer on the previous directions: none, or a linear layer and ReLU."""
    prev_dirs_embedded_size: int | None = None
    """With nn_embedding: features of all previous directions together."""
    normalize_prev_dirs: bool = False
    """Bring the previous directions to unit length."""
    rnn_key: Literal["lstm", "gru"] = "lstm"
    """Recurrent unit."""
    rnn_layer_sizes: tuple[int, ...] = (100, 100)
    """Hidden size of each recurrent layer."""
    use_skip_connection: bool = False
    """Give the input to every recurrent layer, and the outputs of all of them, with the input, to the getter."""
    use_layer_normalization: bool = False
    """Normalise the output of each recurrent layer."""
    dropout: float = 0.0
    """Probability of dropping a value between recurrent layers, and in the embeddings."""
    dg_key: Literal[
        "cosine-regression",
        "l2-regression",
        "cosine-plus-l2-regression",
        "sphere-classification",
        "smooth-sphere-classification",
        "gaussian",
        "gaussian-mixture",
        "fisher-von-mises",
        "fisher-von-mises-mixture",
    ] = "cosine-regression"
    """Direction getter: the last layers, and the loss."""
    dg_dropout: float = 0.0
    """Probability of dropping a value inside the direction getter."""
    dg_sphere: str | None = None
    """With classification: the sphere of dipy whose points are the classes. None: symmetric724."""
    add_entropy_to_gauss: _OneWithoutValue = None
    """With gaussian: subtract the entropy from the loss, with this weight; alone: 1. None: it is not."""
    dg_nb_gaussians: int | None = None
    """With gaussian-mixture: number of Gaussians. None: 3."""
    dg_nb_clusters: int | None = None
    """With fisher-von-mises-mixture: number of distributions. None: 3."""
    normalize_targets: _OneWithoutValue = None
    """With regression and gaussian: bring the true directions to this length; alone: 1. None: they are not."""
    normalize_outputs: _OneWithoutValue = None
    """With regression: bring the predicted directions to this length; alone: 1. None: they are not."""
    add_eos: bool = False
    """Learn too where streamlines end (EOS)."""
    eos_weight: float | None = None
    """With --add-eos, but not with classification: weight of the loss of EOS. None: 1."""

    def __post_init__(self) -> None:
        if not self.rnn_layer_sizes:
            raise ValueError("rnn_layer_sizes: expected at least one layer, received none.")
        if len(self.rnn_layer_sizes) > _MOST_LAYERS:
            raise ValueError(
                f"rnn_layer_sizes: expected at most {_MOST_LAYERS} layers, received {len(self.rnn_layer_sizes)}."
            )
        for name in ("rnn_layer_sizes", "nb_cnn_filters", "kernel_size"):
            for size in getattr(self, name) or ():
                check_number(name, size, at_least=1)
        check_number("nb_previous_dirs", self.nb_previous_dirs, at_least=0)
        for name in ("dropout", "dg_dropout"):
            check_number(name, getattr(self, name), at_least=0, below=1)
        for name in ("input_embedded_size", "prev_dirs_embedded_size", "dg_nb_gaussians", "dg_nb_clusters"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), at_least=1)
        for name in ("normalize_targets", "normalize_outputs", "add_entropy_to_gauss"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)
        self._check_embeddings()
        self._check_getter()

    @property
    def dg_args(self) -> dict[str, Any]:
        """The direction getter's options under its own names, those that were given; for `make_direction_getter`."""
        given = {name: getattr(self, option) for option, name in _GETTER_OPTIONS.items()}
        given = {name: value for name, value in given.items() if value is not None}
        eos_weight = 1.0 if self.eos_weight is None else self.eos_weight
        return {"dropout": self.dg_dropout, "add_eos": self.add_eos, "eos_weight": eos_weight, **given}

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `Learn2Track`, without `nb_features` and `neighborhood`, which the data decide."""
        getters = {*_GETTER_OPTIONS, "dg_dropout", "add_eos", "eos_weight"}
        own = {name: value for name, value in asdict(self).items() if name not in getters}
        return {**own, "dg_args": self.dg_args}

    def _check_embeddings(self) -> None:
        cnn = (self.nb_cnn_filters, self.kernel_size)
        if self.input_embedding_key == "cnn_embedding":
            if not self.nb_cnn_filters or not self.kernel_size or len(self.nb_cnn_filters) != len(self.kernel_size):
                raise ValueError(
                    "cnn_embedding: expected nb_cnn_filters and kernel_size beside it, as many of one as of the other, "
                    f"received {self.nb_cnn_filters} and {self.kernel_size}."
                )
        elif cnn != (None, None):
            raise ValueError(
                "nb_cnn_filters and kernel_size: expected input_embedding_key cnn_embedding beside them, "
                f"received {self.input_embedding_key}."
            )
        for kind in ("input", "prev_dirs"):
            key, size = getattr(self, f"{kind}_embedding_key"), getattr(self, f"{kind}_embedded_size")
            if key == "nn_embedding" and size is None:
                raise ValueError(
                    f"{kind}_embedding_key nn_embedding: expected {kind}_embedded_size beside it, got none."
                )
            if key != "nn_embedding" and size is not None:
                raise ValueError(
                    f"{kind}_embedded_size: expected {kind}_embedding_key nn_embedding beside it, received {key}."
                )
        if self.nb_previous_dirs == 0 and (self.prev_dirs_embedding_key != "no_embedding" or self.normalize_prev_dirs):
            raise ValueError(
                "prev_dirs_embedding_key and normalize_prev_dirs: expected nb_previous_dirs of at least 1 beside them, "
                "received 0."
            )

    def _check_getter(self) -> None:
        names = DIRECTION_GETTERS[self.dg_key].option_names
        for option, name in _GETTER_OPTIONS.items():
            if getattr(self, option) is not None and name not in names:
                known = sorted(option for option, name in _GETTER_OPTIONS.items() if name in names)
                raise ValueError(
                    f"{option}: {self.dg_key} has no such option. Its options: {', '.join(known) or 'none'}."
                )
        if self.eos_weight is not None:
            check_number("eos_weight", self.eos_weight, at_least=0)
            if not self.add_eos:
                raise ValueError(f"eos_weight: expected add_eos beside it, received {self.eos_weight} without.")
            if self.dg_key.endswith("classification"):
                raise ValueError(
                    f"eos_weight: with {self.dg_key} the end of a streamline is one class among the others, and has no "
                    f"weight of its own. Expected none, received {self.eos_weight}."
                )


def check_fitting_data(model: ModelConfig, data: DataConfig, batches: BatchConfig) -> None:
    """Refuse a model that cannot learn from the data it would get.

    Args:
        model: the model's options.
        data: what is read.
        batches: how streamlines are sampled.

    Raises:
        ValueError: compressed streamlines for a direction getter that needs even steps, or convolutions that do not fit
            the neighbourhood.

    Example:
        >>> check_fitting_data(ModelConfig(), DataConfig(), BatchConfig(compress=0.1))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: compress: cosine-regression cannot learn from compressed streamlines, ...
    """
    if batches.compress is not None:
        check_getter_for_compressed(model.dg_key, "compress")
    if model.input_embedding_key == "cnn_embedding":
        if data.neighborhood_type != "grid":
            raise ValueError(
                "input_embedding_key cnn_embedding: expected neighborhood_type grid beside it, "
                f"received {data.neighborhood_type}."
            )
        side, kernels = 2 * (data.neighborhood_radius or 0) + 1, model.kernel_size or ()
        if side - sum(size - 1 for size in kernels) < 1:
            raise ValueError(
                f"kernel_size: expected kernels that fit one after the other into the {side} points a side of the "
                f"neighbourhood, received {kernels}."
            )


def check_getter_for_compressed(dg_key: str, what: str) -> None:
    """Refuse compressed streamlines for a direction getter that cannot use them.

    Args:
        dg_key: the getter.
        what: where the compression comes from, for the error.

    Raises:
        ValueError: the getter needs steps of one length.

    Example:
        >>> check_getter_for_compressed("l2-regression", "compress")
    """
    if not DIRECTION_GETTERS[dg_key].supports_compressed:
        able = ", ".join(key for key, getter in DIRECTION_GETTERS.items() if getter.supports_compressed)
        raise ValueError(
            f"{what}: {dg_key} cannot learn from compressed streamlines, whose steps differ in length. "
            f"Resample them (step_size), or take one of: {able}."
        )
