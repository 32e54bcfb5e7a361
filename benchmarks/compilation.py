"""What compiling the training step of Learn2Track costs and brings, over batches that all have another length.

Data, model and steps are those of the default example run, as `dwiml-func train` makes them with and without
`--compile`. The compiler's cache is empty at the start. With `--padded`, the same beside `--pad-batches on`: batches
padded to one of 8 lengths of the dataset, and a graph for each.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import torch
from timing import interleaved, medians_of
from verdicts import conclude

from dwiml_func.cli._run_options import example_options
from dwiml_func.compiled.warmup import CompilationReport, WarmUpStep
from dwiml_func.data import StreamlineBatch
from dwiml_func.data.example.dataset import make_example_data
from dwiml_func.experiment.setup import RunParts, prepare

EAGER, COMPILED, PADDED, LR = "eager", "compiled", "compiled, padded", 1e-3
MAX_RATIO, MAX_COMPILATIONS = 0.9, 3
NUM_COMPARED = 10
# Float32 sums in another order differ by 1e-6 or less of a loss; each of the updates between carries that on.
TOLERANCE = 1e-4


def main() -> int:
    """Print medians, compilations and break-even, and whether the limits hold. Exit code 1 when one does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads (default: 1)")
    parser.add_argument("--batches", type=int, default=200, help="batches; a step of each kind on each (default: 200)")
    parser.add_argument("--padded", action="store_true", help="also compile steps on padded batches")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "cache")
        eager, compiled, warm = make_parts(Path(folder) / "data.hdf5")
        batches = list(islice(different_batches(eager), options.batches))
        losses: dict[str, list[float]] = {EAGER: [], COMPILED: []}
        steps = {EAGER: step_through(eager, batches, losses[EAGER])}
        steps[COMPILED] = step_through(compiled, batches, losses[COMPILED])
        if options.padded:
            padded, warm_padded = make_padded_parts(Path(folder) / "data.hdf5")
            own = list(islice(different_batches(padded), options.batches))
            for number in {batch.padded_length: place for place, batch in enumerate(own)}.values():
                step_through(padded, [own[number]], [])()  # compiles for each length
            steps[PADDED] = step_through(padded, own, [])
            lengths = {batch.padded_length for batch in own}
            print(
                f"padded to {len(lengths)} lengths: {warm_padded.graph.num_compilations} compilations in "
                f"{warm_padded.graph.compile_seconds:.0f} s, {warm_padded.graph.eager_reason or 'none eager'}"
            )
        times = interleaved(steps, len(batches), warm_up=1)
    points = [batch.num_points for batch in batches]
    num_compilations = warm.graph.num_compilations
    ratio = print_tables(times, points, warm)
    pairs = zip(losses[EAGER][:NUM_COMPARED], losses[COMPILED][:NUM_COMPARED], strict=True)
    difference = max(abs(one - other) / one for one, other in pairs)
    verdicts = [
        (ratio <= MAX_RATIO, f"a compiled step takes {ratio:.2f} times an eager one, at most {MAX_RATIO:g} required"),
        (
            warm.graph.eager_reason is None and num_compilations <= MAX_COMPILATIONS,
            f"{num_compilations} compilation(s) over {len(set(points))} batches of different lengths, "
            f"at most {MAX_COMPILATIONS} required",
        ),
        (
            difference <= TOLERANCE,
            f"losses of the first {NUM_COMPARED} steps differ by {difference:.1e} of theirs, "
            f"at most {TOLERANCE:.0e} required",
        ),
    ]
    return conclude(verdicts)


def make_parts(path: Path) -> tuple[RunParts, RunParts, WarmUpStep]:
    """The default example run, eager and compiled, and the compiled step as it is."""
    make_example_data(path)
    config = example_options().to_config(path)
    compiled = prepare(replace(config, training=replace(config.training, compile=True)))
    assert isinstance(compiled.step, WarmUpStep)
    return prepare(config), compiled, compiled.step


def make_padded_parts(path: Path) -> tuple[RunParts, WarmUpStep]:
    """The compiled run with `--pad-batches on`, and its step."""
    config = example_options().to_config(path)
    parts = prepare(replace(config, training=replace(config.training, compile=True, pad_batches="on")))
    assert isinstance(parts.step, WarmUpStep)
    return parts, parts.step


def different_batches(parts: RunParts) -> Iterator[StreamlineBatch]:
    """The run's training batches, epoch by epoch; those with as many points as one before are left out."""
    seen = set()
    for epoch in count():
        for batch in parts.train(parts.first_state().key, epoch, 0):
            if batch.num_points not in seen:
                seen.add(batch.num_points)
                yield batch


def step_through(parts: RunParts, batches: list[StreamlineBatch], losses: list[float]) -> Callable[[], None]:
    """A function that trains on the next of the batches, the first one twice, and notes the loss."""
    state, upcoming = parts.first_state(), iter([batches[0], *batches])

    def run() -> None:
        nonlocal state
        state, metrics = parts.step(state, next(upcoming), lr=LR)
        total, weight = metrics["loss"]
        losses.append(float(total / weight))

    return run


def print_tables(times: dict[str, list[float]], points: list[int], warm: WarmUpStep) -> float:
    """Print the medians, and what compilation costs and brings; return the ratio of the medians."""
    medians = medians_of(times)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), both steps in turn, one process")
    print(f"the default example run, {len(points)} batches of {min(points):,} to {max(points):,} points\n")
    print("| one step | median | ratio |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {1e3 * seconds:.1f} ms | {seconds / medians[EAGER]:.2f} |")
    print(f"\n{CompilationReport(warm.graph.compile_seconds, medians[EAGER], medians[COMPILED])}")
    if warm.graph.eager_reason is not None:
        print(f"Not compiled: {warm.graph.eager_reason}")
    return medians[COMPILED] / medians[EAGER]


if __name__ == "__main__":
    sys.exit(main())
