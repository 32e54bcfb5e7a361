"""Claims about the evaluation: all errors on the same points, means over points."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.data.streamlines import Streamlines, directions
from dwiml_func.experiment.evaluation import evaluate_directions, is_evaluated
from dwiml_func.models.baselines import angular_error, keep_straight, principal_direction

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"


@pytest.fixture(scope="module")
def dataset() -> StreamlineDataset:
    return open_dataset(PHANTOM, "validation")


def load(dataset: StreamlineDataset, ids: np.ndarray) -> StreamlineBatch:
    return load_batch(BatchRequest(ids, None, 0, 0), dataset=dataset, spec=LoaderSpec())


def truth(batch: StreamlineBatch) -> Tensor:
    return directions(batch.points, batch.offsets)


def streamlines_of_file() -> list[np.ndarray]:
    """The validation subject's streamlines, read without the package."""
    with h5py.File(PHANTOM) as file:
        group = file["subj2/streamlines"]
        assert isinstance(group, h5py.Group)
        data, starts, lengths = (np.asarray(group[name]) for name in ("data", "offsets", "lengths"))
    return [data[start : start + length].astype(np.float64) for start, length in zip(starts, lengths, strict=True)]


def test_keeping_straight_is_the_mean_angle_between_neighbouring_segments(dataset):
    angles = []
    for line in streamlines_of_file():
        units = np.diff(line, axis=0)
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        angles.append(np.degrees(np.arccos(np.clip((units[1:] * units[:-1]).sum(axis=1), -1, 1))))
    evaluation = evaluate_directions(truth, [load(dataset, np.arange(48))], {})
    assert evaluation.keep_straight == pytest.approx(np.concatenate(angles).mean(), abs=1e-3)
    assert evaluation.num_points == len(np.concatenate(angles))
    assert evaluation.num_streamlines == 48
    of_baseline = evaluate_directions(lambda batch: keep_straight(batch)[0], [load(dataset, np.arange(48))], {})
    assert of_baseline.model == evaluation.keep_straight


def test_the_true_directions_have_no_error_whatever_their_length(dataset):
    batches = [load(dataset, np.arange(48))]
    assert evaluate_directions(truth, batches, {}).model == pytest.approx(0, abs=1e-3)
    assert evaluate_directions(lambda batch: 7 * truth(batch), batches, {}).model == pytest.approx(0, abs=1e-3)
    assert evaluate_directions(lambda batch: -truth(batch), batches, {}).model == pytest.approx(180, abs=1e-3)


def test_points_without_a_previous_direction_do_not_count(dataset):
    def wrong_at_the_first_points(batch: StreamlineBatch) -> Tensor:
        predicted = truth(batch)
        predicted[batch.offsets[:-1] - torch.arange(len(batch))] *= -1
        return predicted

    assert evaluate_directions(wrong_at_the_first_points, [load(dataset, np.arange(48))], {}).model < 1e-3


def test_the_cut_into_batches_does_not_matter(dataset):
    def predict(batch: StreamlineBatch) -> Tensor:
        return truth(batch) + 0.1

    whole = evaluate_directions(predict, [load(dataset, np.arange(48))], {"sh_order": 2})
    parts = [load(dataset, ids) for ids in np.split(np.arange(48), [1, 7, 40])]
    cut = evaluate_directions(predict, parts, {"sh_order": 2})
    for name in ("model", "keep_straight", "principal_direction"):
        assert getattr(cut, name) == pytest.approx(getattr(whole, name), abs=1e-6)
    assert (cut.num_points, cut.num_streamlines) == (whole.num_points, whole.num_streamlines)


def test_the_principal_direction_is_measured_on_the_same_points(dataset):
    batch = load(dataset, np.arange(48))
    principal = principal_direction(batch, {"sh_order": 2})
    assert principal is not None
    predictions, valid = principal
    expected = angular_error(predictions[valid], truth(batch)[valid]).double().mean().item()
    evaluation = evaluate_directions(truth, [batch], {"sh_order": 2})
    assert evaluation.principal_direction == pytest.approx(expected, abs=1e-9)
    assert evaluation.num_points == int(valid.sum())


def test_the_principal_direction_reads_the_first_features_alone(dataset):
    batch = load(dataset, np.arange(48))
    around = replace(batch, inputs=torch.cat([batch.inputs, torch.rand(batch.num_points, 12)], dim=1))
    alone = evaluate_directions(truth, [batch], {"sh_order": 2})
    assert evaluate_directions(truth, [around], {"sh_order": 2}, num_features=6) == alone


def test_without_knowing_the_input_there_is_no_principal_direction(dataset):
    assert evaluate_directions(truth, [load(dataset, np.arange(3))], {}).principal_direction is None


def test_predictions_need_no_gradient(dataset):
    weight = torch.ones(3, requires_grad=True)

    def predict(batch: StreamlineBatch) -> Tensor:
        predicted = truth(batch) * weight
        assert not predicted.requires_grad
        return predicted

    evaluate_directions(predict, [load(dataset, np.arange(3))], {})


def test_an_evaluation_is_of_as_many_epochs_and_of_the_best_of_them(stopped_early, tmp_path):
    run = Path(shutil.copytree(stopped_early / "run", tmp_path / "run"))
    checkpoint = newest(run)
    assert checkpoint is not None
    history = checkpoint.history  # of 3 epochs; the second one is the best, also of 2
    assert [is_evaluated(run, history[:num]) for num in (1, 2, 3)] == [False, False, True]
    values = json.loads((run / "evaluation.json").read_text())
    del values["num_epochs"], values["checksum"]  # as of earlier versions
    (run / "evaluation.json").write_text(json.dumps(values))
    assert [is_evaluated(run, history[:num]) for num in (1, 2, 3)] == [False, True, True]


def test_no_point_gives_nan():
    lines = Streamlines.from_list([[[0, 0, 0], [1, 0, 0]]])
    one = torch.zeros(1, dtype=torch.int64)
    batch = StreamlineBatch(points=lines.points, offsets=lines.offsets, subject=one, ids=one, inputs=torch.zeros(1, 6))
    for batches, num_streamlines in ([], 0), ([batch], 1):
        evaluation = evaluate_directions(truth, batches, {})
        assert math.isnan(evaluation.model)
        assert math.isnan(evaluation.keep_straight)
        assert (evaluation.num_points, evaluation.num_streamlines) == (0, num_streamlines)
