"""Claims about `dwiml-func benchmark`: data that tell trackers apart, true scores, and that a kill costs nothing."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from experiment_cases import latest_digest
from scipy.spatial.distance import cdist

from dwiml_func import Key
from dwiml_func.benchmark import leaderboard as board
from dwiml_func.benchmark import run, tasks
from dwiml_func.benchmark.leaderboard import as_markdown, leaderboard
from dwiml_func.benchmark.mrtrix import MRTRIX, has_mrtrix, mrtrix_trackers
from dwiml_func.benchmark.settings import DATA, SETTINGS, BenchmarkSetting, data_of
from dwiml_func.benchmark.tasks import CEILING
from dwiml_func.cli.benchmark import Options, _models, _setting
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.config import BatchConfig
from dwiml_func.data.example import dataset as example
from dwiml_func.data.example.settings import ExampleSettings
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.hdf5.write import new_dataset
from dwiml_func.data.resampling import Resampling
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.tracking.case import KEEP_STRAIGHT, ORACLE, PRINCIPAL_DIRECTION, TrackingCase, tracking_case
from dwiml_func.files.lock import experiment_lock
from dwiml_func.tracking import protocols
from dwiml_func.tracking.protocols import Tracker

CONFIG = RunConfig(hdf5_file="", batches=BatchConfig(step_size=2.0))
TINY = {
    "training": {"max_epochs": 2, "learning_rate": ["0.01"]},
    "model": {"rnn_layer_sizes": [8]},
    "batches": {"batch_size_training": 40},
}


@pytest.fixture(scope="module")
def crossings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One person with three crossings a bundle."""
    path = tmp_path_factory.mktemp("crossings") / "data.hdf5"
    subsets: Any = {"training": ("sub_4",), "validation": (), "testing": ()}
    resampling = Resampling(step_size=1.0)
    with new_dataset(path, **subsets, groups_config={}, date="", resampling=resampling, overwrite=False) as file:
        example._write_subject(file.create_group("sub_4"), 3, ExampleSettings(crossings=3))
    return path


@pytest.fixture(scope="module")
def case(crossings: Path) -> TrackingCase:
    case = tracking_case(open_dataset(crossings), CONFIG)
    assert case is not None
    return case


