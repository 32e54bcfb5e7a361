"""`dwiml-func plot`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dwiml_func.cli._output import folders_above
from dwiml_func.cli._parsing import parse
from dwiml_func.experiment.folder import ENSEMBLE_FILE, is_ensemble, member_folders
from dwiml_func.experiment.plots import check_format, draw_experiments, save_figure

__all__ = ["PlotOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Draw experiments over each other: losses with the best epoch, angular errors with the baselines, gradient norms
    before and after clipping, learning rates, and points per second. The legend tells what differs in their options.

    Example: dwiml-func plot experiments/first_run experiments/second_run --out runs.png
    """

    experiment_dirs: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_DIR [EXPERIMENT_DIR ...]")
    ]
    """The experiments' folders; that of an ensemble stands for its members."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """The picture; its name ends in .png, .svg or .pdf, and folders above it are made. None: plots/training.png of the
    experiment, or runs.png here for several."""


def run(arguments: Sequence[str], program: str) -> int:
    """Run the command.

    Args:
        arguments: the command line.
        program: the program's name in messages.

    Returns:
        The exit code, 0.

    Raises:
        ValueError, OSError: there is nothing to draw, or the picture cannot be written.

    Example:
        >>> run(["experiments/first_run"], "dwiml-func plot")  # doctest: +SKIP
    """
    options = parse(PlotOptions, arguments, program)
    if not options.experiment_dirs:
        raise ValueError("EXPERIMENT_DIR is missing. Received: nothing")
    given = [Path(directory) for directory in options.experiment_dirs]
    given = [path for path in given if path.name != ENSEMBLE_FILE]  # it is among the members in ENSEMBLE/*
    directories = [folder for path in given for folder in (member_folders(path) if is_ensemble(path) else [path])]
    out = Path("runs.png" if options.out is None else options.out)
    check_format(out)
    figure = draw_experiments(directories)
    if options.out is None and len(given) == 1:
        out = given[0] / "plots" / "training.png"
    with folders_above(out):
        save_figure(figure, out)
    print(out)
    return 0
