"""`dwiml-func verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.retention import kept_checkpoints
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.verify import Verification, verify_epoch
from dwiml_func.writers.progress import Progress

__all__ = ["Options", "format_verification", "run"]

_NO_DIGEST = "but no state was compared, because no checkpoint was saved after this epoch"


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Train an epoch again from the checkpoint before it, on the same data, and check that state and metrics are
    bitwise identical to the recorded ones. If so, print one line; the exit code is 0. Otherwise print what
    differs; the exit code is 1. Nothing is written.

    Example: dwiml-func verify experiments/first_run --epoch 3
    """

    experiment_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_DIR")]
    """The experiment's folder."""
    epoch: int | None = None
    """The epoch to verify, counted from 1. None: the last recorded one."""
    hdf5_file: str | None = None
    """The dataset, if it was moved. None: the recorded path."""


def run(options: Options) -> int:
    """Train the epoch again and compare. Returns 1 when something differs."""
    directory = Path(options.experiment_dir)
    if list_checkpoints(directory) and not (directory / "config.json").is_file():
        raise ValueError(
            f"{options.experiment_dir} was saved by a script, whose functions are not recorded. "
            "Verify it in Python with them: dwiml_func.verify(directory, train=..., step=..., learning_rate=...)."
        )
    progress = Progress(max_epochs=read_config(directory).training.max_epochs)
    with kept_checkpoints(options.experiment_dir):  # of a run that is being trained
        verification = verify_epoch(
            options.experiment_dir, epoch=options.epoch, hdf5_file=options.hdf5_file, track=progress.track
        )
    print(format_verification(verification, options.experiment_dir))
    return 1 if verification.problems else 0


def format_verification(verification: Verification, directory: str) -> str:
    """One line when all is equal, else one line per difference."""
    start = "the first state" if verification.start is None else f"checkpoint {verification.start}"
    head = f"{directory}: epoch {verification.epoch}"
    if verification.is_replayed:
        head += f", replayed from {start},"
    if verification.problems:
        lines = (*verification.problems, *verification.context)
        return "\n".join([f"{head} differs from the recorded epoch.", *(f"  {line}" for line in lines)])
    text = f"{head} is bitwise identical to the recorded epoch: {verification.num_values} numbers of its report, "
    text += f"state {verification.digest}" if verification.digest else _NO_DIGEST
    return f"{text} (different: {'; '.join(verification.context)})" if verification.context else text
