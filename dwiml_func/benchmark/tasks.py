"""The pieces of work of a benchmark, each of which leaves a file: data, trainings with their scores, baselines' scores.

What is there is not made again, so a benchmark that was killed is continued by the same command.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dwiml_func.benchmark.mrtrix import MRTRIX, mrtrix_trackers
from dwiml_func.benchmark.settings import DATA, data_of
from dwiml_func.core.rng import Key
from dwiml_func.data.config import BatchConfig
from dwiml_func.data.example.dataset import make_example_data
from dwiml_func.data.example.settings import DEFAULT_SETTINGS
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.experiment.comparison.compare import differences
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import create_experiment
from dwiml_func.experiment.model_store import find_model, load_model
from dwiml_func.experiment.resume import check_same_run, resume_experiment
from dwiml_func.experiment.run import run_experiment, set_num_threads
from dwiml_func.experiment.tracking.case import TrackingCase, tracking_case
from dwiml_func.files.atomic import make_directory, remove_leftovers
from dwiml_func.files.json import read_checked, write_checked
from dwiml_func.files.lock import experiment_lock
from dwiml_func.tracking.protocols import Protocol, ProtocolLines

__all__ = ["CEILING", "Task", "check_done", "data_path", "do", "is_done", "read_scores", "score_experiment"]

CEILING = "half of the real streamlines"
"""Whose score is the ceiling, and whose task scores all baselines."""

_BASELINE_CONFIG = RunConfig(hdf5_file="", batches=BatchConfig(step_size=2.0))  # a voxel, as our recipe's
_NO_RECIPE = ("hdf5_file", "checkpoints", "logging")
_KEY = Key(0)  # of the seeds of tracking: the same for all who track


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A piece of work: the data in which a person is left out; or with a `seed` a training of `config` as `name`, and
    how it tracks in that person; or, as `name` without a seed, how the baselines or MRtrix do."""

    data: str
    person: str
    name: str | None = None
    seed: int | None = None
    config: RunConfig | None = None


def data_path(out: Path, data: str, person: str) -> Path:
    """The dataset in which a person is left out."""
    return out / "data" / data / f"{person}.hdf5"


def read_scores(out: Path) -> list[dict[str, Any]]:
    """All scores of a benchmark's folder, in the order of their paths; ValueError for those that are corrupt."""
    return [_read(path) for path in sorted((out / "scores").glob("*/*/*.json"))]


def check_done(out: Path, task: Task) -> None:
    """Raise ValueError where the scores of a task are there, but of other data or of another config."""
    if task.name is None or not is_done(out, task):
        return
    path = _score_path(out, task.data, task.name, task.person, task.seed)
    wanted = {**_who(task.data, task.person, task.name, task.seed), "config": task.config and _recipe(task.config)}
    found = _read(path)
    different = differences({name: found.get(name) for name in wanted}, wanted, ("scored", "asked for"))
    if different:
        raise ValueError(f"{path} has other scores: {'; '.join(different)}. Choose another --name, or another folder.")


def is_done(out: Path, task: Task) -> bool:
    """Whether the file of a task is there."""
    if task.name is None:
        return data_path(out, task.data, task.person).exists()
    return _score_path(out, task.data, task.name, task.person, task.seed).exists()


def do(out: Path, tasks: Sequence[Task]) -> Iterator[tuple[Task, None]]:
    """Do one task after the other; yields each when it is done."""
    set_num_threads(1)
    for task in tasks:
        if task.name is None:
            _make_data(out, task)
        elif task.name in MRTRIX:
            _score_mrtrix(out, task)
        elif task.config is None:
            _score_baselines(out, task)
        else:
            _train_and_score(out, task)
        yield task, None


def score_experiment(out: Path, directory: Path, *, data: str, person: str, name: str, config: RunConfig) -> None:
    """Write how an experiment's best model tracks in the person whom its dataset leaves out."""
    case = _case(out, data, person, config)
    model = load_model(find_model(directory)).module
    scores, seed = case.track(model, case.space, key=_KEY), config.training.rng
    _write(out, data, name, person, seed, scores=_by_protocol(scores), config=_recipe(config))


def _make_data(out: Path, task: Task) -> None:
    path = data_path(out, task.data, task.person)
    remove_leftovers(path.parent, path.name)
    make_example_data(path, settings=data_of(task.data, task.person))