@pytest.fixture(autouse=True)
def no_mrtrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row would be there on some machines only, and takes a minute."""
    monkeypatch.setattr(run, "has_mrtrix", lambda: False)


@pytest.fixture
def few_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, "NUM_FREE", 20)
    monkeypatch.setattr(protocols, "NUM_CORE", 60)


def test_where_bundles_cross_the_true_field_tracks_and_the_principal_direction_does_not(
    case: TrackingCase, few_seeds: None
) -> None:
    few = np.arange(0, 150, 5)
    case = case._replace(real=case.real.select(few), bundles=Bundles(case.bundles.names, case.bundles.ids[few]))
    valid = {}
    for name, (tracker, space) in case.baselines().items():
        tracked = case.track(tracker, space, key=Key(0))
        valid[name] = [tracked[protocol].scores.valid for protocol in ("continue", "core")]
    assert min(valid[ORACLE]) > 0.5
    assert max(valid[PRINCIPAL_DIRECTION]) < 0.1
    assert max(valid[KEEP_STRAIGHT]) < 0.1


def share_by_others(tractogram: Path, hdf5: Path) -> float:
    """The valid share, from the files, by h5py, nibabel, scipy and dipy."""
    from dipy.tracking.distances import bundles_distances_mdf
    from dipy.tracking.streamline import set_number_of_points

    with h5py.File(hdf5) as file:
        group: Any = file["sub_4/streamlines"]
        affine, ids, ends = group.attrs["affine"], group["bundle_ids"][:], np.cumsum(group["lengths"][:])
        points = (group["data"][:].astype(np.float64) - 0.5) @ affine[:3, :3].T + affine[:3, 3]
    real = set_number_of_points(np.split(points, ends[:-1]), 20)
    lines = set_number_of_points([line.astype(np.float64) for line in nib.streamlines.load(tractogram).streamlines], 20)
    valid = np.zeros(len(lines), dtype=bool)
    for bundle in np.unique(ids):
        own = [line for line, number in zip(real, ids, strict=True) if number == bundle]
        firsts, lasts = (np.array([line[end] for line in own]) for end in (0, -1))
        between = [cdist(firsts, firsts), cdist(lasts, lasts), bundles_distances_mdf(own, own)]
        for distances in between:
            np.fill_diagonal(distances, np.inf)
        ends_mm = max(4.0, np.quantile(np.concatenate([d.min(axis=1) for d in between[:2]]), 0.95))
        mdf_mm = np.quantile(between[2].min(axis=1), 0.95)
        starts, stops = (np.array([line[end] for line in lines]) for end in (0, -1))
        near = [[cdist(p, cloud).min(axis=1) <= ends_mm for cloud in (firsts, lasts)] for p in (starts, stops)]
        joins = (near[0][0] & near[1][1]) | (near[0][1] & near[1][0])
        valid |= joins & (bundles_distances_mdf(lines, own).min(axis=1) <= mdf_mm)
    return float(valid.mean())


def test_a_tractogram_has_the_score_that_other_libraries_give_it(
    case: TrackingCase, crossings: Path, few_seeds: None, cli: Any, tmp_path: Path
) -> None:
    tracked = case.track(*case.baselines()[ORACLE], key=Key(5))["core"].lines
    affine = case.grid.affine
    in_ras = (tracked.points / 2 - 0.5).double().numpy() @ affine[:3, :3].T + affine[:3, 3]
    lines = np.split(in_ras.astype(np.float32), tracked.offsets[1:-1].numpy())
    header = {"voxel_to_rasmm": affine, "dimensions": case.grid.shape, "voxel_sizes": (2, 2, 2), "voxel_order": "RAS"}
    path = tmp_path / "tracked.trk"
    nib.streamlines.save(nib.streamlines.Tractogram(lines, affine_to_rasmm=np.eye(4)), path, header=header)
    assert cli("score", path, crossings, "--subject", "sub_4", "--out", tmp_path / "scores.json").code == 0
    ours = json.loads((tmp_path / "scores.json").read_text())["scores"]["all"]["valid"]
    assert 0.3 < ours < 0.9
    assert ours == pytest.approx(share_by_others(path, crossings), abs=1e-12)


def made_up(tracker: str, person: str, valid: float, *, seed: int | None = None) -> dict[str, Any]:
    scores = {name: {"valid": valid, "lag_mm": [1.0, 2.0, 3.0, 4.0]} for name in ("continue", "free", "core")}
    return {
        "data": "crossings",
        "data_options": {"snr": 20.0},
        "tracker": tracker,
        "person": person,
        "seed": seed,
        "scores": scores,
    }


def test_the_coverage_is_the_share_of_the_way_from_the_principal_direction_to_the_oracle() -> None:
    scores = [made_up(ORACLE, person, 0.8) for person in ("sub_1", "sub_2", "sub_3")]
    scores += [made_up(PRINCIPAL_DIRECTION, person, 0.2) for person in ("sub_1", "sub_2", "sub_3")]
    scores += [{**made_up(CEILING, person, 0), "valid": 0.9} for person in ("sub_1", "sub_2")]
    of_model = {("sub_1", 1): 0.4, ("sub_1", 2): 0.5, ("sub_2", 1): 0.6, ("sub_2", 2): 0.7}
    scores += [made_up("mine", person, valid, seed=seed) for (person, seed), valid in of_model.items()]
    oracle, mine, principal = leaderboard(scores)
    assert (oracle["tracker"], principal["tracker"]) == (ORACLE, PRINCIPAL_DIRECTION)
    assert (oracle["coverage"]["all"], principal["coverage"]["all"]) == (1.0, 0.0)
    assert mine["valid"]["free"] == 0.55
    assert mine["coverage"]["free"] == mine["coverage"]["all"] == round(0.35 / 0.6, 6)
    assert mine["spread"]["people"]["core"] == round(float(np.std([0.45, 0.65], ddof=1)), 6)
    assert mine["spread"]["seeds"]["core"] == round(float(np.std([0.5, 0.6], ddof=1)), 6)
    assert (mine["num_people"], mine["num_seeds"], mine["ceiling_valid"]) == (2, 2, 0.9)
    assert "| mine | 58 % | 0.550 ± 0.141 ± 0.071 |" in as_markdown([oracle, mine, principal])


def test_rows_come_by_data_and_coverage_and_a_person_counts_once_however_many_seeds_it_has() -> None:
    people = ("sub_1", "sub_2", "sub_3")
    scores = [made_up(ORACLE, person, 0.8) for person in people]
    scores += [made_up(PRINCIPAL_DIRECTION, person, 0.2) for person in people]
    scores += [{**made_up(CEILING, p, 0), "valid": valid} for p, valid in zip(people, (0.9, 0.7, 0.1), strict=True)]
    scores += [made_up("mine", "sub_1", 0.5, seed=seed) for seed in (1, 2, 3)] + [made_up("mine", "sub_2", 0.7, seed=2)]
    scores += [made_up("another", "sub_3", 0.5, seed=1), made_up("better", "sub_3", 0.6, seed=1)]
    of_example = [{**each, "data": "example"} for each in scores if each["tracker"] not in (ORACLE, CEILING)]
    rows = leaderboard([*of_example, *scores])
    assert [(row["data"], row["tracker"]) for row in rows] == [
        *(("crossings", name) for name in (ORACLE, "better", "mine", "another", PRINCIPAL_DIRECTION)),
        *(("example", name) for name in ("another", "better", "mine", PRINCIPAL_DIRECTION)),  # of no coverage
    ]
    mine = rows[2]
    assert mine["coverage"]["all"] == round((0.6 - 0.2) / 0.6, 6)
    assert mine["valid"]["all"] == 0.55  # over people and seeds, of which one has more
    assert (mine["num_people"], mine["num_seeds"], mine["ceiling_valid"], mine["lag_80_mm"]) == (2, 3, 0.8, 4.0)
    assert [row["coverage"]["all"] for row in rows[5:]] == [None] * 4
    assert rows[5]["ceiling_valid"] is None
    assert [row["spread"]["seeds"] is None for row in rows[:3]] == [True, True, False]  # "better" has one seed


def test_the_settings_are_those_of_the_table() -> None:
    kinds = {name: (each.crossings, each.distractors, each.snr, each.nb_directions) for name, each in DATA.items()}
    assert [name for name, each in DATA.items() if each.simulator != "tensors"] == ["crossings-trxscan"]
    assert kinds == {
        "crossings": (3, 1, 20.0, 60),
        "crossings-snr10": (3, 1, 10.0, 60),
        "crossings-snr30": (3, 1, 30.0, 60),
        "crossings-6dir": (3, 1, 20.0, 6),
        "example": (0, 0, 20.0, 60),
        "crossings-trxscan": (3, 1, 20.0, 60),
    }
    people = ("sub_1", "sub_2", "sub_3", "sub_4", "sub_5")
    assert {
        "small": BenchmarkSetting(data=("crossings",), people=people, seeds=(1, 2, 3)),
        "full": BenchmarkSetting(data=tuple(kinds)[:-1], people=people, seeds=(1, 2, 3)),
    } == SETTINGS
    assert data_of("crossings-snr10", "sub_2") == ExampleSettings(
        crossings=3, distractors=1, snr=10.0, test_subject="sub_2"
    )


def test_a_setting_that_does_not_tell_trackers_apart_gives_no_coverage() -> None:
    scores = [made_up(ORACLE, "sub_1", 0.74), made_up(PRINCIPAL_DIRECTION, "sub_1", 0.76)]
    assert [row["coverage"]["all"] for row in leaderboard(scores)] == [None, None]
    for high, coverage in ((0.05, 1.0), (0.0499, None)):
        oracle, _ = leaderboard([made_up(ORACLE, "sub_1", high), made_up(PRINCIPAL_DIRECTION, "sub_1", 0.0)])
        assert oracle["coverage"]["core"] == coverage


def test_a_ceiling_that_is_not_known_of_a_person_is_none() -> None:
    of_people = [{**made_up(CEILING, person, 0), "valid": valid} for person, valid in (("sub_1", 0.9), ("sub_2", None))]
    found = [*of_people, *(made_up(ORACLE, person, 0.8) for person in ("sub_1", "sub_2"))]
    assert [row["ceiling_valid"] for row in leaderboard(found)] == [None]


def test_the_table_says_all_of_a_row_and_leaves_out_what_is_not_known() -> None:
    scores = [made_up(ORACLE, "sub_1", 0.8), made_up(PRINCIPAL_DIRECTION, "sub_1", 0.2)]
    scores = [*scores, {**made_up(CEILING, "sub_1", 0), "valid": 0.9}, made_up("mine", "sub_1", 0.5, seed=1)]
    for each in scores:
        each["data_options"] = {"snr": 20.0, "nb_directions": 60}
    scores[-1]["scores"]["continue"]["lag_mm"][-1] = None
    alone = {**made_up("mine", "sub_2", 0.25), "data": "example"}
    head = (
        "| tracker | covered | valid: continue | valid: free | valid: core | lag after 80 mm | people, seeds |",
        "|---|---|---|---|---|---|---|",
    )
    assert as_markdown(leaderboard([alone, *scores])).splitlines() == [
        "### crossings",
        "",
        "snr 20.0, nb directions 60; half of the real streamlines beside the other half: 0.90 valid",
        "",
        *head,
        f"| {ORACLE} | 100 % | 0.800 ± 0.000 | 0.800 ± 0.000 | 0.800 ± 0.000 | 4.0 mm | 1 |",
        "| mine | 50 % | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.500 ± 0.000 |  | 1, 1 |",
        f"| {PRINCIPAL_DIRECTION} | 0 % | 0.200 ± 0.000 | 0.200 ± 0.000 | 0.200 ± 0.000 | 4.0 mm | 1 |",
        "",
        "### example",
        "",
        "snr 20.0",
        "",
        *head,
        "| mine |  | 0.250 ± 0.000 | 0.250 ± 0.000 | 0.250 ± 0.000 | 4.0 mm | 1 |",
    ]


def test_a_leaderboard_is_written_of_the_scores_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = made_up("mine", "sub_1", 0.5)
    scores["scores"]["continue"]["lag_mm"][-1] = float("nan")
    monkeypatch.setattr(board, "read_scores", {tmp_path: [scores]}.__getitem__)
    rows = board.write_leaderboard(tmp_path)
    assert [row["tracker"] for row in rows] == ["mine"]
    (line,) = (tmp_path / "leaderboard.jsonl").read_text().splitlines()
    assert json.loads(line) == {**rows[0], "lag_80_mm": None}
    assert (tmp_path / "leaderboard.md").read_text() == as_markdown(rows)
    del scores["person"]
    with pytest.raises(ValueError, match=r"scores: expected scores of a benchmark\. Received: without 'person'"):
        board.write_leaderboard(tmp_path)


def test_stages_follow_each_other_and_what_is_done_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Any, ...]] = []
    notes: list[str] = []

    def played(work: Any, arguments: tuple[Any, ...], left: list[Any], num_processes: int) -> Any:
        called.append((work, arguments, num_processes, [task.name for task in left]))
        assert all(tasks.data_path(tmp_path, task.data, task.person).parent.is_dir() for task in left)
        return ((task, None) for task in left)

    monkeypatch.setattr(run, "in_processes", played)
    monkeypatch.setattr(run, "write_leaderboard", lambda out: [{"out": out}])
    people, kinds, model = ("sub_1", "sub_2"), ("crossings", "example"), replace(CONFIG, hdf5_file="a")
    setting = BenchmarkSetting(data=kinds, people=people, seeds=(4, 5))
    there = tasks.data_path(tmp_path, "crossings", "sub_1")
    there.parent.mkdir(parents=True)
    there.touch()
    assert run.run_benchmark(tmp_path, setting, {"a": CONFIG, "b": model}, num_processes=3, note=notes.append) == [
        {"out": tmp_path}
    ]
    cells = [f"{data}, {person} left out" for data in kinds for person in people]
    seeds = [
        f"{name}, seed {seed}, {data}, {person} left out"
        for name in "ab"
        for data in kinds
        for seed in (4, 5)
        for person in people
    ]
    assert notes == [
        *(f"{number} of 4: data {cell}" for number, cell in enumerate(cells[1:], 2)),
        *(f"{number} of 4: baselines of {cell}" for number, cell in enumerate(cells, 1)),
        *(f"{number} of 16: {text}" for number, text in enumerate(seeds, 1)),
    ]
    names = [[None] * 3, [CEILING] * 4, [], ["a"] * 8 + ["b"] * 8]
    assert called == [(tasks.do, (tmp_path,), 3, each) for each in names]

    monkeypatch.setattr(run, "has_mrtrix", lambda: True)
    called.clear()
    run.run_benchmark(tmp_path, setting, {}, note=notes.append)
    assert [each[2:] for each in called] == [(1, names[0]), (1, names[1]), (1, ["MRtrix SD_STREAM"] * 4), (1, [])]
    assert notes[-1] == f"4 of 4: MRtrix iFOD2 and MRtrix SD_STREAM, {cells[-1]}"
    with pytest.raises(ValueError, match="--name: expected"):
        run.run_benchmark(tmp_path, setting, {"a": CONFIG, "a/b": CONFIG})


def test_a_name_is_none_of_a_baseline_and_fits_a_folder() -> None:
    for name in ("mine", "_a b.c+d-1", "a" * 80):
        run.check_name(name)
    for name in (
        "",
        " a",
        "-a",
        "a\n",
        "a/b",
        "\u00e9",
        "a" * 81,
        CEILING,
        *MRTRIX,
        ORACLE,
        PRINCIPAL_DIRECTION,
        KEEP_STRAIGHT,
    ):
        with pytest.raises(ValueError, match="--name: expected"):
            run.check_name(name)


@pytest.mark.parametrize(
    ("path", "is_taken"),
    [
        ("data/example/sub_2.hdf5", True),
        ("data/nothing/sub_2.hdf5", False),
        ("data/example/sub_9.hdf5", False),
        ("example/sub_2.hdf5", False),
    ],
)
def test_experiments_are_scored_that_trained_on_data_of_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, is_taken: bool
) -> None:
    config, scored = replace(CONFIG, hdf5_file=str(tmp_path / path)), []
    monkeypatch.setattr(run, "read_config", lambda directory: config)
    monkeypatch.setattr(run, "is_ensemble", lambda directory: directory.name == "all")
    monkeypatch.setattr(run, "member_folders", lambda directory: [directory / "1", directory / "2"])
    monkeypatch.setattr(run, "score_experiment", lambda *given, **facts: scored.append((given, facts)))
    if not is_taken:
        with pytest.raises(ValueError, match=r"expected an experiment on one of the datasets .*data/DATA/sub_N\.hdf5"):
            run.add_experiment(tmp_path, tmp_path / "all", name="mine")
        assert scored == []
        return
    run.add_experiment(tmp_path, tmp_path / "all", name="mine")
    run.add_experiment(tmp_path, tmp_path / "one", name="mine")
    facts = {"data": "example", "person": "sub_2", "name": "mine", "config": config}
    assert scored == [((tmp_path, tmp_path / name), facts) for name in ("all/1", "all/2", "one")]
    with pytest.raises(ValueError, match="--name: expected"):
        run.add_experiment(tmp_path, tmp_path / "one", name=ORACLE)


def test_scores_are_those_of_their_place(tmp_path: Path) -> None:
    tasks._write(tmp_path, "example", "mine", "sub_2", 3, valid=0.5)
    tasks._write(tmp_path, "example", "another", "sub_1", valid=0.25)
    options = {
        name: value for name, value in asdict(DATA["example"]).items() if name not in ("test_subject", "simulator")
    }
    who = {"data": "example", "data_options": options}
    another, mine = ({name: each[name] for name in each if name != "checksum"} for each in tasks.read_scores(tmp_path))
    assert another == {**who, "tracker": "another", "person": "sub_1", "seed": None, "valid": 0.25}
    assert mine == {**who, "tracker": "mine", "person": "sub_2", "seed": 3, "valid": 0.5}
    assert tasks._data_options("crossings-trxscan")["simulator"] == "trxscan"
    whole = tmp_path / "scores" / "example" / "mine" / "sub_2_seed_3.json"
    for place in (
        "crossings/mine/sub_2_seed_3",
        "example/yours/sub_2_seed_3",
        "example/mine/sub_2_seed_4",
        "example/mine/sub_2",
    ):
        other = tmp_path / "scores" / f"{place}.json"
        other.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole, other)
        with pytest.raises(ValueError, match=f"{place}.json is corrupt: its scores are of .*'mine'.*, sub_2_seed_3"):
            tasks.read_scores(tmp_path)
        other.unlink()
    with pytest.raises(ValueError, match=r"a\.json is corrupt: its scores are of \[None, None\], None"):
        tasks._read(tmp_path / "a.json")  # removed since it was found


def test_scores_that_are_there_are_of_the_data_and_the_config_asked_for(tmp_path: Path) -> None:
    task = tasks.Task(data="example", person="sub_2", name="mine", seed=3, config=replace(CONFIG, hdf5_file="a"))
    baselines, data = (tasks.Task(data="example", person="sub_2", name=name) for name in (CEILING, None))
    for each in (task, baselines, data):
        tasks.check_done(tmp_path, each)
        assert not tasks.is_done(tmp_path, each)
    tasks._write(tmp_path, "example", CEILING, "sub_2")
    tasks._write(tmp_path, "example", "mine", "sub_2", 3, config=tasks._recipe(CONFIG))
    for each in (task, baselines, data):
        tasks.check_done(tmp_path, each)
        assert tasks.is_done(tmp_path, each) == (each is not data)
    other = replace(CONFIG, batches=BatchConfig(step_size=3.0))
    with pytest.raises(ValueError, match=r"other scores: config\.batches\.step_size: 2\.0 scored, 3\.0 asked for"):
        tasks.check_done(tmp_path, replace(task, config=other))
    for name, value in (("rng", 7), ("max_epochs", 3)):
        changed = replace(CONFIG, training=replace(CONFIG.training, **{name: value}))
        assert (tasks._recipe(changed) == tasks._recipe(CONFIG)) == (name == "rng")
    tasks._write(tmp_path, "example", "mine", "sub_2", 3, config=tasks._recipe(CONFIG), data_options={"snr": 9.0})
    with pytest.raises(ValueError, match="other scores: data_options"):
        tasks.check_done(tmp_path, task)


def test_a_training_that_a_kill_ended_after_its_last_epoch_is_only_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, Any] = {}
    resumed = ["parts", "state", "history"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "resume_experiment", lambda *given, **how: called.update(resume=(given, how)) or resumed)
    monkeypatch.setattr(tasks, "run_experiment", lambda *given, **how: iter([called.update(run=(given, how))]))
    monkeypatch.setattr(tasks, "score_experiment", lambda *given, **facts: called.update(score=(given, facts)))
    task = tasks.Task(data="example", person="sub_2", name="mine", seed=3, config=CONFIG)
    out, directory = Path("out"), Path("out/experiments/example/mine/sub_2_seed_3")
    given = replace(
        CONFIG,
        hdf5_file=str(tmp_path / "out/data/example/sub_2.hdf5"),  # wherever the next command is called
        training=replace(CONFIG.training, rng=3),
    )
    expected = {
        "resume": ((directory,), {"given": given, "may_have_ended": True}),
        "run": ((directory, "parts"), {"state": "state", "history": "history"}),
        "score": ((out, directory), {"data": "example", "person": "sub_2", "name": "mine", "config": given}),
    }
    for _ in range(2):  # made, then found there
        called.clear()
        assert list(tasks.do(out, [task])) == [(task, None)]
        assert called == expected
    other = replace(task, config=replace(CONFIG, batches=BatchConfig(step_size=3.0)))
    with pytest.raises(ValueError, match="step_size"):
        list(tasks.do(out, [other]))
    tasks._write(out, "example", "mine", "sub_2", 3)
    called.clear()
    assert list(tasks.do(out, [task])) == [(task, None)]
    assert called == {}


def test_data_are_made_of_a_kind_in_which_one_person_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(tasks, "make_example_data", lambda *given, **how: made.append((given, how)))
    folder = tmp_path / "data" / "crossings-6dir"
    folder.mkdir(parents=True)
    (folder / ".dwiml-tmp-sub_2.hdf5.999999-01234567").touch()  # of a process that was killed
    task = tasks.Task(data="crossings-6dir", person="sub_2")
    assert list(tasks.do(tmp_path, [task])) == [(task, None)]
    assert made == [((folder / "sub_2.hdf5",), {"settings": data_of("crossings-6dir", "sub_2")})]
    assert list(folder.iterdir()) == []


def test_a_person_without_known_bundles_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(tasks, "open_dataset", lambda *given, **names: opened.append((given, names)))
    monkeypatch.setattr(tasks, "tracking_case", lambda dataset, config: None)
    config = replace(CONFIG, data=replace(CONFIG.data, input_group_name="a", streamline_group_name="b"))
    with pytest.raises(ValueError, match=r"sub_2\.hdf5: expected streamlines of known bundles, in even steps"):
        tasks._case(tmp_path, "example", "sub_2", config)
    names = {"input_group_name": "a", "streamline_group_name": "b"}
    assert opened == [((tasks.data_path(tmp_path, "example", "sub_2"), "testing"), names)]


@pytest.fixture
def out(tmp_path: Path, few_streamlines_hdf5: Path, few_seeds: None) -> Path:
    """A benchmark's folder in which the data are there, sub_5 left out."""
    path = tmp_path / "out" / "data" / "crossings" / "sub_5.hdf5"
    path.parent.mkdir(parents=True)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    shutil.copy(few_streamlines_hdf5, path)
    return tmp_path / "out"


