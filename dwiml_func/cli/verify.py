"""`dwiml-func verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dwiml_func.cli._parsing import parse
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.verify import Verification, verify_epoch
from dwiml_func.writers.progress import Progress

__all__ = ["VerifyOptions", "format_verification", "run"]

_NO_DIGEST = "but no digest of the state, which is not on record, for no checkpoint was due"


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Train an epoch again from the checkpoint before it, on the recorded data, and compare state and metrics with the
    record, bit for bit. One line and exit code 0 when all is equal; else exit code 1 and what differs. Nothing is
    written.

    Example: dwiml-func verify experiments/first_run --epoch 3
    """

    experiment_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_DIR")]
    """The experiment's folder."""
    epoch: int | None = None
    """Which epoch; 1 is the first. None: the last one on record."""
    hdf5_file: str | None = None
    """Where the dataset is, if it has moved. None: where it was."""


def run(arguments: Sequence[str], program: str) -> int:
    """Run the command.

    Args:
        arguments: the command line.
        program: the program's name in messages.

    Returns:
        The exit code: 0 when all is equal, 1 when something is not.

    Raises:
        ValueError, OSError: the replay cannot begin.

    Example:
        >>> run(["experiments/first_run"], "dwiml-func verify")  # doctest: +SKIP
    """
    options = parse(VerifyOptions, arguments, program)
    progress = Progress(max_epochs=read_config(Path(options.experiment_dir)).training.max_epochs)
    verification = verify_epoch(
        options.experiment_dir, epoch=options.epoch, hdf5_file=options.hdf5_file, track=progress.track
    )
    print(format_verification(verification, options.experiment_dir))
    return 1 if verification.problems else 0


def format_verification(verification: Verification, directory: str) -> str:
    """What a replay showed, as text.

    Args:
        verification: what it showed.
        directory: the experiment.

    Returns:
        One line when all is equal; else a line for each thing that is not.

    Example:
        >>> print(format_verification(verify_epoch("run"), "run"))  # doctest: +SKIP
    """
    start = "the first state" if verification.start is None else f"checkpoint {verification.start}"
    head = f"{directory}: epoch {verification.epoch}"
    if verification.is_replayed:
        head += f", replayed from {start},"
    if verification.problems:
        lines = (*verification.problems, *verification.surroundings)
        return "\n".join([f"{head} is not as recorded.", *(f"  {line}" for line in lines)])
    text = f"{head} is equal to the record bit for bit: {verification.num_values} numbers of its report, "
    text += f"state {verification.digest}" if verification.digest else _NO_DIGEST
    return f"{text} (different: {'; '.join(verification.surroundings)})" if verification.surroundings else text
