"""`dwiml-func info`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from dwiml_func.cli._output import folders_above
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.data.inspection.inspect import inspect_dataset
from dwiml_func.data.inspection.report import format_inspection
from dwiml_func.experiment.figures.dataset import draw_dataset
from dwiml_func.experiment.figures.plots import check_format, save_figure

__all__ = ["Options", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Print what an HDF5 dataset contains and what is wrong with it. The exit code is 1 when something is wrong.

    Example: dwiml-func info data.hdf5 --figure data.png
    """

    hdf5_file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE.hdf5")]
    """The dataset."""
    figure: Annotated[str | None, tyro.conf.arg(metavar="FILE", aliases=["--picture"])] = None
    """Also draw the dataset into this file, ending in .png, .svg or .pdf: the streamlines of up to four subjects over
    the first volume in three views, in the colours of their bundles, and the lengths of all. None: no figure."""


def run(options: Options) -> int:
    """Print what the dataset contains. Returns 1 when something is wrong with it."""
    if options.figure is not None:
        check_format(options.figure)
    inspection = inspect_dataset(options.hdf5_file)
    print(format_inspection(inspection))
    if options.figure is not None:
        with folders_above(options.figure) as path:
            save_figure(draw_dataset(inspection), path)
        print(path)
    return 1 if inspection.problems else 0
