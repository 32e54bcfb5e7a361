"""`dwiml-func example-data`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from dwiml_func.cli._output import folders_above
from dwiml_func.cli._parsing import parse
from dwiml_func.data.example.dataset import make_example_data

__all__ = ["ExampleDataOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class ExampleDataOptions:
    """Write the built-in example data: real streamlines of five people, with a diffusion signal simulated along them.

    Example: dwiml-func example-data example.hdf5
    """

    out_hdf5: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.hdf5")]
    """Where the dataset shall appear; folders above it are made."""
    overwrite: bool = False
    """Replace an existing file."""


def run(arguments: Sequence[str], program: str) -> int:
    """Run the command.

    Args:
        arguments: the command line.
        program: the program's name in messages.

    Returns:
        The exit code, 0.

    Raises:
        ValueError, OSError: the file exists, or a folder above it cannot be made.

    Example:
        >>> run(["example.hdf5"], "dwiml-func example-data")  # doctest: +SKIP
    """
    options = parse(ExampleDataOptions, arguments, program)
    with folders_above(options.out_hdf5) as path:
        make_example_data(path, overwrite=options.overwrite)
    print(f"{options.out_hdf5}: three training subjects, one validation and one testing subject")
    return 0
