"""What shards bring and cost: steps of Learn2Track with 1 and 2 processes (and the exchange), 1 and 2 threads."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from scaling import FEATURES, make_batch
from timing import interleaved, medians_of
from verdicts import conclude

from dwiml_func import adam, init_state, keep_freed_memory, module_loss, train_step
from dwiml_func.checkpoint import state_digest
from dwiml_func.core.state import TrainState
from dwiml_func.data.shards import cut_batch
from dwiml_func.distributed import SINGLE_PROCESS, join_process_group, sharded_value_and_grad
from dwiml_func.models import Learn2Track, compute_batch_loss
from dwiml_func.types import Metrics

NUM_SHARDS = 4
LEAST_BY_THREADS = 1.7  # 2 threads are faster than 1


def main() -> int:
    """Print a table, and whether 1 and 2 processes end bitwise identical. Exit code 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, one run of each variant in each (default: 3)")
    parser.add_argument("--shards", type=int, default=0, help=argparse.SUPPRESS)  # the measured processes
    options = parser.parse_args()
    keep_freed_memory()  # as the commands do
    if options.shards:
        return run(options.shards, options.steps)
    variants = {"whole batches, 1 process": (1, 1)}
    variants |= {f"{NUM_SHARDS} shards, {n} process{'es' * (n > 1)}": (NUM_SHARDS, n) for n in (1, 2)}
    results: dict[str, list[tuple[float, float, str]]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, (shards, processes) in variants.items():
            results[name].append(start(shards, processes, options.steps))
    first = statistics.median(seconds for seconds, _, _ in next(iter(results.values())))
    print(f"torch {torch.__version__}, 1 thread a process, {os.cpu_count()} cores, {options.rounds} rounds in turn\n")
    print("| variant | time a step | ratio | of it, exchange |\n|---|---|---|---|")
    names, seconds_of = list(results), {}
    for name, rows in results.items():
        seconds_of[name] = seconds = statistics.median(row[0] for row in rows)
        exchange = statistics.median(row[1] for row in rows)
        print(f"| {name} | {1e3 * seconds:.0f} ms | {seconds / first:.2f} | {1e3 * exchange:.1f} ms |")
    digests = {row[2] for name, rows in results.items() if name in names[1:] for row in rows}
    print(f"\n2 processes are {seconds_of[names[1]] / seconds_of[names[2]]:.1f} times faster than 1")
    text = f"{NUM_SHARDS} shards end in {len(digests)} different state(s) on 1 and 2 processes, must be 1"
    verdicts = [(len(digests) == 1, text), *compare_threads(options.steps, next(iter(digests)))]
    return conclude(verdicts)


def compare_threads(steps: int, digest: str) -> list[tuple[bool, str]]:
    """Print the time of a step of one process with 1 and 2 threads; the digest is that of processes."""
    states: dict[int, TrainState] = {}

    def taking_steps(num_threads: int) -> Callable[[], None]:
        step, states[num_threads], batch = make_step(NUM_SHARDS, num_threads=num_threads)

        def run() -> None:
            states[num_threads], _ = step(states[num_threads], batch)

        return run

    torch.set_num_threads(1)
    medians = medians_of(interleaved({str(number): taking_steps(number) for number in (1, 2)}, steps, warm_up=1))
    ratio = medians["1"] / medians["2"]
    milliseconds = [f"{1e3 * seconds:.0f} ms" for seconds in medians.values()]
    print(f"\n{NUM_SHARDS} shards, 1 process: a step takes {milliseconds[0]} with 1 thread, {milliseconds[1]} with 2")
    digests = {digest, *(state_digest(state) for state in states.values())}
    text = f"1 and 2 threads end in {len(digests) - 1} state(s) other than that of processes, must be 0"
    faster = f"2 threads are {ratio:.2f} times faster than 1, at least {LEAST_BY_THREADS} required"
    return [(len(digests) == 1, text), (ratio >= LEAST_BY_THREADS, faster)]


def start(shards: int, processes: int, steps: int) -> tuple[float, float, str]:
    """Seconds a step, seconds of it in exchanges, and the digest at the end, of a run in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, __file__, "--shards", str(shards), "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    seconds, exchange, digest = done.stdout.split()
    return float(seconds), float(exchange), digest


class _Timed:
    """A process group that times its exchanges."""

    def __init__(self, process_group: Any) -> None:
        self.rank, self.size, self._group, self.seconds = process_group.rank, process_group.size, process_group, 0.0

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        start = time.perf_counter()
        gathered = self._group.gather(tensor)
        self.seconds += time.perf_counter() - start
        return gathered


def run(shards: int, steps: int) -> int:
    """Train, and print the first process's figures."""
    torch.set_num_threads(1)
    with join_process_group() as group:
        process_group = _Timed(group)
        step, state, batch = make_step(shards, process_group)
        state, _ = step(state, batch)
        process_group.seconds, began = 0.0, time.perf_counter()
        for _ in range(steps):
            state, _ = step(state, batch)
        seconds = (time.perf_counter() - began) / steps
        if process_group.rank == 0:
            print(seconds, process_group.seconds / steps, state_digest(state))
    return 0


def make_step(
    shards: int, process_group: Any = SINGLE_PROCESS, num_threads: int = 1
) -> tuple[Callable[..., tuple[TrainState, Metrics]], TrainState, Any]:
    """A training step of LSTM 100+100, its first state, and a batch of 100 streamlines of 117 points in the mean."""
    torch.manual_seed(0)
    model = Learn2Track(FEATURES, nb_previous_dirs=1)
    batch: Any = make_batch(100, 117)
    options: dict[str, Any] = {}
    if shards > 1:
        batch = cut_batch(batch, shards)
        options["gradient_fn"] = sharded_value_and_grad(process_group, num_threads=num_threads)
    loss_fn = module_loss(model, compute_batch_loss)
    step = partial(train_step, loss_fn=loss_fn, optimizer=adam(), lr=1e-3, donate=True, **options)
    return step, init_state(model, adam(), seed=0), batch


if __name__ == "__main__":
    sys.exit(main())
