"""`dwiml-func digest`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.checkpoint.retention import kept_checkpoints
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.experiment.folder import is_ensemble, member_folders

__all__ = ["Options", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Print the SHA-256 of an experiment's latest training state, computed from the bytes on disk. For an ensemble,
    print one line per member.

    Example: dwiml-func digest experiments/first_run
    """

    experiment_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_DIR")]
    """The experiment's folder."""


def run(options: Options) -> int:
    """Print the digests."""
    directory = Path(options.experiment_dir)
    folders = member_folders(directory) if is_ensemble(directory) else [directory]
    for folder in folders:
        with kept_checkpoints(folder):  # of a run that is being trained
            digest = state_digest(read(folder).state)
        print(digest)
    return 0
