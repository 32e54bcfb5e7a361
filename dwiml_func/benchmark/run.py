"""A benchmark from end to end: data, baselines, trainings with their scores, and the leaderboard."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from dwiml_func.benchmark.leaderboard import write_leaderboard
from dwiml_func.benchmark.mrtrix import MRTRIX, has_mrtrix
from dwiml_func.benchmark.settings import DATA, BenchmarkSetting
from dwiml_func.benchmark.tasks import CEILING, Task, check_done, data_path, do, is_done, score_experiment
from dwiml_func.data.example.bundles import SUBJECTS
from dwiml_func.data.processes import in_processes
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import is_ensemble, member_folders, read_config
from dwiml_func.experiment.tracking.case import KEEP_STRAIGHT, ORACLE, PRINCIPAL_DIRECTION

__all__ = ["add_experiment", "check_name", "run_benchmark"]

_TAKEN = (CEILING, *MRTRIX, ORACLE, PRINCIPAL_DIRECTION, KEEP_STRAIGHT)
_NAME = re.compile(r"[\w][\w .+-]{0,79}", re.ASCII)


def run_benchmark(
    out: Path,
    setting: BenchmarkSetting,
    recipes: Mapping[str, RunConfig],
    *,
    num_processes: int = 1,
    note: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Do what is not there yet, and write the leaderboard of all scores in `out`; returns its rows.

    `recipes` are the configs to train, by name; dataset and seed come from the benchmark. `note` gets a line about each
    piece of work.
    """
    for name in recipes:
        check_name(name)
    cells = [(data, person) for data in setting.data for person in setting.people]
    stages = (
        [Task(data=data, person=person) for data, person in cells],
        [Task(data=data, person=person, name=CEILING) for data, person in cells],
        [Task(data=data, person=person, name=[*MRTRIX][-1]) for data, person in cells] if has_mrtrix() else [],
        [
            Task(data=data, person=person, name=name, seed=seed, config=config)
            for name, config in recipes.items()
            for data in setting.data
            for seed in setting.seeds
            for person in setting.people
        ],
    )
    for task in chain(*stages):
        check_done(out, task)
    for tasks in stages:
        left = [task for task in tasks if not is_done(out, task)]
        for task in left:
            data_path(out, task.data, task.person).parent.mkdir(parents=True, exist_ok=True)
        done = len(tasks) - len(left)
        for task, _ in in_processes(do, (out,), left, num_processes):
            done += 1
            note(f"{done} of {len(tasks)}: {_describe(task)}")
    return write_leaderboard(out)


def add_experiment(out: Path, directory: Path, *, name: str) -> None:
    """Score an experiment, or the members of an ensemble, that trained on one of the benchmark's datasets."""
    check_name(name)
    for member in member_folders(directory) if is_ensemble(directory) else [directory]:
        config = read_config(member)
        path = Path(config.hdf5_file).resolve()
        data, person = path.parent.name, path.stem
        if data not in DATA or person not in SUBJECTS or path != data_path(out, data, person).resolve():
            raise ValueError(
                f"{member}: expected an experiment on one of the datasets {data_path(out, 'DATA', 'sub_N')}. "
                f"Received: one on {config.hdf5_file}. Train on them, or give a config to train."
            )
        score_experiment(out, member, data=data, person=person, name=name, config=config)


def check_name(name: str) -> None:
    """Raise ValueError where a name is taken by a baseline, or cannot be that of a folder."""
    if name in _TAKEN or not _NAME.fullmatch(name):
        raise ValueError(
            f"--name: expected letters, digits, blanks and .+-_, and none of {', '.join(_TAKEN)}. Received: {name!r}."
        )


def _describe(task: Task) -> str:
    where = f"{task.data}, {task.person} left out"
    if task.name is None:
        return f"data {where}"
    if task.name in MRTRIX:
        return f"{' and '.join(MRTRIX)}, {where}"
    return f"baselines of {where}" if task.seed is None else f"{task.name}, seed {task.seed}, {where}"
