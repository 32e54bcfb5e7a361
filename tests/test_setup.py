"""Claims about the parts of a run: which batches they give, and where."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from experiment_cases import (
    BATCHES,
    CONFIG,
    without_validation,
)

from dwiml_func import Key
from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.cli._training import describe_run
from dwiml_func.experiment.batches import first_batch, open_data
from dwiml_func.experiment.folder import create_experiment
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import make_parts, prepare


def test_a_capped_validation_sees_the_same_streamlines_every_epoch():
    parts = prepare(replace(CONFIG, batches=replace(BATCHES, max_batches_per_epoch_validation=1)))
    assert parts.valid is not None
    ids = [[batch.ids.tolist() for batch in parts.valid(Key(1234), epoch, 0)] for epoch in (0, 1)]
    assert ids[0] == ids[1]
    assert [len(batch) for batch in ids[0]] == [20]


def test_batches_on_another_device_are_as_many_and_arrive_there(monkeypatch):
    monkeypatch.setattr("dwiml_func.experiment.setup._device", lambda training: torch.device("meta"))
    batches: Any = prepare(CONFIG).train(Key(1234), 0, 1)
    assert len(batches) == 2
    assert [batch.points.device.type for batch in batches] == ["meta", "meta"]


def test_copies_on_a_device_are_no_part_of_what_the_data_are():
    data = open_data(CONFIG)
    other = replace(data, on_device={"meta": {}})
    assert other == data
    assert "meta" not in repr(other)


@pytest.mark.parametrize("num_shards", [1, 2, 50])  # of batches of 40 streamlines
@pytest.mark.parametrize("pads", ["off", "on"])
def test_steps_are_compiled_for_the_first_batch_or_its_first_shard(num_shards, pads):
    training = replace(CONFIG.training, num_shards=num_shards, pad_batches=pads, rng=7)
    parts = prepare(replace(CONFIG, training=training))
    expected = next(iter(parts.train(parts.first_state().key, 0, 0)))
    expected = expected[0] if num_shards > 1 else expected
    batch = first_batch(parts.config, parts.data, torch.device("cpu"))
    assert torch.equal(batch.points, expected.points)
    assert batch.padded_length == expected.padded_length
    assert (batch.padded_length is None) == (pads == "off")
    assert first_batch(parts.config, parts.data, torch.device("meta")).points.device.type == "meta"


@pytest.mark.parametrize(
    ("changes", "is_member", "expected"),
    [
        ({}, False, ["lag"]),
        ({}, True, []),
        ({"skip_window_lag": True}, False, []),
        ({"add_a_tracking_validation_phase": True, "tracking_mask": "wm_mask"}, False, ["lag", "phase"]),
        ({"add_a_tracking_validation_phase": True, "tracking_mask": "wm_mask"}, True, []),
    ],
)
@pytest.mark.parametrize("validates", [True, False])
def test_what_is_tracked_at_validations(tmp_path, monkeypatch, changes, is_member, expected, validates):
    found = []

    def note(name, valid, evaluate, **given):
        found.append(name)
        assert given == {"config": config, "dataset": data.validation, "model": ANY, "optimizer": ANY}
        return valid, evaluate

    monkeypatch.setattr("dwiml_func.experiment.setup.with_window_lag", partial(note, "lag"))
    monkeypatch.setattr("dwiml_func.experiment.setup.with_tracking_phase", partial(note, "phase"))
    path = CONFIG.hdf5_file if validates else str(without_validation(tmp_path))
    config = replace(CONFIG, hdf5_file=path, training=replace(CONFIG.training, **changes))
    data = open_data(config)
    parts = make_parts(config, data, is_member=is_member)
    assert (parts.valid is not None) == validates
    assert found == (expected if validates else [])


def test_a_model_is_never_judged_on_augmented_streamlines(tmp_path):
    augmented = replace(BATCHES, split_ratio=1.0, noise_gaussian_size_forward=0.01)
    parts = prepare(replace(CONFIG, hdf5_file=str(without_validation(tmp_path)), batches=augmented))
    assert parts.data.evaluation is parts.data.training
    assert sum(len(batch) for batch in parts.train(Key(1234), 0, 0)) > 96
    batches = list(parts.evaluation(Key(1234), 0, 0))
    assert sum(len(batch) for batch in batches) == 96
    assert all(batch.noisy_points is None for batch in batches)


@pytest.mark.parametrize("subset", ["training", "validation"])
def test_voxels_that_are_no_cubes_are_told_whichever_subset_has_them(subset):
    parts = prepare(CONFIG)
    what = "96 streamlines of 2 training subjects, 48 of 1 validation subject"
    own = sum(tensor.numel() for tensor in parts.model.parameters())
    assert describe_run(Path("run"), parts) == f"run: {what}, 6 features, {own} parameters"
    config: Any = SimpleNamespace(model=SimpleNamespace(model="autoencoder"), batches=parts.config.batches)
    told = describe_run(Path("run"), replace(parts, config=config))
    points = f"{parts.config.batches.nb_points} points each, {own} parameters. An autoencoder does not track: "
    assert told == f"run: {what}, {points}no window lag, no tracking scores"
    dataset = getattr(parts.data, subset)
    sizes = dataset.voxel_sizes.clone()
    sizes[-1, 2] *= 1.5
    changed: Any = {subset: replace(dataset, voxel_sizes=sizes)}
    told = describe_run(Path("run"), replace(parts, data=replace(parts.data, **changed)))
    assert told.endswith(". Voxels are no cubes: directions, steps and noise are in mm along the voxel axes")


@pytest.mark.parametrize("num_shards", [1, 2])
def test_parts_can_be_used_again(tmp_path, num_shards):
    """Also where the steps reuse the memory of the states that they are given."""
    config = replace(CONFIG, training=replace(CONFIG.training, num_shards=num_shards))
    parts, digests = prepare(config), set()
    for name in ("first", "second"):
        list(run_experiment(create_experiment(tmp_path, name, config), parts))
        digests.add(read(tmp_path / name).digest)
    assert len(digests) == 1
