"""`dwiml-func verify`."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dwiml_func._checks import check_number, pluralize
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.retention import kept_checkpoints
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.experiment.audit.audit import Audit, audit_experiment
from dwiml_func.experiment.audit.ensemble import audit_ensemble
from dwiml_func.experiment.audit.replay import Verification
from dwiml_func.experiment.audit.verify import verify_epoch
from dwiml_func.experiment.folder import is_ensemble, member_folders, read_config
from dwiml_func.writers.progress import Progress

__all__ = ["Options", "format_audit", "format_verification", "run"]

_MOST = 12  # problems that are printed
_SHARES = (0.01, 0.05, 0.1, 0.5)
_NO_DIGEST = "but no state was compared, because no checkpoint was saved after this epoch"


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Train an epoch again from the checkpoint before it, on the same data, and check that state and metrics are
    bitwise identical to the recorded ones. If so, print one line; the exit code is 0. Otherwise print what
    differs; the exit code is 1. Nothing is written.

    With --all or --sample, audit the whole experiment.

    Example: dwiml-func verify experiments/first_run --epoch 3
    """

    experiment_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_DIR")]
    """The experiment's folder."""
    epoch: int | None = None
    """The epoch to verify, counted from 1. None: the last recorded one."""
    all: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Audit the whole experiment: check what was recorded, and train every epoch again. An epoch is trained from the
    nearest checkpoint before it; with `train --keep every:5` or `--keep all`, several processes share them."""
    sample: Annotated[int | None, tyro.conf.arg(metavar="K")] = None
    """Audit what was recorded, and K epochs that are chosen at random. None: no sample."""
    jobs: Annotated[int | None, tyro.conf.arg(aliases=["-j"])] = None
    """Number of processes of an audit. None: as many as there are CPUs for their threads."""
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
    if options.all or options.sample is not None or options.jobs is not None:
        return _audit(directory, options)
    if is_ensemble(directory):
        raise ValueError(
            f"{options.experiment_dir} is an ensemble, whose epochs are verified together. "
            "Give --all, or --sample K for K of them."
        )
    progress = Progress(max_epochs=read_config(directory).training.max_epochs)
    with kept_checkpoints(options.experiment_dir):  # of a run that is being trained
        verification = verify_epoch(
            options.experiment_dir, epoch=options.epoch, hdf5_file=options.hdf5_file, track=progress.track
        )
    print(format_verification(verification, options.experiment_dir))
    return 1 if verification.problems else 0


def _audit(directory: Path, options: Options) -> int:
    if options.epoch is not None or (options.all and options.sample is not None):
        raise ValueError("Expected one of --epoch, --all and --sample.")
    if not options.all and options.sample is None:
        raise ValueError("--jobs: expected an audit. Give --all or --sample.")
    for name in ("sample", "jobs"):
        check_number(name, getattr(options, name), at_least=1)
    folders = member_folders(directory) if is_ensemble(directory) else [directory]
    training = read_config(folders[0]).training
    num_free = 1 if training.use_gpu else max((os.cpu_count() or 1) // training.num_threads, 1)
    number = options.jobs or num_free  # as many processes as have CPUs for their threads
    how: dict[str, Any] = {"sample": options.sample, "num_processes": number, "hdf5_file": options.hdf5_file}
    with ExitStack() as stack:
        for folder in folders:  # of runs that are being trained
            stack.enter_context(kept_checkpoints(folder))
        if is_ensemble(directory):
            audit = audit_ensemble(directory, **how)
        else:
            audit = audit_experiment(directory, **how, track=Progress(max_epochs=training.max_epochs).track)
    print(format_audit(audit, options.experiment_dir))
    return 1 if audit.problems or not audit.replayed else 0


def format_audit(audit: Audit, directory: str) -> str:
    """What was audited, what differs, and what follows for epochs that were not trained again."""
    num_recorded, num_replayed = len(audit.recorded), len(audit.replayed)
    head = f"{directory}: {num_replayed} of {pluralize(num_recorded, 'epoch')} trained again"
    lines = [f"{head}, {'some differ' if audit.problems else 'bitwise identical to what was recorded'}."]
    num_more = len(audit.problems) - _MOST
    more = [f"and {pluralize(num_more, 'further difference')}"] if num_more > 0 else []
    lines += [f"  {text}" for text in (*audit.problems[:_MOST], *more, *(audit.context if audit.problems else ()))]
    lines += [f"Not audited: {text}" for text in audit.left_out]
    longest = max(audit.spans, key=lambda span: span.last - span.first)
    if longest.last > longest.first:
        lines.append(
            f"Epochs {longest.first} to {longest.last} have no checkpoint between them, so one process trained them in "
            "one go. With train --keep every:5, or all, more processes can share the work."
        )
    if not audit.problems and num_replayed < num_recorded:
        shares = ", ".join(f"{(1 - share) ** audit.num_chosen:.2g} for {share:.0%}" for share in _SHARES)
        lines.append(
            f"If a share f of the epochs were forged, this sample would have missed all of them with a probability of "
            f"at most (1 - f)^{audit.num_chosen}: {shares}."
        )
    if audit.context and not audit.problems:
        lines.append(f"Different: {'; '.join(audit.context)}")
    lines.append(f"SHA-256 of the run: {audit.record}")
    return "\n".join(lines)


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
