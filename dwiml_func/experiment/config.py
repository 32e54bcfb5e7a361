"""The config of a run: frozen dataclasses that are the command line, `config.json` and part of each checkpoint.

The field docstrings are the help texts of the command line. Names and defaults are those of dwi_ml's training scripts.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from dwiml_func._checks import STRICT, check_number, error_text
from dwiml_func.checkpoint.retention import check_keep
from dwiml_func.core.interval import Interval, parse_interval
from dwiml_func.data.config import BatchConfig, DataConfig
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.files.json import parse_json
from dwiml_func.models.autoencoder.config import DEFAULT_NB_POINTS
from dwiml_func.models.config import ModelConfig, check_model

__all__ = ["CheckpointConfig", "LoggingConfig", "Origin", "RunConfig", "config_from_json"]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved, which are kept, which steps are checked. These options cannot change results."""

    __pydantic_config__: ClassVar = STRICT

    checkpoint_every: str = "1epoch"
    """Interval between checkpoints: "50batches" or "10minutes" (also saves at each epoch's end), or "3epochs" (also
    saves at each best epoch)."""
    keep: int | str = 2
    """Number of latest checkpoints at an epoch's end to keep besides that of the best epoch; "every:5" keeps two, and
    that of every fifth epoch, for audits; or all."""
    check_every: int | None = None
    """Compute every so many steps twice, and take it only if both results are bitwise identical: it finds faulty
    memory and processors. None: no step."""

    def __post_init__(self) -> None:
        check_number("check_every", self.check_every, at_least=1)
        check_keep(self.keep)
        _ = self.save_interval

    @property
    def save_interval(self) -> Interval:
        """How often to save."""
        return parse_interval(self.checkpoint_every, name="checkpoint_every")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is logged besides the files that every run has. These options cannot change the results."""

    __pydantic_config__: ClassVar = STRICT

    comet_workspace: str | None = None
    """Comet workspace. With this option or --comet-project, Comet logs the run: online with an API key (COMET_API_KEY
    or comet's config) and a network, otherwise as an archive in logs/comet. None: the default workspace of the
    account."""
    comet_project: str | None = None
    """Comet project. None: Comet's default project."""
    tensorboard: bool = False
    """Also write logs/tensorboard; requires the package tensorboard."""
    log_every: int | None = None
    """Also log training loss, gradient norms and learning rate of every so many batches, in logs/steps.jsonl and where
    else the run is logged. None: only epochs are logged."""
    skip_figures: bool = False
    """Draw no figures at the end of the training; `dwiml-func plot` draws them at any time."""

    def __post_init__(self) -> None:
        check_number("log_every", self.log_every, at_least=1)

    @property
    def uses_comet(self) -> bool:
        """Whether Comet logs the run. An API key alone sends nothing."""
        return self.comet_workspace is not None or self.comet_project is not None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The source of a forked run: the experiment, the checkpoint's name and the digest of its state.

    `start_digest` is that of the fork's first state. It differs where optimizer state, seed or best epoch were reset.
    With `weights_only` the run was only initialized from the source: `checkpoint` is the run's own first one, `digest`
    that of the weights that were loaded.
    """

    __pydantic_config__: ClassVar = STRICT

    experiment: str
    checkpoint: str
    digest: str
    start_digest: str
    weights_only: bool = False


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The complete config of a run.

    `origin` is None unless it was forked. `padded_lengths` are the lengths to which its batches are padded, fixed by
    its dataset when it started; None for a run that does not pad.
    """

    __pydantic_config__: ClassVar = STRICT

    hdf5_file: str
    data: DataConfig = field(default_factory=DataConfig)
    batches: BatchConfig = field(default_factory=BatchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    origin: Origin | None = None
    padded_lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.padded_lengths is not None:
            check_number("padded_lengths", min(self.padded_lengths, default=0), at_least=1)
        if self.model.model == "autoencoder":
            _check_training_of_autoencoder(self.training, self.model)
            if self.batches.nb_points is None and self.batches.step_size is None and self.batches.compress is None:
                object.__setattr__(self, "batches", replace(self.batches, nb_points=DEFAULT_NB_POINTS))
        check_model(self.model, self.data, self.batches)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON data: nested dicts."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        """The config as JSON text, for `config_from_json`."""
        return json.dumps(asdict(self), indent=2) + "\n"


def _check_training_of_autoencoder(training: TrainingConfig, model: ModelConfig) -> None:
    """Raise ValueError for options of tracking, and for shards whose losses do not add up to that of the batch."""
    names = ("add_a_tracking_validation_phase", "tracking_mask", "tracking_phase_frequency")
    names = (*names, "tracking_phase_nb_segments_init")
    given = [name for name in names if getattr(training, name) != getattr(TrainingConfig, name)]
    if training.monitor.startswith("tracking_"):
        given.append(f"monitor {training.monitor}")
    if given:
        raise ValueError(f"{', '.join(given)}: an autoencoder does not track. Leave it out.")
    if model.reconstruction_loss == "sum" and training.num_shards > 1:
        raise ValueError("reconstruction_loss: with num_shards above 1, expected mean, received sum.")


def config_from_json(text: str | bytes, *, source: str = "config.json") -> RunConfig:
    """Read a config strictly: every key known, every value of the right type and in range.

    ValueError with one line that names each wrong place, in the file that `source` names.
    """
    import pydantic

    try:
        config = _reader().validate_json(text)
    except pydantic.ValidationError as error:
        raise ValueError(f"{source}: {error_text(error)}.") from None
    parse_json(text, source=source)  # pydantic takes the last of two values under one key
    return config


@functools.cache
def _reader() -> Any:
    import pydantic

    return pydantic.TypeAdapter(RunConfig)