def command(out: Path) -> tuple[Any, ...]:
    return ("benchmark", out, "--people", "sub_5", "--seeds", 1, "--model", out.parent / "tiny.json", "-j", 1)


@pytest.mark.soak
@pytest.mark.skipif(not has_mrtrix(), reason="MRtrix is not installed")
def test_mrtrix_follows_the_fibres_from_the_places_given(
    case: TrackingCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocols, "NUM_FREE", 20)
    monkeypatch.setattr(protocols, "NUM_CORE", 40)
    few = case._replace(real=case.real.select(torch.arange(0, 150, 5)), bundles=every_fifth(case.bundles))
    straight = few.track(*case.baselines()[KEEP_STRAIGHT], key=Key(0))
    trackers = mrtrix_trackers(case, tmp_path, nb_directions=60)
    assert list(trackers) == list(MRTRIX)
    for tracker in trackers.values():
        found = few.ask(checked(tracker), key=Key(0))
        lags = [lines["continue"].scores.lag_mm for lines in (found, straight)]
        assert lags[0] is not None
        assert lags[1] is not None
        assert lags[0][1] < 0.9 * lags[1][1]
        assert found["core"].scores.both_ends > straight["core"].scores.both_ends


def checked(tracker: Tracker) -> Tracker:
    """The same, and its lines begin where they should."""

    def ahead(given: Streamlines, distance: float) -> Streamlines:
        added = tracker.ahead(given, distance)
        ends = given.points[given.offsets[1:] - 1]
        assert torch.equal(added.points[added.offsets[:-1]], ends)  # begins where the given part ends, and continues in
        straight = ends - given.points[given.offsets[1:] - 2]  # its direction: no step bends by 90 degrees
        goes_on = added.lengths > 1
        first = added.points[added.offsets[:-1][goes_on] + 1] - ends[goes_on]
        assert bool(((first * straight[goes_on]).sum(dim=1) > 0).all())
        assert int(goes_on.sum()) > 25  # of 30
        return added

    def from_seeds(seeds: torch.Tensor) -> Streamlines:
        lines = tracker.from_seeds(seeds)
        nearest = torch.cdist(seeds, lines.points).numpy()
        passed = [nearest[:, first:last].min() for first, last in itertools.pairwise(lines.offsets.tolist())]
        assert max(passed) < 0.3  # voxel: each line passes one of the seeds, between two of its points
        return lines

    return Tracker(ahead, from_seeds)