def _train_and_score(out: Path, task: Task) -> None:
    assert task.config is not None
    assert task.name is not None
    assert task.seed is not None
    parent = out / "experiments" / task.data / task.name
    make_directory(parent)
    directory = parent / f"{task.person}_seed_{task.seed}"
    config = replace(
        task.config,
        hdf5_file=str(data_path(out, task.data, task.person).absolute()),
        training=replace(task.config.training, rng=task.seed),
    )
    with experiment_lock(parent, wait=True):
        if directory.exists():
            check_same_run(directory, config)
        else:
            create_experiment(parent, directory.name, config)
    with experiment_lock(directory, wait=True):  # a process of a benchmark that was killed may still train it
        if is_done(out, task):
            return
        parts, state, history = resume_experiment(directory, given=config, may_have_ended=True)
        for _ in run_experiment(directory, parts, state=state, history=history):
            pass
        score_experiment(out, directory, data=task.data, person=task.person, name=task.name, config=config)


def _score_baselines(out: Path, task: Task) -> None:
    """Each has its own file; that of the task, with the ceiling, comes last."""
    assert task.name is not None
    case = _case(out, task.data, task.person, _BASELINE_CONFIG)
    for name, (tracker, space) in case.baselines().items():
        scores = _by_protocol(case.track(tracker, space, key=_KEY))
        _write(out, task.data, name, task.person, scores=scores)
    ceiling = case.ceiling()
    reached = {name: None if ceiling is None else getattr(ceiling.all, name) for name in ("valid", "both_ends")}
    _write(out, task.data, task.name, task.person, **reached)


def _score_mrtrix(out: Path, task: Task) -> None:
    """Each algorithm has its own file; that of the task is the last."""
    case = _case(out, task.data, task.person, _BASELINE_CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        trackers = mrtrix_trackers(case, Path(folder), nb_directions=DATA[task.data].nb_directions)
        for name, tracker in trackers.items():
            scores = _by_protocol(case.ask(tracker, key=_KEY))
            _write(out, task.data, name, task.person, scores=scores)


def _case(out: Path, data: str, person: str, config: RunConfig) -> TrackingCase:
    path = data_path(out, data, person)
    groups = config.data.input_group_name, config.data.streamline_group_name
    dataset = open_dataset(path, "testing", input_group_name=groups[0], streamline_group_name=groups[1])
    case = tracking_case(dataset, config)
    if case is None:
        raise ValueError(f"{path}: expected streamlines of known bundles, in even steps. Give the model a step size.")
    return case


def _recipe(config: RunConfig) -> dict[str, Any]:
    """A config without what differs between the data and seeds of a model."""
    recipe = {name: value for name, value in config.to_dict().items() if name not in _NO_RECIPE}
    recipe["training"] = {name: value for name, value in recipe["training"].items() if name != "rng"}
    return recipe


def _by_protocol(tracked: Mapping[Protocol, ProtocolLines]) -> dict[str, Any]:
    return {protocol: lines.scores._asdict() for protocol, lines in tracked.items()}


def _who(data: str, person: str, name: str, seed: int | None) -> dict[str, Any]:
    return {"data": data, "data_options": _data_options(data), "tracker": name, "person": person, "seed": seed}


def _data_options(data: str) -> dict[str, Any]:
    options = asdict(DATA[data])
    del options["test_subject"]
    if options["simulator"] == DEFAULT_SETTINGS.simulator:
        del options["simulator"]
    return options


def _score_path(out: Path, data: str, name: str, person: str, seed: int | None = None) -> Path:
    """The scores of who tracked in a person."""
    return out / "scores" / data / name / (f"{person}.json" if seed is None else f"{person}_seed_{seed}.json")


def _write(out: Path, data: str, name: str, person: str, seed: int | None = None, **values: Any) -> None:
    path = _score_path(out, data, name, person, seed)
    make_directory(path.parent)
    write_checked(path, {**_who(data, person, name, seed), **values})


def _read(path: Path) -> dict[str, Any]:
    """Scores as they were written; a file that was moved, or whose entries are missing, is not that of its place."""
    content = read_checked(path) or {}
    place = [content.get(name) for name in ("data", "tracker")]
    name = f"{content.get('person')}" + ("" if content.get("seed") is None else f"_seed_{content['seed']}")
    if [*place, name] != [path.parent.parent.name, path.parent.name, path.stem]:
        raise ValueError(f"{path} is corrupt: its scores are of {place}, {name}. Remove it, and they are made again.")
    return content
