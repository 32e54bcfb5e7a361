"""Claims about the parts of a run: which batches they give, and where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from experiment_cases import (
    BATCHES,
    CONFIG,
    without_validation,
)

from dwiml_func import Key
from dwiml_func.experiment.setup import prepare


def test_a_capped_validation_sees_the_same_streamlines_every_epoch():
    setup = prepare(replace(CONFIG, batches=replace(BATCHES, max_batches_per_epoch_validation=1)))
    assert setup.valid is not None
    ids = [[batch.ids.tolist() for batch in setup.valid(Key(1234), epoch, 0)] for epoch in (0, 1)]
    assert ids[0] == ids[1]
    assert [len(batch) for batch in ids[0]] == [20]


def test_batches_on_another_device_are_as_many_and_arrive_there(monkeypatch):
    monkeypatch.setattr("dwiml_func.experiment.setup._device", lambda training: torch.device("meta"))
    batches: Any = prepare(CONFIG).train(Key(1234), 0, 1)
    assert len(batches) == 2
    assert [batch.points.device.type for batch in batches] == ["meta", "meta"]


def test_a_model_is_never_judged_on_augmented_streamlines(tmp_path):
    augmented = replace(BATCHES, split_ratio=1.0, noise_gaussian_size_forward=0.01)
    setup = prepare(replace(CONFIG, hdf5_file=str(without_validation(tmp_path)), batches=augmented))
    assert setup.evaluation_set is setup.training_set
    assert sum(len(batch) for batch in setup.train(Key(1234), 0, 0)) > 96
    batches = list(setup.evaluation(Key(1234), 0, 0))
    assert sum(len(batch) for batch in batches) == 96
    assert all(batch.noisy_points is None for batch in batches)
