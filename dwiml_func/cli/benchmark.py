"""`dwiml-func benchmark`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from dwiml_func._checks import check_number
from dwiml_func.benchmark.leaderboard import as_markdown
from dwiml_func.benchmark.run import add_experiment, check_name, run_benchmark
from dwiml_func.benchmark.settings import DATA, SETTINGS, BenchmarkSetting, SettingName
from dwiml_func.cli._messages import print_progress
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.cli._run_options import example_options, read_config_part
from dwiml_func.data.example.bundles import SUBJECTS
from dwiml_func.experiment.config import RunConfig
from dwiml_func.files.lock import experiment_lock

__all__ = ["Options", "run"]

_OURS = "learn2track"


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Train and score models of tractography on simulated data of five people, leaving one out at a time, beside
    baselines and an oracle. It needs nothing but the package: no data, no network. The same command continues a
    benchmark that was stopped. OUT/leaderboard.md and OUT/leaderboard.jsonl have a row for each model.

    Example: dwiml-func benchmark bench --setting small -j 2
    """

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[OUT]")] = "benchmark"
    """Folder of the data, the experiments, the scores and the leaderboard; it is made if missing."""
    setting: SettingName = "small"
    """How much to run. small: one kind of data, five people, three seeds. full: all kinds of data."""
    model: Annotated[tuple[str, ...], tyro.conf.arg(metavar="EXPERIMENT_OR_CONFIG ...")] = ()
    """Models to add. Each config.json, or part of one, is trained for each person and seed, its other options are those
    of the example data. Each experiment, trained on OUT/data/..., is scored in the person left out there. None: the
    recipe of the example data."""
    name: str | None = None
    """Name of the models in the leaderboard. None: that of the file or the folder."""
    data: tuple[str, ...] = ()
    """Kinds of data, in place of the setting's."""
    people: tuple[str, ...] = ()
    """People to leave out, in place of all five: sub_1 to sub_5."""
    seeds: tuple[int, ...] = ()
    """Seeds of training, in place of 1, 2 and 3."""
    max_epochs: int | None = None
    """Number of epochs, in place of the recipe's; its rates stay what they are at each epoch."""
    processes: Annotated[int | None, tyro.conf.arg(aliases=["-j"], metavar="N")] = None
    """Number of processes. It does not change the results. None: one for each core."""


def run(options: Options) -> int:
    """Run the benchmark and print its table."""
    setting = _setting(options)
    num_processes = (os.cpu_count() or 1) if options.processes is None else options.processes
    check_number("processes", num_processes, at_least=1)
    recipes, experiments = _models(options)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with experiment_lock(out):
        for name, directory in experiments:
            add_experiment(out, directory, name=name)
        rows = run_benchmark(out, setting, recipes, num_processes=num_processes, note=print_progress)
    shown = [row for row in rows if row["data"] in setting.data]
    print(as_markdown(shown))
    print(f"{out / 'leaderboard.md'} and {out / 'leaderboard.jsonl'} have all rows")
    return 0


def _setting(options: Options) -> BenchmarkSetting:
    setting = SETTINGS[options.setting]
    for option, given, allowed in (("data", options.data, tuple(DATA)), ("people", options.people, SUBJECTS)):
        for value in given:
            if value not in allowed or given.count(value) > 1:
                raise ValueError(
                    f"--{option}: expected each of {', '.join(allowed)} at most once. Received: {value!r}."
                )
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError(f"--seeds: expected each seed once. Received: {' '.join(map(str, options.seeds))}.")
    return replace(
        setting,
        data=options.data or setting.data,
        people=options.people or setting.people,
        seeds=options.seeds or setting.seeds,
    )


def _models(options: Options) -> tuple[dict[str, RunConfig], list[tuple[str, Path]]]:
    """The recipes to train by name, and the experiments to score."""
    if options.name is not None:
        check_name(options.name)
    recipes: dict[str, RunConfig] = {}
    experiments: list[tuple[str, Path]] = []
    for given in options.model:
        path = Path(given)
        name = options.name or (path.stem if path.is_file() else path.name)
        check_name(name)
        if path.is_dir():
            experiments.append((name, path))
        elif name in recipes:
            raise ValueError(f"--model: expected one config called {name!r}. Give each a command of its own.")
        else:
            base, _ = read_config_part(given, example_options())
            recipes[name] = base.to_config("")
    if not options.model:
        recipes[options.name or _OURS] = example_options().to_config("")
    if options.max_epochs is not None:
        check_number("max_epochs", options.max_epochs, at_least=1)
        for name, config in recipes.items():
            recipes[name] = replace(config, training=replace(config.training, max_epochs=options.max_epochs))
    return recipes, experiments
