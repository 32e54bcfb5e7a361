"""The one description of a run: frozen dataclasses that are the command line, `config.json` and a snapshot's record.

Option names and defaults are those of the reference's training scripts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from dwiml_func.data.augmentation import Augmentation
from dwiml_func.data.lazy import parse_bytes
from dwiml_func.data.neighborhood import Neighborhood
from dwiml_func.data.resampling import Resampling
from dwiml_func.schedule import parse_learning_rate

__all__ = ["BatchConfig", "DataConfig", "ModelConfig", "RunConfig", "TrainingConfig", "config_from_json"]

_STRICT = {"extra": "forbid", "strict": True}  # how pydantic reads config.json: no unknown key, no conversion


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to read from the HDF5 dataset.

    Raises:
        ValueError: a part of the neighbourhood is missing or out of range, or the size of the cache cannot be read.

    Example:
        >>> DataConfig().input_group_name
        'input'
    """

    __pydantic_config__: ClassVar = _STRICT

    input_group_name: str = "input"
    """Name of the input volume's group."""
    streamline_group_name: str = "streamlines"
    """Name of the streamlines' group."""
    interpolation: Literal["nearest", "trilinear", "trilinear-corner"] = "trilinear"
    """How the volume is read between voxel centres. "trilinear-corner" is the reference's, half a voxel off."""
    neighborhood_type: Literal["axes", "grid"] | None = None
    """Points around each point where the volume is read too: on the axes, or on a cubic grid."""
    neighborhood_radius: int | None = None
    """How many steps away from the point. axes: 1 reads 7 points, 2 reads 13; grid: 27, 125."""
    neighborhood_resolution: float | None = None
    """Length of a step, in voxels."""
    lazy: bool = False
    """Read streamlines and volumes from the file when a batch needs them. The results are the same."""
    cache_size: str = "2GB"
    """With lazy: how much memory each process may keep volumes in."""

    def __post_init__(self) -> None:
        parse_bytes(self.cache_size)
        _ = self.neighborhood

    @property
    def neighborhood(self) -> Neighborhood | None:
        """Where around each point the volume is read too."""
        kind, radius, resolution = self.neighborhood_type, self.neighborhood_radius, self.neighborhood_resolution
        if kind is not None and radius is not None and resolution is not None:
            return Neighborhood(type=kind, radius=radius, resolution=resolution)
        if kind is None and radius is None and resolution is None:
            return None
        raise ValueError(
            "neighborhood_type, neighborhood_radius and neighborhood_resolution go together: expected all three or "
            f"none, received {kind}, {radius} and {resolution}."
        )


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How streamlines are put into batches.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> BatchConfig().batch_size_training
        100
    """

    __pydantic_config__: ClassVar = _STRICT

    batch_size_training: int = 100
    """Size of a training batch."""
    batch_size_validation: int = 100
    """Size of a validation batch. It cannot change the training."""
    batch_size_units: Literal["nb_streamlines", "length_mm"] = "nb_streamlines"
    """What the sizes count: streamlines, or mm of streamlines (10000 is usual)."""
    nb_streamlines_per_chunk: int | None = None
    """With length_mm: streamlines drawn at once while a batch is filled. None: 256."""
    nb_subjects_per_batch: int | None = None
    """Most subjects that share a batch. None: all."""
    cycles: int | None = None
    """Batches drawn from the same subjects before others are chosen. None: until they have no more."""
    max_batches_per_epoch_training: int = 1000
    """Most training batches in an epoch."""
    max_batches_per_epoch_validation: int = 1000
    """Most validation batches in an epoch. It cannot change the training."""
    processes: int = 0
    """Processes that load batches ahead; 0 loads them in a thread of the training process. The results are the same."""
    step_size: float | None = None
    """Resample streamlines to steps of about this size, in mm."""
    nb_points: int | None = None
    """Resample streamlines to this number of points."""
    compress: float | None = None
    """Remove points of streamlines that this allows to, in mm."""
    noise_gaussian_size_forward: float = 0.0
    """Standard deviation, in voxels, of noise on the points that training gives the model as previous directions."""
    noise_gaussian_size_loss: float = 0.0
    """The same for the points that training takes as targets."""
    split_ratio: float = 0.0
    """Share of the streamlines of each training batch that are split in two."""
    reverse_ratio: float = 0.0
    """Share of the streamlines of each training batch that are reversed."""

    def __post_init__(self) -> None:
        for name in ("batch_size_training", "batch_size_validation"):
            _require(name, getattr(self, name), at_least=1)
        for name in ("max_batches_per_epoch_training", "max_batches_per_epoch_validation"):
            _require(name, getattr(self, name), at_least=1)
        _require("processes", self.processes, at_least=0)
        for name in ("nb_streamlines_per_chunk", "nb_subjects_per_batch", "cycles"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), at_least=1)
        if self.cycles is not None and self.nb_subjects_per_batch is None:
            raise ValueError("cycles: expected nb_subjects_per_batch beside it, received none.")
        _ = self.resampling, self.augmentation

    @property
    def resampling(self) -> Resampling:
        """How streamlines are sampled."""
        return Resampling(step_size=self.step_size, nb_points=self.nb_points, compress=self.compress)

    @property
    def augmentation(self) -> Augmentation:
        """What is done to training streamlines."""
        return Augmentation(
            noise_gaussian_size_forward=self.noise_gaussian_size_forward,
            noise_gaussian_size_loss=self.noise_gaussian_size_loss,
            split_ratio=self.split_ratio,
            reverse_ratio=self.reverse_ratio,
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The Learn2Track model.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> ModelConfig().rnn_layer_sizes
        (100, 100)
    """

    __pydantic_config__: ClassVar = _STRICT

    rnn_key: Literal["lstm", "gru"] = "lstm"
    """Recurrent unit."""
    rnn_layer_sizes: tuple[int, ...] = (100, 100)
    """Hidden size of each recurrent layer."""
    nb_previous_dirs: int = 0
    """Previous directions given to the model at each point, beside the input."""
    dropout: float = 0.0
    """Probability of dropping a value between recurrent layers, and in the embeddings."""
    dg_key: Literal["cosine-regression"] = "cosine-regression"
    """Direction getter: the last layers, and the loss."""
    dg_dropout: float = 0.0
    """Probability of dropping a value inside the direction getter."""

    def __post_init__(self) -> None:
        if not self.rnn_layer_sizes:
            raise ValueError("rnn_layer_sizes: expected at least one layer, received none.")
        for size in self.rnn_layer_sizes:
            _require("rnn_layer_sizes", size, at_least=1)
        _require("nb_previous_dirs", self.nb_previous_dirs, at_least=0)
        for name in ("dropout", "dg_dropout"):
            _require(name, getattr(self, name), at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training.

    Raises:
        ValueError: a value out of range, or a learning rate that cannot be read.

    Example:
        >>> TrainingConfig(learning_rate=("0.001*3", "0.0001")).learning_rates
        (0.001, 0.001, 0.001, 0.0001)
    """

    __pydantic_config__: ClassVar = _STRICT

    max_epochs: int = 100
    """Epochs after which training ends."""
    patience: int | None = None
    """Epochs in a row without improvement after which training ends; none: it goes on."""
    patience_delta: float = 1e-6
    """Least decrease of the monitored loss that counts as an improvement."""
    optimizer: Literal["Adam", "AdamW", "RAdam", "SGD"] = "Adam"
    """Optimizer, in the arithmetic of torch.optim; SGD is without momentum."""
    learning_rate: tuple[str, ...] = ("0.001",)
    """Learning rate. "0.001*3 0.0001": three epochs at 0.001, then 0.0001."""
    weight_decay: float = 0.01
    """L2 penalty on the parameters (AdamW: decoupled)."""
    clip_grad: float | None = None
    """Largest norm of the gradient; larger ones are scaled down to it."""
    rng: int = 1234
    """Seed of everything random."""
    use_gpu: bool = False
    """Train on the CUDA device."""

    def __post_init__(self) -> None:
        _require("max_epochs", self.max_epochs, at_least=1)
        if self.patience is not None:
            _require("patience", self.patience, at_least=1)
        _require("patience_delta", self.patience_delta, at_least=0)
        _require("weight_decay", self.weight_decay, at_least=0)
        if self.clip_grad is not None:
            _require("clip_grad", self.clip_grad, above=0)
        _require("rng", self.rng, at_least=0, below=1 << 64)
        parse_learning_rate(" ".join(self.learning_rate))

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """One learning rate an epoch; the last one repeats."""
        return parse_learning_rate(" ".join(self.learning_rate))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run, complete: enough to start it again.

    Args:
        hdf5_file: the dataset.
        data: what to read from it.
        batches: how batches are made.
        model: the model.
        training: the training.

    Example:
        >>> config = RunConfig(hdf5_file="data.hdf5")
        >>> config_from_json(config.to_json()) == config
        True
    """

    __pydantic_config__: ClassVar = _STRICT

    hdf5_file: str
    data: DataConfig = field(default_factory=DataConfig)
    batches: BatchConfig = field(default_factory=BatchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON data.

        Returns:
            Nested dicts of strings, numbers and lists.
        """
        return json.loads(self.to_json())

    def to_json(self) -> str:
        """The config as JSON text, for `config_from_json`.

        Returns:
            Indented text.
        """
        return json.dumps(asdict(self), indent=2) + "\n"


def config_from_json(text: str, *, source: str = "config.json") -> RunConfig:
    """Read a config, strictly: every key known, every value of the right type and in range.

    Args:
        text: JSON text.
        source: what to call it in an error.

    Returns:
        The config.

    Raises:
        ValueError: the text is no JSON or no config; one line names each place that is wrong.

    Example:
        >>> config_from_json('{"hdf5_file": "a.hdf5", "data": {"colour": 3}}')
        Traceback (most recent call last):
        ...
        ValueError: config.json: data.colour: unexpected keyword argument, received 3
    """
    import pydantic

    try:
        return pydantic.TypeAdapter(RunConfig).validate_json(text)
    except pydantic.ValidationError as error:
        raise ValueError(f"{source}: " + "; ".join(_describe(problem) for problem in error.errors())) from None


def _describe(problem: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if "error" in problem.get("ctx", {}) and problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    message = problem["msg"][0].lower() + problem["msg"][1:]
    received = repr(problem["input"])
    shown = received if len(received) <= 60 else received[:57] + "..."
    return f"{place}: {message}, received {shown}" if place else f"{message}, received {shown}"


def _require(
    name: str, value: float, *, at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    if not (math.isfinite(value) and at_least <= value < below and value > above):
        bounds = [f"at least {at_least}"] if at_least > -math.inf else []
        bounds += [f"above {above}"] if above > -math.inf else []
        bounds += [f"below {below}"] if below < math.inf else []
        raise ValueError(f"{name}: expected a finite number {' and '.join(bounds)}, received {value}.")
