"""Datasets, plans and batches print in one short line, whatever their size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dwiml_func.core.rng import Key
from dwiml_func.data import BatchRequest, LoaderSpec, SamplerSpec, Streamlines, load_batch, open_dataset, sample_epoch
from dwiml_func.data.shards import cut_batch

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
DATASETS = {lazy: open_dataset(PHANTOM, lazy=lazy) for lazy in (False, True)}
BATCH = load_batch(BatchRequest(np.arange(90), None, 0, 0), dataset=DATASETS[False], spec=LoaderSpec())


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (DATASETS[False], ["StreamlineDataset", "2 subjects", "96 streamlines", "6 features", "in memory"]),
        (DATASETS[True], ["StreamlineDataset", "2 subjects", "96 streamlines", "6 features", "lazy"]),
        (replace(DATASETS[False], path=Path("x" * 5000)), ["xxx..."]),
        (DATASETS[False].index, ["DatasetIndex", "2 subjects", "96 streamlines, lengths in mm>"]),
        (replace(DATASETS[False].index, lengths_mm=None), ["96 streamlines, no lengths in mm>"]),
        (DATASETS[False].streamlines, ["Streamlines", "96 streamlines", "4237 points", "float32", "cpu"]),
        (DATASETS[True].streamlines, ["LazyStreamlines", "96 streamlines", "4237 points"]),
        (DATASETS[True].volumes, ["LazyVolumes", "2 volumes", "6 features"]),
        (BATCH, ["StreamlineBatch", "90 streamlines", "points", "(3952, 6)", "float32", "cpu>"]),
        (replace(BATCH, noisy_points=BATCH.points), ["cpu, noisy_points>"]),
        (replace(BATCH, noisy_targets=BATCH.points), ["cpu, noisy_targets>"]),
        (BATCH.to("meta"), ["meta"]),
        (cut_batch(BATCH, 4), ["ShardedBatch", "4 shards", "90 streamlines, 4042 points>"]),
        (
            Streamlines(torch.zeros(5, 3, dtype=torch.float64), torch.tensor([0, 5])),
            ["1 streamline, 5 points"],
        ),
        (sample_epoch(DATASETS[False].index, SamplerSpec(batch_size=10), Key(1), 0), ["EpochPlan", "10 batches"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_repr_is_one_line_of_at_most_200_characters(value: object, named: list[str]) -> None:
    text = repr(value)
    assert "\n" not in text
    assert len(text) <= 200
    for name in named:
        assert name in text
