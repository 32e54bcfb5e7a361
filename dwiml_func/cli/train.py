"""`dwiml-func train`."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import tyro

from dwiml_func.cli._messages import print_progress
from dwiml_func.cli._parsing import CommandOptions, parse
from dwiml_func.cli._run_options import (
    RunOptions,
    check_for_dwi_ml,
    example_options,
    kept_example_options,
    options_for_dwi_ml,
    read_config_part,
)
from dwiml_func.cli._several import (
    check_sweep,
    describe_members,
    describe_sweep,
    resume_members,
    train_members,
    train_sweep,
)
from dwiml_func.cli._training import TimeLimit, describe_run, new_run, train_with_progress
from dwiml_func.distributed.process_group import join_process_group, rank_in
from dwiml_func.experiment.folder import experiment_directory
from dwiml_func.experiment.resume import check_same_ensemble, check_same_run
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.sweep import is_ensemble_sweep, member_configs, sweep_configs
from dwiml_func.experiment.training_config import WINDOW_LAG, TrainingConfig
from dwiml_func.files.lock import experiment_lock
from dwiml_func.models.config import ModelConfig

__all__ = ["Options", "run"]

EXAMPLE_FILE = "example_data.hdf5"


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions, TimeLimit, RunOptions):
    """Train a model: Learn2Track, a transformer or an autoencoder of streamlines. Every epoch ends with a checkpoint
    in EXPERIMENTS_PATH/EXPERIMENT_NAME/checkpoint, for `dwiml-func resume`. The best epoch's model is in best_model,
    the logs in logs, figures in plots.

    Example: dwiml-func train experiments second_run data.hdf5 --patience 10 --dropout 0.2
    """

    experiments_path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENTS_PATH")]
    """Folder of all experiments; it must exist."""
    experiment_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_NAME")]
    """Name of the experiment. If it exists with the same config, it is resumed. Options of checkpoints, logs and
    loading, which cannot change results, may differ."""
    hdf5_file: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[HDF5_FILE]")] = None
    """The dataset. None: that of --config, or else the built-in example data with suitable options; they are made once,
    in EXPERIMENTS_PATH."""
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Take the options from a run's config.json, or from a part of one. Options of the command line override it."""
    init_from: Annotated[str | None, tyro.conf.arg(metavar="MODEL_OR_EXPERIMENT")] = None
    """Start from the weights of a model directory, an experiment, a checkpoint's folder or a torch state dict (.pt),
    where name and shape fit."""
    num_models: int = 1
    """Number of models to train at once, with consecutive seeds from --rng on: an ensemble, with a folder for each in
    EXPERIMENT_NAME."""
    sweep: tuple[str, ...] = ()
    """Train one model per value: NAME=VALUE,VALUE,... of any options; several names: all combinations. Those of
    learning-rate, weight-decay and rng are trained at once, as an ensemble. With any other option they are trained one
    after the other, each an experiment in EXPERIMENT_NAME; the same command again continues. A value with spaces is
    quoted: "rnn-layer-sizes=50,100 100"."""
    for_dwi_ml: bool = False
    """Train a model for dwi_ml's tracker: with its interpolation (trilinear-corner) and its step rule. export-dwi-ml
    writes it."""
    dry_run: bool = False
    """Print the complete config as JSON (of an ensemble or a sweep, the list of its members' configs), and a
    description of the data on standard error. Train and write nothing."""

    @classmethod
    def parse(cls, arguments: Sequence[str], program: str) -> Self:
        """The command line overrides --config, which overrides the options that suit the data.

        One reading is enough, unless options stand before the positional arguments: then only it tells whether a file
        was given.
        """
        leading = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
        if len(leading) > 3:
            raise ValueError(
                "Expected EXPERIMENTS_PATH EXPERIMENT_NAME HDF5_FILE and options. Received also: "
                f"{' '.join(leading[3:])}. Name groups by --input-group-name and --streamline-group-name."
            )
        early, _ = tyro.cli(_Early, args=list(arguments), prog=program, return_unknown_args=True, add_help=False)

        def read(base: RunOptions, *, is_silent: bool = False) -> Self:
            base, hdf5_file = (base, None) if early.config is None else read_config_part(early.config, base)
            base = options_for_dwi_ml(base) if early.for_dwi_ml else base
            default = cls(
                experiments_path=tyro.MISSING,
                experiment_name=tyro.MISSING,
                hdf5_file=hdf5_file,
                **base.for_command_line(arguments),
            )
            return parse(cls, arguments, program, default=default, is_silent=is_silent)

        if len(leading) < 3:
            with contextlib.suppress(ValueError, OSError, SystemExit):  # an error shows again below
                options = read(example_options(early.dg_key, early.model, early.monitor), is_silent=True)
                if options.hdf5_file is None:
                    return options
        return read(RunOptions())


