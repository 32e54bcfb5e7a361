"""The options that describe a run: of `train`, and of what else starts one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from dwiml_func._checks import truncated_repr
from dwiml_func.experiment.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    config_from_json,
)
from dwiml_func.files.json import parse_json, read_config_file

__all__ = ["RUN_SUBJECTS", "RunOptions", "read_config_part"]

RUN_SUBJECTS: Mapping[str, tuple[str, ...]] = {
    "Training": ("training",),
    "Model": ("model",),
    "Direction getter": (
        *("dg_key", "dg_dropout", "dg_sphere", "add_entropy_to_gauss", "dg_nb_gaussians", "dg_nb_clusters"),
        *("normalize_targets", "normalize_outputs", "add_eos", "eos_weight"),
    ),
    "Batches": ("batches",),
    "Resampling": ("step_size", "step_rule", "nb_points", "compress"),
    "Augmentation of training batches": (
        *("noise_gaussian_size_forward", "noise_gaussian_size_loss", "split_ratio", "reverse_ratio"),
    ),
    "Data": ("data",),
    "Machine": ("use_gpu", "num_threads", "processes", "compile", "precision", "lazy", "cache_size"),
    "Checkpoints": ("checkpoints",),
    "Logs": ("logging",),
}
"""How the help groups the options of a run: titles, and names of options or of parts of the config."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The parts of a run's config, each option of which is an option of the command line.

    Example:
        >>> RunOptions().to_config("data.hdf5").training.max_epochs
        100
    """

    training: TrainingConfig = field(default_factory=TrainingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batches: BatchConfig = field(default_factory=BatchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def to_config(self, hdf5_file: str | Path) -> RunConfig:
        """The config of a run with these options.

        Args:
            hdf5_file: the dataset.

        Returns:
            The config; the dataset's path is absolute.

        Raises:
            ValueError: the model cannot learn from such data.
        """
        parts = {part.name: getattr(self, part.name) for part in fields(RunOptions)}
        return RunConfig(hdf5_file=str(Path(hdf5_file).absolute()), **parts)

    @classmethod
    def from_config(cls, config: RunConfig) -> RunOptions:
        """The inverse of `to_config`, but for the dataset.

        Args:
            config: a run's config.

        Returns:
            Its options.
        """
        return RunOptions(**{part.name: getattr(config, part.name) for part in fields(RunOptions)})


def read_config_part(path: str | Path, base: RunOptions) -> tuple[RunOptions, str | None]:
    """Read a `config.json`, or a part of one: what it leaves out is taken from elsewhere.

    Args:
        path: the JSON file. `origin`, which a forked run has, is not taken over: a run that starts anew has none.
        base: where the options come from that the file leaves out.

    Returns:
        The options, and the dataset, if the file names one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON or larger than any config, or names a key twice, or has an unknown option, or a value
            of the wrong type or out of range.

    Example:
        >>> read_config_part("/no/such/config.json", RunOptions())
        Traceback (most recent call last):
        ...
        FileNotFoundError: --config /no/such/config.json: this is not a file. Expected a config.json, or a part of one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config {path}: this is not a file. Expected a config.json, or a part of one.")
    source = f"--config {path}"
    given = parse_json(read_config_file(Path(path), source=source), source=source)
    if not isinstance(given, dict):
        raise ValueError(f"{source}: expected a JSON object, received {truncated_repr(given)}.")
    given.pop("origin", None)
    merged = {"hdf5_file": "", **asdict(base)}
    for name, value in given.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **value} if both else value
    config = config_from_json(json.dumps(merged), source=source)
    return RunOptions.from_config(config), config.hdf5_file or None
