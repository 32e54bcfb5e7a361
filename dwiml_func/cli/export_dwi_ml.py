"""`dwiml-func export-dwi-ml`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from dwiml_func.cli._output import new_folder
from dwiml_func.cli._parsing import parse
from dwiml_func.dwi_ml.models import shift_warning, write_dwi_ml_model
from dwiml_func.experiment.model_store import find_model, load_model

__all__ = ["ExportOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a model in dwi_ml's files, for its scripts to track with and to look at. They expect it in a folder called
    best_model. Train with --interpolation trilinear-corner for that, which is how they read volumes.

    Example: dwiml-func export-dwi-ml experiments/first_run exported/best_model
    """

    experiment_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_DIR")]
    """An experiment, whose best model is taken, or a model directory."""
    out_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_DIR")]
    """The new folder; those above it are made too."""


def run(arguments: Sequence[str], program: str) -> int:
    """Run the command.

    Args:
        arguments: the command line.
        program: the program's name in messages.

    Returns:
        The exit code, 0.

    Raises:
        ValueError, OSError: there is no such model, dwi_ml cannot run it, or the new folder cannot be made.

    Example:
        >>> run(["experiments/first_run", "exported"], "dwiml-func export-dwi-ml")  # doctest: +SKIP
    """
    options = parse(ExportOptions, arguments, program)
    with new_folder(options.out_dir) as out_dir:
        path = find_model(options.experiment_dir)
        model = load_model(path)
        experiment = path.parent if path.name == "best_model" else path
        write_dwi_ml_model(out_dir, model, experiment_name=experiment.resolve().name)
    warning = shift_warning(model.config)
    if warning is not None:
        print(f"{program}: warning: {warning}", file=sys.stderr)
    print(out_dir)
    return 0
