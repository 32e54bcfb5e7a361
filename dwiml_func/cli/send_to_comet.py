"""`dwiml-func send-to-comet`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.cli._parsing import parse
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.logs import experiment_comet

__all__ = ["SendToCometOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class SendToCometOptions:
    """Send an experiment's logs to Comet: parameters, and the metrics of all epochs up to the newest checkpoint. What is
    there already is not sent again. Without an API key or a network, and with --offline, they are archived in
    logs/comet, for `comet upload`.

    Example: dwiml-func send-to-comet experiments/first_run --comet-project tracking
    """

    experiment_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_DIR")]
    """The experiment's folder."""
    comet_workspace: str | None = None
    """Comet workspace. None: that of the experiment, or else the account's own."""
    comet_project: str | None = None
    """Comet project. None: that of the experiment, or else Comet's project for runs without one."""
    offline: bool = False
    """Write an archive, even where the logs could be sent."""


def run(arguments: Sequence[str], program: str) -> int:
    """Run the command.

    Args:
        arguments: the command line.
        program: the program's name in messages.

    Returns:
        The exit code: 0, or 1 when it failed; a warning says why.

    Raises:
        ValueError, OSError: there is no such experiment, or nothing to send.

    Example:
        >>> run(["experiments/first_run", "--offline"], "dwiml-func send-to-comet")  # doctest: +SKIP
    """
    options = parse(SendToCometOptions, arguments, program)
    directory = Path(options.experiment_dir)
    config, checkpoint = read_config(directory), newest(directory)
    if checkpoint is None or not checkpoint.history:
        raise ValueError(f"{directory} has no epoch on record yet. Expected one that has been finished and saved.")
    given = {"workspace": options.comet_workspace, "project": options.comet_project}
    places = {name: value for name, value in given.items() if value is not None}
    comet = experiment_comet(directory, config, offline=options.offline, patience=600.0, **places)
    place = comet.send(*checkpoint.history)
    if place is None:
        return 1
    print(place)
    return 0