def played_mrtrix(case: TrackingCase, folder: Path, *, nb_directions: int) -> dict[str, Tracker]:
    """Trackers that go nowhere, from an empty folder and the data's number of directions."""
    assert (list(folder.iterdir()), nb_directions) == ([], 60)
    ends = lambda given: Streamlines(given.points[given.offsets[1:] - 1], torch.arange(len(given) + 1))  # noqa: E731
    from_seeds = lambda seeds: Streamlines(seeds, torch.arange(len(seeds) + 1))  # noqa: E731
    return dict.fromkeys(MRTRIX, Tracker(lambda given, _: ends(given), from_seeds))


def every_fifth(bundles: Bundles) -> Bundles:
    return Bundles(bundles.names, bundles.ids[::5])


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "leaderboard.jsonl").read_text().splitlines()]
    return {row["tracker"]: row for row in rows}


def test_a_benchmark_that_was_stopped_continues_with_the_same_command_and_ends_in_the_same_bytes(
    out: Path, cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}_other")) / "out"
    monkeypatch.setattr(run, "has_mrtrix", lambda: True)
    monkeypatch.setattr(tasks, "mrtrix_trackers", played_mrtrix)
    locked: list[tuple[str, bool]] = []

    def lock(directory: Path, *, wait: bool) -> Any:
        locked.append((directory.name, wait))
        return experiment_lock(directory, wait=wait)

    monkeypatch.setattr(tasks, "experiment_lock", lock)
    whole = cli(*command(out))
    assert whole.code == 0, whole.err
    assert locked == [("tiny", True), ("sub_5_seed_1", True)]  # another process may train other seeds, or the same
    notes = whole.out.splitlines()[:3]
    assert notes == [
        "1 of 1: baselines of crossings, sub_5 left out",
        "1 of 1: MRtrix iFOD2 and MRtrix SD_STREAM, crossings, sub_5 left out",
        "1 of 1: tiny, seed 1, crossings, sub_5 left out",
    ]
    rows = rows_of(out)
    assert set(rows) == {"tiny", *MRTRIX, ORACLE, PRINCIPAL_DIRECTION, KEEP_STRAIGHT}
    assert rows["MRtrix iFOD2"]["valid"] == rows["MRtrix SD_STREAM"]["valid"]
    assert rows["tiny"]["config"]["model"]["rnn_layer_sizes"] == [8]
    assert rows["tiny"]["config"]["batches"]["step_size"] == 2.0  # what a part of a config leaves out is the recipe's
    assert "hdf5_file" not in rows["tiny"]["config"]

    run_experiment = tasks.run_experiment

    def interrupted(*arguments: Any, **options: Any) -> Any:
        yield next(run_experiment(*arguments, **options))
        raise KeyboardInterrupt

    def trains(*_: Any, **__: Any) -> Any:
        raise AssertionError("what is finished was trained again")

    for name in (ORACLE, PRINCIPAL_DIRECTION, KEEP_STRAIGHT, CEILING):
        shutil.copytree(out / "scores" / "crossings" / name, other / "scores" / "crossings" / name)
    monkeypatch.setattr(tasks, "run_experiment", interrupted)
    assert cli(*command(other)).code == 130
    assert not (other / "leaderboard.jsonl").exists()
    monkeypatch.setattr(tasks, "run_experiment", run_experiment)
    assert cli(*command(other)).code == 0
    directory = Path("experiments", "crossings", "tiny", "sub_5_seed_1")
    assert latest_digest(out / directory) == latest_digest(other / directory)
    monkeypatch.setattr(tasks, "run_experiment", trains)
    assert cli(*command(other)).code == 0
    for name in ("leaderboard.jsonl", "leaderboard.md"):
        assert (out / name).read_bytes() == (other / name).read_bytes()

    # Scores of another recipe under the same name are not taken for those asked for; nor are altered ones.
    cli(*command(other), "--max-epochs", 1).check_refusal("max_epochs", "--name")
    path = other / "scores" / "crossings" / "tiny" / "sub_5_seed_1.json"
    whole_scores = path.read_text()
    valid = json.loads(whole_scores)["scores"]["core"]["valid"]
    for corrupt, named in (
        (whole_scores.replace(f'"valid": {valid},', '"valid": 0.987,'), "corrupt"),
        (whole_scores[:-40], "not JSON"),
        (json.dumps({"data": "crossings", "tracker": "tiny", "person": "sub_5", "seed": 2}), "corrupt"),
    ):
        assert corrupt != whole_scores
        path.write_text(corrupt)
        cli(*command(other)).check_refusal(str(path), named)
    path.unlink()
    os.mkfifo(path)
    cli(*command(other)).check_refusal(str(path), "pipe")

    # An experiment of anyone, trained on the benchmark's data, gets a row; the others stay.
    added = cli("benchmark", out, "--people", "sub_5", "--model", out / directory, "--name", "mine")
    assert added.code == 0, added.err
    assert {name: row for name, row in rows_of(out).items() if name != "mine"} == rows
    assert rows_of(out)["mine"]["valid"] == rows["tiny"]["valid"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--setting", "huge"), "huge"),
        (("--data", "nothing"), "nothing"),
        (("--people", "sub_9"), "sub_9"),
        (("--people", "sub_1", "sub_1"), "sub_1"),
        (("--seeds", "1", "1"), "seeds"),
        (("--name", "a/b"), "a/b"),
        (("--name", ORACLE), ORACLE),
        (("--model", "missing.json"), "missing.json"),
        (("--max-epochs", "0"), "max_epochs"),
        (("-j", "0"), "processes"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(
    cli: Any, tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    cli("benchmark", tmp_path / "out", *arguments).check_refusal(named)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "given"), [("data", ("example",)), ("people", ("sub_2", "sub_1")), ("seeds", (7,)), ("seeds", ())]
)
def test_what_is_given_replaces_that_of_the_setting_and_the_rest_stays(name: str, given: Any) -> None:
    expected = replace(SETTINGS["full"], **{name: given}) if given else SETTINGS["full"]
    assert _setting(Options(out="out", setting="full", **{name: given})) == expected


def test_a_training_may_be_of_one_epoch() -> None:
    recipes, experiments = _models(Options(out="out", max_epochs=1))
    assert [config.training.max_epochs for config in recipes.values()] == [1]
    assert experiments == []


def test_an_experiment_on_other_data_is_refused(cli: Any, tmp_path: Path, stopped_early: Path) -> None:
    run = tmp_path / f"{ORACLE}.1"  # of a folder the whole name counts, of a file what is before its ending
    run.symlink_to(stopped_early / "run")
    cli("benchmark", tmp_path / "out", "--model", run).check_refusal("data.hdf5", "config to train")
    config = tmp_path / f"{ORACLE}.json"
    config.symlink_to(run / "config.json")
    cli("benchmark", tmp_path / "out", "--model", config).check_refusal("--name: expected", repr(ORACLE))
    twice = (run / "config.json", run / "config.json")
    cli("benchmark", tmp_path / "out", "--model", *twice).check_refusal("expected one config called 'config'")