@dataclass(frozen=True)
class _Early:
    """The options that must be known before the others are read."""

    config: str | None = None
    dg_key: str = ModelConfig.dg_key
    model: str = ModelConfig.model
    skip_window_lag: bool = False
    for_dwi_ml: bool = False

    @property
    def monitor(self) -> str:
        """What chooses the best epoch on the example data."""
        return TrainingConfig.monitor if self.skip_window_lag else WINDOW_LAG


def run(options: Options) -> int:
    """Make the experiment and train it."""
    deadline = options.deadline()
    directory = experiment_directory(options.experiments_path, options.experiment_name)
    example = Path(options.experiments_path, EXAMPLE_FILE)
    config = options.to_config(options.hdf5_file or example)
    if options.for_dwi_ml:
        print_progress(check_for_dwi_ml(config))
    how = {"num_models": options.num_models, "sweep": options.sweep}
    is_mapped = is_ensemble_sweep(options.sweep)
    members, swept = (member_configs(config, **how), {}) if is_mapped else ([], sweep_configs(config, **how))
    config = members[0] if len(members) == 1 else config
    if any(each.model.drops_nothing for each in (config, *members, *swept.values())):
        logging.getLogger(__name__).warning(
            "--dropout changes nothing in a model of one recurrent layer without embedding and previous directions: "
            "it acts between layers and on the input of the first. Use two layers or --nb-previous-dirs."
        )
    is_again = rank_in() == 0 and directory.exists()  # the same command again, as a scheduler gives it
    if options.init_from is not None and (swept or len(members) > 1):
        raise ValueError("--init-from: expected one model to train. Leave out --num-models and --sweep.")
    if swept:
        check_sweep(directory, swept)
    elif is_again and len(members) > 1:
        check_same_ensemble(directory, members)
    elif is_again:
        check_same_run(directory, config, init_from=options.init_from)
    if options.dry_run:
        is_there = options.hdf5_file is not None or example.exists()
        data = describe_run(directory, prepare(config)) if is_there else f"{example} would be made."
        if swept:
            describe_sweep(directory, swept)
        elif len(members) > 1:
            print(json.dumps([member.to_dict() for member in members], indent=2))
            print(describe_members(directory, members), file=sys.stderr)
        else:
            print(config.to_json(), end="")
        print(data, file=sys.stderr)
        return 0
    if options.hdf5_file is None:
        kept = shlex.join(kept_example_options(options))
        print_progress(f"Example data, with {kept}" if kept else "Example data")
        _make_example_data(example)
    if swept:
        return train_sweep(directory, swept, options.sweep, deadline=deadline)
    if is_again and len(members) > 1:
        print_progress(f"{directory} exists, with these configs: resuming it.")
        resume_members(directory, may_have_ended=True, given=members, deadline=deadline)
        return 0
    if len(members) > 1:
        train_members(options.experiments_path, options.experiment_name, members, deadline)
        return 0
    with join_process_group("cuda" if config.training.use_gpu else "cpu") as process_group:
        path, name = options.experiments_path, options.experiment_name
        with new_run(path, name, config, process_group, init_from=options.init_from) as start:
            train_with_progress(directory, *start, deadline)
    return 0


def _make_example_data(path: Path) -> None:
    with experiment_lock(path.parent, wait=True):
        if not path.exists():
            from dwiml_func.data.example.dataset import make_example_data

            print_progress(f"Making the example data, once: {path}")
            make_example_data(path)
