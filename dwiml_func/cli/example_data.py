"""`dwiml-func example-data`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from dwiml_func.cli._output import folders_above
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.data.example.dataset import make_example_data
from dwiml_func.data.example.settings import DEFAULT_SETTINGS, ExampleSettings

__all__ = ["Options", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Write the built-in example data: real streamlines of five people, with a simulated diffusion signal.

    Example: dwiml-func example-data example.hdf5
    """

    out_hdf5: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.hdf5")]
    """Output HDF5 file; missing folders are made."""
    overwrite: bool = False
    """Replace an existing file."""
    settings: ExampleSettings = DEFAULT_SETTINGS


def run(options: Options) -> int:
    """Write the file."""
    with folders_above(options.out_hdf5) as path:
        make_example_data(path, settings=options.settings, overwrite=options.overwrite)
    print(f"{options.out_hdf5}: three training subjects, one validation and one testing subject")
    return 0
