"""`dwiml-func info`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.data.inspection.inspect import inspect_dataset
from dwiml_func.data.inspection.report import format_inspection

__all__ = ["Options", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Print what an HDF5 dataset contains and what is wrong with it. The exit code is 1 when something is wrong.

    Example: dwiml-func info data.hdf5
    """

    hdf5_file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE.hdf5")]
    """The dataset."""


def run(options: Options) -> int:
    """Print what the dataset contains. Returns 1 when something is wrong with it."""
    inspection = inspect_dataset(options.hdf5_file)
    print(format_inspection(inspection))
    return 1 if inspection.problems else 0
