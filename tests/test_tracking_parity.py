"""A model that dwi_ml trained, and the lines that dwi_ml tracked with it on the example data.

dwi_ml's options: --step_size 1 --nt 200 --rng_seed 7 --min_length 0 --max_length 250 --simultaneous_tracking 200, with
the white matter mask for seeds and lines.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dwiml_func.core.rng import Key
from dwiml_func.dwi_ml.models import read_dwi_ml_model
from dwiml_func.models.tractography_model import TractographyModel
from dwiml_func.tracking import TrackingMask, TrackingSpace, TrackingSpec, track

CASES = Path(__file__).parent / "data" / "tracking"


@pytest.mark.parametrize("name", ["forward", "both_ways"])
def test_lines_are_those_of_dwi_ml(name, example_hdf5):
    model = read_dwi_ml_model(CASES / "best_model")
    with h5py.File(example_hdf5) as file:
        volume, mask = (torch.from_numpy(np.array(file[f"sub_5/{group}/data"])) for group in ("input", "wm_mask"))
    space = TrackingSpace(
        volume=volume,
        voxel_sizes=(2.0, 2.0, 2.0),
        mask=TrackingMask(values=mask[..., 0]),
        interpolation=model.config.data.interpolation,
    )
    spec = TrackingSpec(
        step_size=1,
        min_length=0,
        max_length=249,
        track_forward_only=name == "forward",  # dwi_ml counts 250 points
    )
    with np.load(CASES / f"{name}.npz") as case:
        seeds, points, offsets = case["seeds"], case["points"], case["offsets"]
    assert isinstance(model.module, TractographyModel)
    results = list(track(torch.from_numpy(seeds), model=model.module, space=space, spec=spec, key=Key(0), num_rows=256))
    numbers = torch.cat([tracked.seeds for tracked in results]).tolist()
    lines = [line.numpy() for tracked in results for line in tracked.streamlines.to_list()]
    expected = np.split(points, offsets[1:-1])
    assert numbers == list(range(200))

    same_length = np.mean([len(line) == len(other) for line, other in zip(lines, expected, strict=True)])
    assert same_length >= 0.99
    for line, other, seed in zip(lines, expected, seeds, strict=True):
        start, start_there = (np.abs(points - seed).sum(axis=1).argmin() for points in (line, other))
        for ours, theirs in ((line[start:], other[start_there:]), (line[start::-1], other[start_there::-1])):
            num = min(21, len(ours), len(theirs))  # the seed and 20 steps
            np.testing.assert_allclose(ours[:num], theirs[:num], rtol=0, atol=1e-3)
