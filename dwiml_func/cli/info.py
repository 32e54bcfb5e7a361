"""`dwiml-func info`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from dwiml_func.cli._parsing import parse
from dwiml_func.data.inspection.inspect import inspect_dataset
from dwiml_func.data.inspection.report import format_inspection

__all__ = ["InfoOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Print what an HDF5 dataset holds, and what is wrong with it if something is; the exit code is 1 then.

    Example: dwiml-func info data.hdf5
    """

    hdf5_file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE.hdf5")]
    """The dataset."""


def run(arguments: Sequence[str], program: str) -> int:
    """Run the command.

    Args:
        arguments: the command line.
        program: the program's name in messages.

    Returns:
        The exit code: 0, or 1 when something is wrong with the dataset.

    Raises:
        ValueError, OSError: the file cannot be read at all.

    Example:
        >>> run(["data.hdf5"], "dwiml-func info")  # doctest: +SKIP
    """
    options = parse(InfoOptions, arguments, program)
    inspection = inspect_dataset(options.hdf5_file)
    print(format_inspection(inspection))
    return 1 if inspection.problems else 0
