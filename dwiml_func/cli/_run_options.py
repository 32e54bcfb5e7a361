"""The options of a run, for `train` and `fork`: from the command line, from `--config`, or to suit the example data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dwiml_func._checks import truncated_repr
from dwiml_func.data.config import BatchConfig, DataConfig
from dwiml_func.dwi_ml.parameters import parameters_of
from dwiml_func.experiment.config import CheckpointConfig, LoggingConfig, RunConfig, config_from_json
from dwiml_func.experiment.training_config import WINDOW_LAG, TrainingConfig
from dwiml_func.files.json import parse_json, read_config_file
from dwiml_func.models.config import ModelConfig

__all__ = [
    "RunOptions",
    "check_for_dwi_ml",
    "example_options",
    "kept_example_options",
    "options_for_dwi_ml",
    "read_config_part",
]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The parts of a run's config; each of their fields is an option of the command line."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batches: BatchConfig = field(default_factory=BatchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def parts(self) -> dict[str, Any]:
        """The parts by name."""
        return {part.name: getattr(self, part.name) for part in fields(RunOptions)}

    def to_config(self, hdf5_file: str | Path) -> RunConfig:
        """The config of a run with these options; the dataset's path is made absolute."""
        return RunConfig(hdf5_file=str(Path(hdf5_file).absolute()), **self.parts)

    def for_command_line(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The parts as defaults of a command line, whose rules replace the others as its other options do."""
        gives_rules = any(argument.partition("=")[0] == "--rule" for argument in arguments)
        training = replace(self.training, rule=()) if gives_rules else self.training
        return {**self.parts, "training": training}

    @classmethod
    def from_config(cls, config: RunConfig) -> RunOptions:
        """The inverse of `to_config`, except for the dataset."""
        return RunOptions(**{part.name: getattr(config, part.name) for part in fields(RunOptions)})


def read_config_part(path: str | Path, base: RunOptions) -> tuple[RunOptions, str | None]:
    """Read a `config.json`, or a part of one, on top of `base`. Returns the options, and the dataset if it names one.

    `origin` and `padded_lengths`, which are recorded and no options, are left out.
    """
    source = f"--config {path}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{source}: this is not a file. Expected a config.json, or a part of one.")
    given = parse_json(read_config_file(Path(path), source=source), source=source)
    if not isinstance(given, dict):
        raise ValueError(f"{source}: Expected a JSON object. Received: {truncated_repr(given)}.")
    for name in ("origin", "padded_lengths"):
        given.pop(name, None)
    merged = {"hdf5_file": "", **asdict(base)}
    for name, value in given.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **value} if both else value
    config = config_from_json(json.dumps(merged), source=source)
    return RunOptions.from_config(config), config.hdf5_file or None


def example_options(
    dg_key: str = "cosine-regression", model: str = "learn2track", monitor: str = WINDOW_LAG
) -> RunOptions:
    """The options for the built-in example data, where the user gives no others: a recipe that tracks.

    Steps of a voxel, a voxel of noise on the points that the model sees, streamlines of both orientations, a low rate
    at the end and averaged weights. The window lag chooses the best epoch, as the loss does not rank models as they
    track. The defaults of the options are dwi_ml's, for far larger datasets. Sphere classification needs larger steps
    of the optimizer, as the data contain few examples of each of its 724 classes. An autoencoder, which reads no
    directions, has options of its own.
    """
    if model == "autoencoder":
        return RunOptions(
            training=TrainingConfig(max_epochs=60, learning_rate=("cosine 0.001 60",), weight_decay=0.0),
            model=ModelConfig(model=model, first_channels=16),
            batches=BatchConfig(batch_size_training=10),
        )
    if dg_key == "sphere-classification":
        return RunOptions(
            training=TrainingConfig(
                max_epochs=30, learning_rate=("0.005*20 0.001",), weight_decay=0.0, clip_grad=1.0, monitor=monitor
            ),
            model=_example_model(model, use_skip_connection=True),
            batches=BatchConfig(batch_size_training=10, step_size=2.0, reverse_ratio=0.5),
        )
    rate = "0.002*24 0.001*14 0.0005*10 0.0002*8 0.0001"
    return RunOptions(
        training=TrainingConfig(
            max_epochs=60, learning_rate=(rate,), weight_decay=0.0, clip_grad=1.0, ema=0.998, monitor=monitor
        ),
        model=_example_model(model),
        batches=BatchConfig(batch_size_training=10, step_size=2.0, noise_gaussian_size_forward=1.0, reverse_ratio=0.5),
    )


def _example_model(model: str, *, use_skip_connection: bool = False) -> ModelConfig:
    if model == "learn2track":
        return ModelConfig(nb_previous_dirs=1, use_skip_connection=use_skip_connection)
    sizes = {"input_embedded_size": 64, "target_embedded_size": 64 if model == "ttst" else None}
    return ModelConfig(model=model, n_layers_e=3, **sizes)  # pyright: ignore[reportArgumentType]


def options_for_dwi_ml(options: RunOptions) -> RunOptions:
    """The options of a model for dwi_ml's tracker: its interpolation, and its rule of steps."""
    return replace(
        options,
        data=replace(options.data, interpolation="trilinear-corner"),
        batches=replace(options.batches, step_rule="dwi_ml"),
    )


def check_for_dwi_ml(config: RunConfig) -> str:
    """What a run for dwi_ml has, for the user; ValueError where dwi_ml's tracker could not use its model."""
    if config.data.interpolation != "trilinear-corner":
        raise ValueError(
            "for_dwi_ml: expected interpolation trilinear-corner, the only one of dwi_ml's tracker. "
            f"Received: {config.data.interpolation}. Leave --interpolation out."
        )
    if config.batches.step_rule != "dwi_ml":
        raise ValueError(
            f"for_dwi_ml: expected step_rule dwi_ml. Received: {config.batches.step_rule}. Leave --step-rule out."
        )
    parameters_of(config, nb_features=1, experiment_name="")
    return "For dwi_ml's tracker, with --interpolation trilinear-corner --step-rule dwi_ml"


def kept_example_options(options: RunOptions) -> list[str]:
    """The options of a run that come from `example_options`, as on a command line."""
    defaults, example = RunOptions().parts, example_options(options.model.dg_key, options.model.model).parts
    kept = []
    for part, values in options.parts.items():
        for each in fields(values):
            value = getattr(values, each.name)
            if value == getattr(example[part], each.name) != getattr(defaults[part], each.name):
                kept.append(f"--{each.name.replace('_', '-')}")
                kept += [] if value is True else [_text(value)]
    return kept


def _text(value: Any) -> str:
    """A value as on a command line."""
    if isinstance(value, tuple):
        return " ".join(value)
    return value if isinstance(value, str) else f"{value:g}"
