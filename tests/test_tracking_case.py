"""Claims about what a model is asked to track in a subject: its lines, mask, space and who else tracks there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from experiment_cases import CONFIG
from tracking_cases import FieldModel

from dwiml_func.core.rng import Key
from dwiml_func.data import StreamlineDataset, open_dataset
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.config import BatchConfig, DataConfig
from dwiml_func.data.hdf5.write import new_dataset, write_streamlines, write_volume
from dwiml_func.experiment.tracking import evaluation as tracking_evaluation
from dwiml_func.experiment.tracking import phase
from dwiml_func.experiment.tracking.case import KEEP_STRAIGHT, ORACLE, PRINCIPAL_DIRECTION, tracking_case
from dwiml_func.experiment.tracking.evaluation import evaluate_tracking, write_tracking_evaluation
from dwiml_func.experiment.tracking.recorded import read_drift, read_scores, read_tracking
from dwiml_func.tracking import protocols
from dwiml_func.tracking.spec import TrackingSpec

SIZES = (2.0, 1.5, 3.0)  # of the first subject
SHAPE = (30, 12, 8)
COUNTS = {"bob": (6, 4), "cid": (2, 5)}  # streamlines of two bundles


def write(path: Path, counts: dict[str, tuple[int, int]] = COUNTS, *, sizes: tuple[float, ...] = SIZES) -> Path:
    """Straight streamlines along x, 21 points of 1 voxel, at heights of their bundle; masks of two names."""
    rng = np.random.default_rng(0)
    with new_dataset(path, training=[], validation=list(counts), groups_config={}, date="") as file:
        for number, (subject, numbers) in enumerate(counts.items()):
            group, affine = file.create_group(subject), np.diag([*(size + number for size in sizes), 1.0])
            affine[:3, 3] = [5, -7, 11]
            write_volume(group, "input", rng.normal(size=(*SHAPE, 6)), affine, attributes={"sh_order": 2})
            for name, first in (("wm_mask", 4 + number), ("other", 5 + number)):
                mask = np.zeros((*SHAPE, 1))
                mask[first:26] = 1
                write_volume(group, name, mask, affine)
            ids = np.repeat([0, 1], numbers)
            x, y = np.arange(5, 26) + 0.25, 2.5 + 6 * ids + rng.uniform(0, 2, len(ids))
            lines = [np.stack([x, np.full(21, each), np.full(21, 4.5)], axis=1) for each in y]
            points = np.concatenate([*lines, np.empty((0, 3))])
            where: dict[str, Any] = {"affine": affine, "dimensions": SHAPE, "bundles": Bundles(("left", "right"), ids)}
            write_streamlines(group, "streamlines", points, 21 * np.arange(len(ids) + 1), **where)
            lines_group: Any = group["streamlines"]
            lines_group["connectivity_matrix"] = rng.random((8, 8)) < 0.5
            lines_group.attrs["connectivity_matrix_type"] = "from_blocs"
            lines_group.attrs["connectivity_nb_blocs"] = (2, 2, 2)
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> StreamlineDataset:
    return open_dataset(write(tmp_path_factory.mktemp("case") / "data.hdf5"), "validation")


def test_a_case_is_the_first_subject_as_the_model_reads_it(dataset: StreamlineDataset) -> None:
    case = tracking_case(dataset, replace(CONFIG, data=DataConfig(interpolation="nearest")))
    assert case is not None
    assert (case.subject, len(case.real), case.bundles.names) == ("bob", 10, ("left", "right"))
    assert case.bundles.ids.tolist() == [0] * 6 + [1] * 4
    assert torch.equal(case.real.points, dataset.streamlines.select(np.arange(10)).points)
    np.testing.assert_allclose(case.in_mm.points.numpy(), case.real.points.numpy() * SIZES, rtol=1e-6)
    assert (case.in_mm.lengths.tolist(), case.spec) == ([21] * 10, TrackingSpec(step_size=2.0))
    assert (case.space.voxel_sizes, case.space.interpolation) == (SIZES, "nearest")
    assert case.attributes["sh_order"] == 2
    assert torch.equal(case.space.volume, dataset.volumes[0])
    np.testing.assert_allclose(case.grid.affine[:, 3], [5, -7, 11, 1])
    assert [reference.name for reference in case.references] == ["left", "right"]
    finer = tracking_case(dataset, replace(CONFIG, batches=BatchConfig(step_size=1.0004)))
    assert finer is not None
    assert (finer.spec.step_size, finer.real.lengths.tolist()) == (1.0004, [41] * 10)


def test_beside_a_model_track_those_that_the_volume_allows(tmp_path: Path) -> None:
    data = DataConfig(neighborhood_type="axes", neighborhood_radius=1, neighborhood_resolution=1.5)
    cubes = open_dataset(write(tmp_path / "cubes.hdf5", sizes=(2.0, 2.0, 2.0)), "validation")
    case = tracking_case(cubes, replace(CONFIG, data=data))
    assert case is not None
    assert case.space.neighborhood == data.neighborhood
    others = case.baselines()
    assert list(others) == [KEEP_STRAIGHT, PRINCIPAL_DIRECTION, ORACLE]
    assert others[KEEP_STRAIGHT][1] is case.space
    assert others[PRINCIPAL_DIRECTION][1].neighborhood is None
    assert others[ORACLE][1].volume.shape[3] == 3  # positions
    assert list(case._replace(attributes={}).baselines()) == [KEEP_STRAIGHT, ORACLE]


def test_the_mask_is_the_white_matters_or_that_of_the_training_where_it_fits(tmp_path: Path) -> None:
    path = write(tmp_path / "data.hdf5")

    def mask(name: str | None = None) -> list[int] | None:
        config = replace(CONFIG, training=replace(CONFIG.training, tracking_mask=name))
        case = tracking_case(open_dataset(path, "validation"), config)
        assert case is not None
        assert (case.mask is None) == (case.space.mask is None)
        if case.mask is None or case.space.mask is None:
            return None
        assert torch.equal(case.mask, case.space.mask.values)
        return case.mask.sum(dim=(1, 2)).nonzero()[:, 0].tolist()

    assert (mask(), mask("other"), mask("no_such")) == ([*range(4, 26)], [*range(5, 26)], None)
    with h5py.File(path, "r+") as file:
        values: Any = file["bob/wm_mask/data"]
        values[...] = 0
        group: Any = file["bob/other"]
        del group["data"]
        group["data"] = np.ones((29, 12, 8, 1), np.float32)
    assert (mask(), mask("other")) == (None, None)


def without_bundles(file: Any) -> None:
    for subject in COUNTS:
        del file[f"{subject}/streamlines/bundle_ids"]


def uneven_steps(file: Any) -> None:
    points = file["bob/streamlines/data"]
    points[...] = np.where(np.arange(len(points))[:, None] % 21 > 9, points[...] + [3.0, 0, 0], points[...])
    points[...] = points[...] ** [1.2, 1, 1] / [2, 1, 1]


@pytest.mark.parametrize(
    ("counts", "spoil"),
    [
        (COUNTS, without_bundles),
        (COUNTS, uneven_steps),
        ({"bob": (6, 1), "cid": (2, 5)}, None),  # whose thresholds cannot be known
        ({"bob": (0, 0), "cid": (2, 5)}, None),
    ],
)
def test_without_bundles_of_even_steps_there_is_no_case(tmp_path: Path, counts: Any, spoil: Any) -> None:
    path = write(tmp_path / "data.hdf5", counts)
    if spoil is not None:
        with h5py.File(path, "r+") as file:
            spoil(file)
    found = open_dataset(path, "validation")
    assert tracking_case(found, CONFIG) is None
    model: Any = FieldModel(lambda inputs: inputs[:, :3])
    assert evaluate_tracking(model, found, CONFIG) is None


def test_a_bundle_without_streamlines_in_the_first_subject_is_left_out(tmp_path: Path) -> None:
    case = tracking_case(open_dataset(write(tmp_path / "a.hdf5", {"bob": (0, 4), "cid": (2, 5)}), "validation"), CONFIG)
    assert case is not None
    assert ([reference.name for reference in case.references], len(case.real)) == (["right"], 4)


class AlongX(FieldModel):
    """Always goes along x, whatever it reads."""

    def __init__(self, max_len: int | None = None) -> None:
        super().__init__(lambda inputs: torch.tensor([1.0, 0, 0]).expand(len(inputs), 3))
        self.max_len = max_len


def test_an_evaluation_has_the_scores_of_all_by_protocol_and_its_record_is_read_back(
    dataset: StreamlineDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocols, "NUM_FREE", 12)
    monkeypatch.setattr(protocols, "NUM_CORE", 8)
    model: Any = AlongX()
    found = evaluate_tracking(model, dataset, CONFIG)
    case = tracking_case(dataset, CONFIG)
    assert found is not None
    assert case is not None
    assert (found.subject, found.subset, found.step_size, found.has_mask) == ("bob", "validation", 2.0, True)
    assert list(found.scores) == ["model", KEEP_STRAIGHT, PRINCIPAL_DIRECTION, ORACLE]
    tracked = case.track(model, case.space, key=Key(CONFIG.training.rng))
    assert repr(found.scores["model"]) == repr({protocol: lines.scores for protocol, lines in tracked.items()})
    assert max(each.both_ends for each in found.scores["model"].values()) > 0
    ceiling = case.ceiling()
    assert ceiling is not None
    assert (found.ceiling_valid, found.ceiling_both_ends) == (ceiling.all.valid, ceiling.all.both_ends)
    assert found.lines is not None
    assert found.lines.names == ("left", "right")
    real = found.lines.real  # in RAS mm: the first voxel's centre is the affine's offset
    expected = (case.real.points.double().numpy() - 0.5) * SIZES + [5, -7, 11]
    np.testing.assert_allclose(real.lines.points.numpy(), expected, atol=1e-4)
    assert (real.bundle.tolist(), real.valid.all(), real.lines.lengths.tolist()) == (
        [0] * 6 + [1] * 4,
        True,
        [21] * 10,
    )
    for protocol, shown in found.lines.tracked.items():
        own = tracked[protocol]
        np.testing.assert_allclose(shown.lines.points, own.lines.points + torch.tensor([4, -7.75, 9.5]), atol=1e-4)
        assert shown.valid.tolist() == own.found.valid.tolist()
        assert shown.bundle.tolist() == own.found.bundle.tolist()

    write_tracking_evaluation(tmp_path, found, epoch=3)
    recorded = read_tracking(tmp_path)
    assert recorded is not None
    assert recorded[:5] == (3, "bob", "validation", 2.0, True)
    assert recorded.ceiling == (found.ceiling_valid, found.ceiling_both_ends)
    for who, by_protocol in found.scores.items():
        assert recorded.shares[who] == {name: (each.valid, each.both_ends) for name, each in by_protocol.items()}
    assert recorded.num_streamlines == {name: each.num_streamlines for name, each in found.scores["model"].items()}
    assert read_scores(tmp_path)["model"]["core"]["num_started"] == 8
    drift = read_drift(tmp_path)
    assert drift is not None
    assert (drift.gone_mm, list(drift.lag_mm)) == (protocols.DRIFT_MM, list(found.scores))
    np.testing.assert_array_equal(np.array(drift.lag_mm["model"], float), tracked["continue"].drift_mm)
    assert read_tracking(tmp_path / "no_such") is None


def test_pictures_have_at_most_300_streamlines_evenly_spaced(dataset: StreamlineDataset, monkeypatch) -> None:
    monkeypatch.setattr(tracking_evaluation, "_MOST_SHOWN", 4)
    case = tracking_case(dataset, CONFIG)
    assert case is not None
    valid = np.arange(10) > 5
    shown = tracking_evaluation._shown(case.in_mm, case.bundles.ids, valid, case.grid, torch.tensor(SIZES))
    assert (shown.bundle.tolist(), shown.valid.tolist()) == ([0, 0, 1, 1], [False, False, True, True])  # 0, 3, 6, 9
    y = dataset.streamlines.select([0, 3, 6, 9]).points[::21, 1]
    np.testing.assert_allclose(shown.lines.points[::21, 1], (y - 0.5) * 1.5 - 7, rtol=1e-5)


@pytest.mark.parametrize(("max_len", "longest", "least"), [(None, 300, 10), (150, 300, 10), (20, 40, 10), (3, 6, 6)])
def test_a_transformer_tracks_as_far_as_it_can_read(max_len: int | None, longest: float, least: float) -> None:
    model: Any = AlongX(max_len)
    spec = tracking_evaluation._readable(TrackingSpec(step_size=2.0), model)
    assert spec == TrackingSpec(step_size=2.0, max_length=longest, min_length=least)


@pytest.mark.parametrize("step_size", [None, 1.0])
def test_a_phase_has_each_subjects_own_lines_mask_and_connectivity(
    dataset: StreamlineDataset, monkeypatch: pytest.MonkeyPatch, step_size: float | None
) -> None:
    training = replace(CONFIG.training, tracking_mask="other", add_a_tracking_validation_phase=True)
    config = replace(CONFIG, training=training, batches=BatchConfig(step_size=step_size))
    found = phase.open_phase(config, dataset)
    assert found.subject.tolist() == [0] * 10 + [1] * 7
    assert found.step_size == pytest.approx(step_size or 2.0, rel=1e-6)  # the median: 3 mm in the second subject
    assert len(found.real) == 17
    if step_size is None:
        assert torch.equal(found.real.points, dataset.streamlines.select(np.arange(17)).points)
    else:
        assert found.real.lengths.tolist() == [41] * 10 + [61] * 7  # voxels of 2 and of 3 mm
    assert [mask.sum(dim=(1, 2)).nonzero()[0].item() for mask in found.masks] == [5, 6]
    with h5py.File(dataset.path) as file:
        for subject, own in zip(COUNTS, found.connectivity, strict=True):
            group: Any = file[subject]
            assert own is not None
            np.testing.assert_array_equal(own.matrix, group["streamlines/connectivity_matrix"][()])
    monkeypatch.setattr(phase, "_MOST_LINES", 6)
    few, again = phase.open_phase(config, dataset), phase.open_phase(config, dataset)
    assert len(few.real) == 6
    assert few.subject.tolist() == sorted(few.subject.tolist())
    assert set(few.subject.tolist()) == {0, 1}
    assert torch.equal(few.real.points, again.real.points)
