"""`dwiml-func evaluate`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from dwiml_func._checks import check_number, pluralize
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.cli._summary import NO_PRINCIPAL_DIRECTION, format_degrees, format_reconstruction
from dwiml_func.cli._training import print_end
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.experiment.evaluation import ModelEvaluation, evaluate_model
from dwiml_func.experiment.folder import is_ensemble, member_folders, read_config
from dwiml_func.experiment.model_store import find_model, load_model
from dwiml_func.experiment.reconstruction import Reconstruction, reconstruction_of_subset
from dwiml_func.experiment.resume import resume_experiment
from dwiml_func.experiment.run_files import data_in_background
from dwiml_func.experiment.training_facts import TRAINED_ON, check_dataset
from dwiml_func.files.json import null_if_not_finite
from dwiml_func.files.lock import experiment_lock

__all__ = ["Options", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Print a model's loss and angular error over all streamlines of a subset, beside the errors of two baselines. Of
    an autoencoder, print the distance in mm between streamlines and their reconstructions. The streamlines are
    resampled as in the model's training, but not augmented.

    Example: dwiml-func evaluate experiments/first_run data.hdf5 --subset testing
    """

    model_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL_OR_EXPERIMENT_DIR")]
    """A model directory, or an experiment, for its best model."""
    hdf5_file: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[HDF5_FILE]")] = None
    """The dataset. None: that of the experiment."""
    write: bool = False
    """Write the evaluations and the figures of an experiment, or of the members of an ensemble, as the end of a
    training does, and print its summary. The other options do not count."""
    subset: Literal["training", "validation", "testing"] = "validation"
    """The subset of its subjects."""
    json: bool = False
    """Print only one JSON object."""
    input_group_name: str | None = None
    """Name of the input volume's group. None: that of the model's training."""
    streamline_group_name: str | None = None
    """Name of the streamlines' group. None: that of the model's training."""
    batch_size: int = 100
    """Number of streamlines in a batch."""
    lazy: bool = False
    """Read streamlines and volumes from the file when a batch needs them. It does not change the results."""
    cache_size: str = "2GB"
    """With --lazy: memory in which to keep volumes."""
    num_threads: int = 1
    """Number of CPU threads."""


def run(options: Options) -> int:
    """Evaluate the model and print the result."""
    check_number("batch_size", options.batch_size, at_least=1)
    check_number("num_threads", options.num_threads, at_least=1)
    torch.set_num_threads(options.num_threads)
    if options.write:
        return _write(Path(options.model_dir), options.hdf5_file)
    model = load_model(find_model(options.model_dir))
    path = options.hdf5_file or read_config(Path(options.model_dir)).hdf5_file
    dataset = open_dataset(
        path,
        options.subset,
        input_group_name=options.input_group_name or model.config.data.input_group_name,
        streamline_group_name=options.streamline_group_name or model.config.data.streamline_group_name,
        lazy=options.lazy,
        cache_size=options.cache_size,
    )
    if len(dataset.index.subjects) > 0:
        check_dataset(model.facts.get(TRAINED_ON, {}), dataset, source=path)
    if model.config.model.model == "autoencoder":
        result = reconstruction_of_subset(model, dataset, batch_size=options.batch_size)
    else:
        result = evaluate_model(model, dataset, batch_size=options.batch_size)
    if options.json:
        print(json.dumps({"subset": options.subset, **null_if_not_finite(asdict(result))}))
    elif isinstance(result, Reconstruction):
        print(format_reconstruction(result, subset=options.subset))
    else:
        print(_text(result, options.subset, len(dataset.index.subjects)))
    return 0


def _write(directory: Path, hdf5_file: str | None) -> int:
    for folder in member_folders(directory) if is_ensemble(directory) else [directory]:
        read_config(folder)  # before the lock makes a file there
        with experiment_lock(folder):
            parts, _, history = resume_experiment(folder, may_have_ended=True, hdf5_file=hdf5_file)
            if not history:
                raise ValueError(f"{folder} has no finished epoch yet. Expected at least one.")
            data_in_background(folder, parts.data, parts.config.hdf5_file)()
            print_end(folder, parts, history)
    return 0


def _text(result: ModelEvaluation, subset: str, num_subjects: int) -> str:
    compared = result.compared
    principal = compared.principal_direction
    lines = [
        f"{result.num_streamlines} streamlines of {pluralize(num_subjects, f'{subset} subject')}",
        f"Mean loss at {result.num_points} points: {result.loss:.6g}",
        f"Mean angular error at all points that have a next direction: {result.angular_error:.2f} deg",
        f"Mean angular error at the {compared.num_points} points that have a previous direction too:",
        f"  model                {format_degrees(compared.model)}",
        "  principal direction  " + (NO_PRINCIPAL_DIRECTION if principal is None else format_degrees(principal)),
        f"  keep going straight  {format_degrees(compared.keep_straight)}",
    ]
    if result.window_lag is not None:
        lines.append(f"Window lag (up to 60 mm of a streamline are read, 20 mm predicted): {result.window_lag:.2f} mm")
    return "\n".join(lines)
