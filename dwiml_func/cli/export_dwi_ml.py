"""`dwiml-func export-dwi-ml`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated

import tyro

from dwiml_func.cli._output import new_folder
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.dwi_ml.models import shift_warning, write_dwi_ml_model
from dwiml_func.experiment.model_store import find_model, load_model

__all__ = ["Options", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Write a model as dwi_ml's files, so that dwi_ml's scripts can load it and track with it. They expect it in a
    folder called best_model. They interpolate half a voxel off, so train with --for-dwi-ml.

    Example: dwiml-func export-dwi-ml experiments/first_run exported/best_model
    """

    experiment_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_DIR")]
    """A model directory, or an experiment, for its best model."""
    out_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_DIR")]
    """The new folder; missing folders above it are made."""


def run(options: Options) -> int:
    """Write the folder."""
    with new_folder(options.out_dir) as out_dir:
        path = find_model(options.experiment_dir)
        model = load_model(path)
        experiment = path.parent if path.name == "best_model" else path
        write_dwi_ml_model(out_dir, model, experiment_name=experiment.resolve().name)
    warning = shift_warning(model.config)
    if warning is not None:
        logging.getLogger(__name__).warning("%s", warning)
    print(out_dir)
    return 0
