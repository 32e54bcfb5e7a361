"""Tracking with LSTM 100+100 on the example data: points per second of the processor, beside its matrix products."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from timing import medians_of
from torch import Tensor
from verdicts import conclude

from dwiml_func import Key
from dwiml_func.data.example.dataset import make_example_data
from dwiml_func.dwi_ml.models import read_dwi_ml_model
from dwiml_func.models.direction_getters import DirectionGetter
from dwiml_func.tracking import TrackingMask, TrackingSpace, TrackingSpec, seeds_in_mask, track
from dwiml_func.tracking.track import NUM_ROWS

MODEL = Path(__file__).parents[1] / "tests" / "data" / "tracking" / "best_model"
LIMIT = 80_000  # dwi_ml tracks 12,500 to 19,000 with the same model and data, 500 lines at a time
FORWARD, BOTH, PRODUCTS = "one direction", "both directions", "products"


class Counted:
    """A model that counts how often it runs."""

    def __init__(self, model: Any) -> None:
        self.model, self.nb_previous_dirs, self.num_runs = model, model.nb_previous_dirs, 0
        self.direction_getter: DirectionGetter = model.direction_getter

    def run_step(self, inputs: Tensor, dirs: Tensor, state: Any = None, /) -> tuple[Tensor, Any]:
        """Run the model."""
        self.num_runs += 1
        return self.model.run_step(inputs, dirs, state)

    def run_step_in_place(self, inputs: Tensor, dirs: Tensor, state: Any = None, /) -> tuple[Tensor, Any]:
        """Run the model in place."""
        self.num_runs += 1
        return self.model.run_step_in_place(inputs, dirs, state)


def main() -> int:
    """Print points per second, and the share of the time that the bare matrix products take. Exit code 1 if slow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="seeds in the white matter (default: 10000)")
    parser.add_argument("--rounds", type=int, default=3, help="trackings of each kind (default: 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = read_dwi_ml_model(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        make_example_data(Path(folder) / "example.hdf5")
        with h5py.File(Path(folder) / "example.hdf5") as file:
            volume, mask = (torch.from_numpy(np.array(file[f"sub_5/{group}/data"])) for group in ("input", "wm_mask"))
    space = TrackingSpace(
        volume=volume,
        voxel_sizes=(2.0, 2.0, 2.0),
        mask=TrackingMask(values=mask[..., 0]),
        interpolation=loaded.config.data.interpolation,
    )
    seeds = seeds_in_mask(mask[..., 0], nt=options.seeds, key=Key(1))
    rates: dict[str, list[float]] = {FORWARD: [], BOTH: []}
    shares: dict[str, list[float]] = {FORWARD: [], BOTH: []}
    for _ in range(options.rounds):
        for name in rates:
            spec = TrackingSpec(step_size=1, track_forward_only=name == FORWARD, min_length=0, max_length=250)
            model = Counted(loaded.module)
            start = time.process_time()
            results = list(track(seeds, model=model, space=space, spec=spec, key=Key(1)))
            seconds = time.process_time() - start
            num_points = sum(len(tracked.streamlines.points) for tracked in results)
            rates[name].append(num_points / seconds)
            shares[name].append(model.num_runs * seconds_of_products() / seconds)
    print(f"{options.seeds} seeds, {NUM_ROWS['cpu']} lines at once, 1 thread")
    for name, rate in medians_of(rates).items():
        share = medians_of(shares)[name]
        print(f"{name:16} {rate:9,.0f} points per second of the processor; matrix products alone {share:.0%} of it")
    rate = medians_of(rates)[FORWARD]
    return conclude([(rate >= LIMIT, f"{rate:,.0f} points per second, at least {LIMIT:,} required")])


def seconds_of_products(num: int = 20) -> float:
    """Seconds of the processor that the matrix products of one step of all lines take, without anything else."""
    rows = NUM_ROWS["cpu"]
    shapes = [(132, 400), (201, 400), (100, 50), (50, 3)]  # of LSTM: the input, the hidden state and a one
    factors = [(torch.randn(rows, size), torch.randn(size, width), torch.empty(rows, width)) for size, width in shapes]
    start = time.process_time()
    for _ in range(num):
        for a, b, out in factors:
            torch.mm(a, b, out=out)
    return (time.process_time() - start) / num


if __name__ == "__main__":
    sys.exit(main())
