"""`dwiml-func digest`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.cli._parsing import parse
from dwiml_func.experiment.folder import is_ensemble, member_folders

__all__ = ["DigestOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class DigestOptions:
    """Print the SHA-256 of an experiment's latest training state, computed from the bytes on disk; of an
    ensemble those of its members, a line each.

    Example: dwiml-func digest experiments/first_run
    """

    experiment_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_DIR")]
    """The experiment's folder."""


def run(arguments: Sequence[str], program: str) -> int:
    """Run the command.

    Args:
        arguments: the command line.
        program: the program's name in messages.

    Returns:
        The exit code, 0.

    Raises:
        ValueError, OSError: there is no checkpoint, or it is corrupt.

    Example:
        >>> run(["experiments/first_run"], "dwiml-func digest")  # doctest: +SKIP
    """
    options = parse(DigestOptions, arguments, program)
    directory = Path(options.experiment_dir)
    folders = member_folders(directory) if is_ensemble(directory) else [directory]
    for folder in folders:
        print(state_digest(read(folder).state))
    return 0
