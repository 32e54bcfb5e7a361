"""The end of streamlines, through the data path: which rows there are, what they hold, and what they cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.data.augmentation import Augmentation
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.dataset import DatasetIndex, StreamlineDataset
from dwiml_func.data.loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.data.resampling import Resampling
from dwiml_func.data.streamlines import Streamlines, directions
from dwiml_func.models.direction_getters.sphere_classification import sphere_vertices
from dwiml_func.models.learn2track import Learn2Track, compute_batch_loss

# Two streamlines of 3 and of 2 points, at the centres of voxels.
LINES = [[[0.5, 0.5, 0.5], [1.5, 0.5, 0.5], [1.5, 2.5, 0.5]], [[3.5, 3.5, 0.5], [3.5, 3.5, 2.5]]]
IS_LAST = [False, False, True, False, True]
TARGETS = [[1.0, 0, 0], [0, 2, 0], [0, 0, 0], [0, 0, 2], [0, 0, 0]]
VOLUME = torch.arange(4 * 4 * 4.0).reshape(4, 4, 4, 1)  # a voxel (x, y, z) holds 16 x + 4 y + z
INPUTS = [[0.0], [16], [24], [60], [62]]


def dataset_of(lines: list[list[list[float]]]) -> StreamlineDataset:
    return StreamlineDataset(
        path=Path("by_hand.hdf5"),
        subset="training",
        index=DatasetIndex(("subj0",), np.array([len(lines)])),
        volumes=(VOLUME,),
        streamlines=Streamlines.from_list(lines),
        voxel_sizes=torch.ones(1, 3),
        input_attributes={},
    )


def loaded(spec: LoaderSpec, lines: list[list[list[float]]] = LINES) -> StreamlineBatch:
    return load_batch(BatchRequest(np.arange(len(lines)), Key(0), 0, 0), dataset=dataset_of(lines), spec=spec)


def model_of(dg_key: str, nb_previous_dirs: int = 1, **dg_args: float | str) -> Learn2Track:
    with torch_rng(Key(3)):
        return Learn2Track(
            1,
            rnn_layer_sizes=(4,),
            nb_previous_dirs=nb_previous_dirs,
            dg_key=dg_key,
            dg_args={"add_eos": True, **dg_args},
        ).eval()


def test_with_eos_the_last_points_have_inputs_and_labels_too():
    batch = loaded(LoaderSpec(add_eos=True))
    assert batch.inputs.tolist() == INPUTS
    assert batch.is_last is not None
    assert batch.is_last.tolist() == IS_LAST
    assert batch.input_offsets.tolist() == batch.offsets.tolist() == [0, 3, 5]
    assert batch.at_inputs(directions(batch.points, batch.offsets)).tolist() == TARGETS
    assert batch.at_directions(torch.tensor(INPUTS)).tolist() == [[0.0], [16], [60]]
    assert (batch.num_points, batch.num_directions) == (5, 3)


def test_without_eos_they_have_neither():
    batch = loaded(LoaderSpec())
    assert batch.inputs.tolist() == [[0.0], [16], [60]]
    assert batch.is_last is None
    assert (batch.num_points, batch.num_directions) == (3, 3)


def test_the_loss_of_a_regression_is_that_of_the_rows_written_out():
    model, batch = model_of("l2-regression", eos_weight=2.0), loaded(LoaderSpec(add_eos=True))
    loss, weight, aux = compute_batch_loss(model, batch)
    outputs = model(batch).detach().double().numpy()
    probabilities = 1 / (1 + np.exp(-outputs[:, 3]))
    cross_entropies = -np.log(np.where(IS_LAST, probabilities, 1 - probabilities))
    distances = np.linalg.norm(outputs[:, :3] - np.array(TARGETS) + 1e-6, axis=1)
    assert loss.item() == pytest.approx((distances + 2 * cross_entropies).mean(), rel=1e-6)
    assert weight == 5
    # Angles are those of the points that have a next direction.
    rows = [0, 1, 3]
    cosines = (outputs[rows, :3] * np.array(TARGETS)[rows]).sum(axis=1)
    cosines /= np.linalg.norm(outputs[rows, :3], axis=1) * np.linalg.norm(np.array(TARGETS)[rows], axis=1)
    error, of_how_many = aux["angular_error"]
    assert error.item() == pytest.approx(np.degrees(np.arccos(cosines)).mean(), rel=1e-5)
    assert of_how_many == 3


def test_in_a_classification_the_end_is_the_last_class():
    model, batch = model_of("sphere-classification", sphere="repulsion100"), loaded(LoaderSpec(add_eos=True))
    loss, weight, _ = compute_batch_loss(model, batch)
    log_probabilities = model(batch).detach().double().log_softmax(dim=1).numpy()
    nearest = (np.array(TARGETS) @ sphere_vertices("repulsion100").double().numpy().T).argmax(axis=1)
    classes = np.where(IS_LAST, 100, nearest)
    assert log_probabilities.shape == (5, 101)
    assert loss.item() == pytest.approx(-log_probabilities[np.arange(5), classes].mean(), rel=1e-6)
    assert weight == 5


def test_the_last_point_is_shown_the_direction_that_led_there():
    model, batch = model_of("cosine-regression", nb_previous_dirs=2), loaded(LoaderSpec(add_eos=True))
    previous = torch.tensor(
        [[0.0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 2, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 2, 0, 0, 0]]
    )
    x = torch.cat([torch.tensor(INPUTS), previous], dim=1)
    expected = [model.direction_getter(model.rnn_model(rows, [1] * len(rows))) for rows in (x[:3], x[3:])]
    torch.testing.assert_close(model(batch), torch.cat(expected))


def test_noise_on_the_targets_does_not_reach_the_labels():
    model, batch = model_of("l2-regression", eos_weight=1.0), loaded(LoaderSpec(add_eos=True))
    noisy = replace(batch, noisy_targets=batch.points + 0.25 * torch.arange(5.0)[:, None])
    outputs = model(batch).detach()
    moved = noisy.at_inputs(directions(noisy.target_points, noisy.offsets))
    expected = model.direction_getter.losses(outputs, moved, batch.is_last).mean()
    assert moved[torch.tensor(IS_LAST)].tolist() == [[0, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(compute_batch_loss(model, noisy)[0], expected)


@pytest.mark.parametrize(
    "spec",
    [
        LoaderSpec(add_eos=True, resampling=Resampling(nb_points=7)),
        LoaderSpec(add_eos=True, augmentation=Augmentation(reverse_ratio=1.0)),
        LoaderSpec(add_eos=True, augmentation=Augmentation(split_ratio=1.0)),
    ],
    ids=["resampled", "reversed", "split"],
)
def test_labels_are_those_of_the_streamlines_as_the_model_sees_them(spec):
    lines = [[[x / 8, 0.5, 0.5] for x in range(31)], [[0.5, y / 8, 1.5] for y in range(25)]]
    batch = loaded(spec, lines)
    assert batch.is_last is not None
    assert batch.is_last.nonzero()[:, 0].tolist() == (batch.offsets[1:] - 1).tolist()
    assert len(batch.inputs) == len(batch.points) == len(batch.is_last)
    assert len(batch) == (4 if spec.augmentation.split_ratio else 2)


@pytest.mark.parametrize("add_eos", [False, True])
def test_a_batch_without_the_rows_that_the_model_needs_is_refused(add_eos):
    with torch_rng(Key(3)):
        model = Learn2Track(1, rnn_layer_sizes=(4,), dg_args={"add_eos": add_eos})
    with pytest.raises(
        ValueError, match=rf"Received: \d rows for 5 points. Load it with LoaderSpec\(add_eos={add_eos}\)"
    ):
        model(loaded(LoaderSpec(add_eos=not add_eos)))
