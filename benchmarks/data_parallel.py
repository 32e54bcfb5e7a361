"""What shards and processes cost and bring: an epoch of Learn2Track with 1 and 2 processes, and the exchange alone."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
from scaling import FEATURES, make_batch
from verdicts import conclude

from dwiml_func import adam, init_state, module_loss, train_step
from dwiml_func.checkpoint import state_digest
from dwiml_func.data.shards import cut_batch
from dwiml_func.distributed import join_process_group, sharded_value_and_grad
from dwiml_func.models import Learn2Track, compute_batch_loss

NUM_SHARDS = 4


def main() -> int:
    """Print a table, and whether 1 and 2 processes end bitwise identical. Exit code 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, one run of each variant in each (default: 3)")
    parser.add_argument("--shards", type=int, default=0, help=argparse.SUPPRESS)  # the measured processes
    options = parser.parse_args()
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
    return conclude([(len(digests) == 1, text)])


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
    torch.manual_seed(0)
    model = Learn2Track(FEATURES, nb_previous_dirs=1)
    batch: Any = make_batch(100, 117)
    with join_process_group() as group:
        process_group = _Timed(group)
        options: dict[str, Any] = {}
        if shards > 1:
            batch, options["gradient_fn"] = cut_batch(batch, shards), sharded_value_and_grad(process_group)
        loss_fn = module_loss(model, compute_batch_loss)
        step = partial(train_step, loss_fn=loss_fn, optimizer=adam(), lr=1e-3, donate=True, **options)
        state, _ = step(init_state(model, adam(), seed=0), batch)
        process_group.seconds, began = 0.0, time.perf_counter()
        for _ in range(steps):
            state, _ = step(state, batch)
        seconds = (time.perf_counter() - began) / steps
        if process_group.rank == 0:
            print(seconds, process_group.seconds / steps, state_digest(state))
    return 0


if __name__ == "__main__":
    sys.exit(main())
