"""`dwiml-func send-to-comet`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.logs import experiment_comet

__all__ = ["Options", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Send an experiment's logs to Comet: parameters, and the metrics of all epochs up to the newest checkpoint. Epochs
    that Comet already has are not sent again. Without an API key or a network, and with --offline, the logs are
    archived in logs/comet, for `comet upload`.

    Example: dwiml-func send-to-comet experiments/first_run --comet-project tracking
    """

    experiment_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_DIR")]
    """The experiment's folder."""
    comet_workspace: str | None = None
    """Comet workspace. None: that of the experiment, or else the account's default."""
    comet_project: str | None = None
    """Comet project. None: that of the experiment, or else Comet's project for runs without one."""
    offline: bool = False
    """Write an archive even if the logs could be sent."""


def run(options: Options) -> int:
    """Send the logs. Returns 1 when that failed; a warning says why."""
    directory = Path(options.experiment_dir)
    config, checkpoint = read_config(directory), newest(directory)
    if checkpoint is None or not checkpoint.history:
        raise ValueError(f"{directory} has no saved epoch yet. Train and save at least one epoch first.")
    given = {"workspace": options.comet_workspace, "project": options.comet_project}
    changes = {name: value for name, value in given.items() if value is not None}
    comet = experiment_comet(directory, config, offline=options.offline, patience=600.0, **changes)
    address = comet.send(*checkpoint.history)
    if address is None:
        return 1
    print(address)
    return 0
