"""Claims about `dwiml-func benchmark`: data that tell trackers apart, true scores, and that a kill costs nothing."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from dipy.tracking.distances import bundles_distances_mdf
from dipy.tracking.streamline import set_number_of_points
from experiment_cases import latest_digest
from scipy.spatial.distance import cdist

from dwiml_func import Key
from dwiml_func.benchmark import run, tasks
from dwiml_func.benchmark.leaderboard import as_markdown, leaderboard
from dwiml_func.benchmark.mrtrix import MRTRIX, has_mrtrix, mrtrix_trackers
from dwiml_func.benchmark.settings import DATA, SETTINGS, BenchmarkSetting, data_of
from dwiml_func.benchmark.tasks import CEILING
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.example import dataset as example
from dwiml_func.data.example.settings import ExampleSettings
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.hdf5.write import new_dataset
from dwiml_func.data.resampling import Resampling
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.experiment.config import BatchConfig, RunConfig
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


@pytest.fixture
def out(tmp_path: Path, example_hdf5: Path, few_seeds: None) -> Path:
    """A benchmark's folder in which the data are there: a few streamlines of each bundle, sub_5 left out."""
    path = tmp_path / "out" / "data" / "crossings" / "sub_5.hdf5"
    path.parent.mkdir(parents=True)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    with h5py.File(example_hdf5) as source, h5py.File(path, "w") as file:
        file.attrs.update(source.attrs)
        for person in source:
            whole: Any = source[person]
            source.copy(whole["input"], file.create_group(person), "input")
            source.copy(whole["wm_mask"], file[person], "wm_mask")
            source.copy(whole["streamlines"], file[person], "streamlines")
            group: Any = file[f"{person}/streamlines"]
            lengths, ids = group["lengths"][:], group["bundle_ids"][:]
            kept = np.arange(len(lengths)) % 5 == 0
            of_points = np.repeat(kept, lengths)
            new = {"data": group["data"][:][of_points], "lengths": lengths[kept], "bundle_ids": ids[kept]}
            new["offsets"] = np.cumsum(new["lengths"]) - new["lengths"]
            for name, values in new.items():
                if name in group:
                    del group[name]
                    group.create_dataset(name, data=values)
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
        assert torch.equal(added.points[added.offsets[:-1]], ends)  # begins where the given part ends, and goes on in
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
    for damaged, named in (
        (whole_scores.replace(f'"valid": {valid},', '"valid": 0.987,'), "corrupt"),
        (whole_scores[:-40], "not JSON"),
        (json.dumps({"data": "crossings", "tracker": "tiny", "person": "sub_5", "seed": 2}), "corrupt"),
    ):
        assert damaged != whole_scores
        path.write_text(damaged)
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


def test_an_experiment_on_other_data_is_refused(cli: Any, tmp_path: Path, stopped_early: Path) -> None:
    run = tmp_path / f"{ORACLE}.1"  # of a folder the whole name counts, of a file what is before its ending
    run.symlink_to(stopped_early / "run")
    cli("benchmark", tmp_path / "out", "--model", run).check_refusal("data.hdf5", "config to train")
    config = tmp_path / f"{ORACLE}.json"
    config.symlink_to(run / "config.json")
    cli("benchmark", tmp_path / "out", "--model", config).check_refusal("--name: expected", repr(ORACLE))
