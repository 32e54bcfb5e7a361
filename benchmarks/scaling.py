"""How a Learn2Track training step grows with the size of its parts: time, memory, fitted exponents and a picture."""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dwiml_func import adam, init_state, module_loss, train_step
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.shards import cut_batch
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.models.learn2track import Learn2Track, compute_batch_loss
from dwiml_func.sharding import sharded_value_and_grad

FEATURES = 45
DEFAULT = {"streamlines": 100, "length": 100, "hidden": 100, "shards": 1}
SIZES = {
    "streamlines": (25, 50, 100, 200, 400),
    "length": (25, 50, 100, 200, 400),
    "hidden": (50, 100, 200, 400),
    "shards": (1, 2, 4, 8, 16),
}
LABELS = {
    "streamlines": "streamlines a batch",
    "length": "points a streamline",
    "hidden": "parameters",
    "shards": "shards a batch",
}


def main() -> int:
    """Print a table for each size and the fitted exponents; with --picture, draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each point (default: 7)")
    parser.add_argument("--picture", type=Path, default=None, help="where to draw the curves, e.g. scaling.png")
    parser.add_argument("--point", default=None, help=argparse.SUPPRESS)  # one point, in a process of its own
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.point:
        print(json.dumps(measure(json.loads(options.point), options.steps)))
        return 0
    print(
        f"torch {torch.__version__}, 1 thread, medians of {options.steps} steps; otherwise {DEFAULT['streamlines']} "
        f"streamlines of {DEFAULT['length']} points, LSTM {DEFAULT['hidden']}+{DEFAULT['hidden']}"
    )
    curves = {name: [run_point(name, size, options.steps) for size in sizes] for name, sizes in SIZES.items()}
    for name, points in curves.items():
        print_table(name, points)
    if options.picture:
        draw(curves, options.picture)
        print(f"\n{options.picture}")
    return 0


def run_point(name: str, size: int, steps: int) -> dict[str, float]:
    """Measure one point in a process of its own, so that its peak of memory is its own."""
    arguments = ["--steps", str(steps), "--point", json.dumps({**DEFAULT, name: size})]
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def measure(sizes: Mapping[str, int], steps: int) -> dict[str, float]:
    """Seconds a step, peak of memory above what stood before it in MB, and numbers of parameters and points."""
    torch.manual_seed(0)
    model = Learn2Track(FEATURES, rnn_layer_sizes=(sizes["hidden"],) * 2, nb_previous_dirs=1)
    batch: Any = make_batch(sizes["streamlines"], sizes["length"])
    num_points = batch.num_points
    state = init_state(model, adam(), seed=0)
    options = {"loss_fn": module_loss(model, compute_batch_loss), "optimizer": adam(), "lr": 1e-3, "donate": True}
    if sizes["shards"] > 1:
        batch, options["gradient_fn"] = cut_batch(batch, sizes["shards"]), sharded_value_and_grad()
    step = partial(train_step, **options)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, _ = step(state, batch)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **sizes,
        "seconds": statistics.median(seconds[1:]),
        "megabytes": max(peak - before, 0) / 1e6,
        "parameters": sum(tensor.numel() for tensor in state.params.values()),
        "points": num_points,
    }


def make_batch(num_streamlines: int, length: int) -> StreamlineBatch:
    """Random walks with random inputs; lengths between half and one and a half of `length`."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(max(length // 2, 2), length + length // 2, num_streamlines)
    lines = Streamlines.from_list([rng.normal(size=(n, 3)).cumsum(0) for n in lengths])
    zeros = torch.zeros(num_streamlines, dtype=torch.int64)
    inputs = torch.from_numpy(rng.normal(size=(len(lines.points) - num_streamlines, FEATURES)).astype(np.float32))
    return StreamlineBatch(points=lines.points, offsets=lines.offsets, subject=zeros, ids=zeros, inputs=inputs)


def size_of(name: str, point: Mapping[str, float]) -> float:
    """What stands on the axis of a curve."""
    return point["parameters"] if name == "hidden" else point[name]


def exponent(name: str, points: Sequence[Mapping[str, float]], quantity: str) -> float:
    """The slope of a straight line through the logarithms, by least squares; its last three points."""
    kept = [point for point in points if point[quantity] > 0][-3:]
    if len(kept) < 2:
        return math.nan
    x = np.log([size_of(name, point) for point in kept])
    return float(np.polyfit(x, np.log([point[quantity] for point in kept]), 1)[0])


def print_table(name: str, points: Sequence[Mapping[str, float]]) -> None:
    """A markdown table of one curve, with exponents of its upper end."""
    time_exponent, memory_exponent = (exponent(name, points, quantity) for quantity in ("seconds", "megabytes"))
    print(f"\n| {LABELS[name]} | time a step | peak memory of a step |\n|---|---|---|")
    for point in points:
        print(f"| {size_of(name, point):,.0f} | {1e3 * point['seconds']:.0f} ms | {point['megabytes']:.0f} MB |")
    print(f"| exponent of the last three | {time_exponent:.2f} | {memory_exponent:.2f} |")


def draw(curves: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Time and memory over each size, on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(curves), sharey="row", squeeze=False)
    rows = (("seconds", "seconds a step", "#0072B2"), ("megabytes", "peak memory of a step (MB)", "#D55E00"))
    for column, (name, points) in enumerate(curves.items()):
        for row, (quantity, label, colour) in enumerate(rows):
            ax = axes[row][column]
            ax.loglog([size_of(name, p) for p in points], [p[quantity] for p in points], "o-", color=colour)
            ax.set_title(f"exponent {exponent(name, points, quantity):.2f}", fontsize=10)
            ax.grid(True, which="both", alpha=0.25)
            ticks = [size_of(name, point) for point in points]
            ax.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], fontsize=8)
            ax.set_xticks([], minor=True)
            ax.set_xlabel(LABELS[name] if row == 1 else "")
            ax.set_ylabel(label if column == 0 else "")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
