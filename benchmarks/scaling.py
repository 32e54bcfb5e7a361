"""How a Learn2Track training step grows with the size of its parts: time, memory, fitted exponents and a figure."""

from __future__ import annotations

import argparse
import json
import math
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
from rnn import resident, start_peak

from dwiml_func import adam, ensemble_step, init_state, module_loss, stack_states, train_step
from dwiml_func.data import StreamlineBatch, Streamlines
from dwiml_func.data.shards import cut_batch
from dwiml_func.distributed import sharded_value_and_grad
from dwiml_func.models import Learn2Track, compute_batch_loss

FEATURES = 45
DEFAULT = {"streamlines": 100, "length": 100, "hidden": 100, "models": 0, "shards": 1}  # 0: no ensemble
SIZES = {
    "streamlines": (25, 50, 100, 200, 400),
    "length": (25, 50, 100, 200, 400),
    "hidden": (50, 100, 200, 400),
    "models": (1, 2, 4, 8, 16),
    "shards": (1, 2, 4, 8, 16),
}
LABELS = {
    "streamlines": "streamlines a batch",
    "length": "points a streamline",
    "hidden": "parameters",
    "models": "models in an ensemble",
    "shards": "shards a batch",
}
STYLES = {  # colours of Okabe and Ito, which are told apart without red or green
    "streamlines": ("#0072B2", "o"),
    "length": ("#56B4E9", "s"),
    "hidden": ("#D55E00", "^"),
    "models": ("#009E73", "D"),
    "shards": ("#000000", "v"),
}


def main() -> int:
    """Print a table for each size and the fitted exponents; with --figure, draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each point (default: 7)")
    parser.add_argument("--figure", type=Path, default=None, help="where to draw the curves, e.g. scaling.png")
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
    if options.figure:
        draw(curves, options.figure)
        print(f"\n{options.figure}")
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
    state: Any = init_state(model, adam(), seed=0)
    num_parameters = sum(tensor.numel() for tensor in state.params.values())
    options: dict[str, Any] = {"loss_fn": module_loss(model, compute_batch_loss), "optimizer": adam(), "lr": 1e-3}
    if sizes["models"]:
        state, step = stack_states([state] * sizes["models"]), partial(ensemble_step, **options)
    else:
        if sizes["shards"] > 1:
            batch, options["gradient_fn"] = cut_batch(batch, sizes["shards"]), sharded_value_and_grad()
        step = partial(train_step, **options, donate=True)
    before = start_peak()
    seconds = []  # of the processor: other work on the machine counts little
    for _ in range(steps + 1):
        start = time.process_time()
        state, _ = step(state, batch)
        seconds.append(time.process_time() - start)
    return {
        **sizes,
        "seconds": statistics.median(seconds[1:]),
        "megabytes": (resident("VmHWM") - before) / 1e6,
        "parameters": num_parameters,
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
    """Time and memory over all sizes, as multiples of their defaults, on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("seconds", "time a step (ms)", 1e3), ("megabytes", "peak memory of a step (MB)", 1.0))
    for ax, (quantity, label, factor) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, points in curves.items():
            colour, marker = STYLES[name]
            usual = next(size_of(name, point) for point in points if point[name] == max(DEFAULT[name], 1))
            x = [size_of(name, point) / usual for point in points]
            slope = f"{LABELS[name]}: {exponent(name, points, quantity):.2f}"
            ax.plot(x, [factor * point[quantity] for point in points], color=colour, marker=marker, label=slope)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(ticks := [0.25, 0.5, 1, 2, 4, 8, 16], [f"{tick:g}" for tick in ticks])
        low, high = ax.get_ylim()
        ticks = [tick for power in range(6) for step in (1, 2, 5) if low <= (tick := step * 10**power) <= high]
        ax.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.set_yticks([], minor=True)
        ax.set_xlabel("size, as a multiple of the default")
        ax.set_ylabel(label)
        ax.grid(True, alpha=0.3)
        ax.legend(title="exponent of the last three", fontsize=9, title_fontsize=9)
    default = f"{DEFAULT['streamlines']} streamlines of {DEFAULT['length']} points"
    figure.suptitle(
        f"A training step of Learn2Track; by default {default}, LSTM {DEFAULT['hidden']}+{DEFAULT['hidden']}"
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
