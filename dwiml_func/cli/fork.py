"""`dwiml-func fork`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Self

import tyro

from dwiml_func.cli._messages import print_progress
from dwiml_func.cli._parsing import CommandOptions, parse
from dwiml_func.cli._run_options import RunOptions
from dwiml_func.cli._training import TimeLimit, created, train_with_progress
from dwiml_func.distributed.process_group import join_process_group, rank_in
from dwiml_func.experiment.comparison.compare import differences
from dwiml_func.experiment.folder import check_new_experiment, experiment_directory, read_config
from dwiml_func.experiment.fork import create_fork, prepare_fork

__all__ = ["Options", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions, TimeLimit, RunOptions):
    """Train a new experiment, beside SOURCE_DIR, that starts from one of its checkpoints. The default of every training
    option is the source's value: `dwiml-func fork SOURCE_DIR --help` lists them. The shapes of the model's tensors
    cannot change. Within an epoch, only options of the training other than the seed can change. With another optimizer,
    momentum, rule, accumulation or average, the optimizer state is reset. Epochs continue to count, also for the
    learning rate.

    Example: dwiml-func fork experiments/first_run slower --from 10 --learning-rate 0.0001 --max-epochs 50
    """

    source_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE_DIR")]
    """Folder of the experiment to fork."""
    new_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NEW_NAME")]
    """Name of the new experiment."""
    from_checkpoint: Annotated[str | None, tyro.conf.arg(name="from", metavar="EPOCH")] = None
    """Number of epochs after which to fork, or the name of any checkpoint, such as 3-50. None: the latest."""
    hdf5_file: str | None = None
    """Another dataset. None: that of the source."""
    accept: tuple[str, ...] = ()
    """Names of options, such as dropout, whose values were changed in the source's config.json since its latest
    checkpoint, and with which to continue."""

    @classmethod
    def parse(cls, arguments: Sequence[str], program: str) -> Self:
        """The command line overrides the source's options."""
        source = next((text for text in arguments if (Path(text) / "config.json").is_file()), None)
        if source is None:  # the command line is wrong or asks for help
            return parse(cls, arguments, program)
        base = RunOptions.from_config(read_config(Path(source)))
        default = cls(source_dir=tyro.MISSING, new_name=tyro.MISSING, **base.for_command_line(arguments))
        return parse(cls, arguments, program, default=default)


def run(options: Options) -> int:
    """Make the fork and train it."""
    deadline = options.deadline()
    source = Path(options.source_dir)
    recorded = read_config(source)
    experiments_path = source.parent if source.name not in ("", "..") else source.resolve().parent
    directory = experiment_directory(experiments_path, options.new_name)
    if rank_in() == 0:
        check_new_experiment(experiments_path, options.new_name)
    config = options.to_config(options.hdf5_file or recorded.hdf5_file)
    with join_process_group("cuda" if config.training.use_gpu else "cpu") as process_group:
        fork = prepare_fork(
            source, config, name=options.from_checkpoint, accept=options.accept, process_group=process_group
        )
        start = (directory, fork.parts, fork.state, fork.checkpoint.history)
        with created(directory, process_group, partial(create_fork, experiments_path, options.new_name, fork)):
            if process_group.rank == 0:
                old, new = ({**each.to_dict(), "origin": None} for each in (recorded, config))
                changes = (*differences(old, new, ("there", "here")), *fork.notes)
                head = f"{directory}: forked from {source}, checkpoint {fork.checkpoint.name}"
                print_progress("\n  ".join([head, *changes]))
            train_with_progress(*start, deadline)
    return 0
