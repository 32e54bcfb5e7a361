"""What a checkpoint costs: how long training waits, bytes, restoring, digests; beside `torch.save` and orbax alone."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import torch
from torch import nn
from verdicts import conclude

from dwiml_func import TrainState, adam, init_state, restore, save
from dwiml_func.checkpoint.background import AsyncCheckpointer
from dwiml_func.checkpoint.digest import leaf_digest, state_leaves

HIDDEN = {"0.15": 100, "10": 900}
"""Hidden size of a two-layer LSTM on 48 inputs, by its millions of parameters."""

BLOCKED = "AsyncCheckpointer.save: training is blocked"
WHOLE = "save: whole, with fsync and digests"
ORBAX = "orbax, in the foreground"
BASELINE = "torch.save, no fsync"
LIMIT = 1.5


def main() -> int:
    """Print a table for each size and whether the limit holds. Exit code 1 when it does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="times that each is measured (default: 9)")
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)

    ratios = {}
    for millions, hidden in HIDDEN.items():
        state = make_state(hidden)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            times, sizes = measure(state, Path(folder), options.rounds)
        print_table(millions, state, times, sizes)
        ratios[millions] = statistics.median(times[BLOCKED]) / statistics.median(times[BASELINE])
    print(f"torch {torch.__version__}, orbax-checkpoint {ocp.__version__}, {options.rounds} interleaved rounds")
    ratio = ratios["10"]
    text = f"blocked for {ratio:.2f} times torch.save without fsync at 10 million parameters, at most {LIMIT} required"
    return conclude([(ratio <= LIMIT, text)])


def make_state(hidden: int) -> TrainState:
    """A state whose Adam state is not zero."""
    torch.manual_seed(0)
    state = init_state(nn.LSTM(48, hidden, 2), adam(), seed=0)
    opt_state = {
        kind: {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
        for kind, tensors in state.opt_state.items()
    }
    return state.replace(opt_state=opt_state, step=100)


def measure(state: TrainState, folder: Path, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of everything that is compared, and bytes on disk. The variants take turns."""
    tree = {"params": state.params, "buffers": state.buffers, "opt_state": state.opt_state, "step": state.step}
    arrays = {name: leaf.numpy() for name, leaf in state_leaves(state).items()}
    checkpointer = AsyncCheckpointer(folder / "checkpointer")
    asynchronous = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    args = ocp.args.PyTreeSave(arrays)
    numbers = iter(range(1_000_000))

    def torch_save(*, fsync: bool) -> None:
        with open(folder / "torch.pt", "wb") as file:
            torch.save(tree, file)
            if fsync:
                file.flush()
                os.fsync(file.fileno())

    def orbax_save() -> None:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder / "orbax", args=args, force=True)

    def orbax_restore() -> Any:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            kinds = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in arrays}
            return checkpointer.restore(folder / "orbax", args=ocp.args.PyTreeRestore(restore_args=kinds))

    def digests() -> None:
        for leaf in state_leaves(state).values():
            leaf_digest(leaf)

    def next_save() -> None:
        checkpointer.save(state.replace(epoch=next(numbers)))

    def nothing() -> None:
        pass

    variants: dict[str, tuple[Callable[[], object], Callable[[], object], Callable[[], object]]] = {
        BASELINE: (nothing, lambda: torch_save(fsync=False), nothing),
        "torch.save, fsync": (nothing, lambda: torch_save(fsync=True), nothing),
        BLOCKED: (nothing, next_save, checkpointer.wait),
        "AsyncCheckpointer.save right after another: waits": (next_save, next_save, checkpointer.wait),
        WHOLE: (nothing, lambda: save(folder / "save", state), nothing),
        ORBAX: (nothing, orbax_save, nothing),
        "orbax, asynchronous: blocked": (
            lambda: shutil.rmtree(folder / "asynchronous", ignore_errors=True),
            lambda: asynchronous.save(folder / "asynchronous", args=args),
            asynchronous.wait_until_finished,
        ),
        "digests of all leaves": (nothing, digests, nothing),
        "restore, with all checks": (nothing, lambda: restore(folder / "save", state), nothing),
        "torch.load": (nothing, lambda: torch.load(folder / "torch.pt", weights_only=True), nothing),
        "orbax, restore": (nothing, orbax_restore, nothing),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1, rounds):
        for name, (before, timed, after) in variants.items():
            before()
            start = time.perf_counter()
            timed()
            seconds = time.perf_counter() - start
            after()
            if number >= 0:
                times[name].append(seconds)
    sizes = {
        BASELINE: (folder / "torch.pt").stat().st_size,
        WHOLE: num_bytes(folder / "save" / "checkpoint" / "0"),
        ORBAX: num_bytes(folder / "orbax"),
    }
    asynchronous.close()
    return times, sizes


def num_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def print_table(millions: str, state: TrainState, times: dict[str, list[float]], sizes: dict[str, int]) -> None:
    """Print medians and quartiles in milliseconds, multiples of torch.save's, and bytes."""
    num = sum(tensor.numel() for tensor in state.params.values())
    baseline = statistics.median(times[BASELINE])
    print(f"\n{f'{num} parameters and Adam state':40} {'median':>9} {'quartiles':>19} {'ratio':>6} {'on disk':>9}")
    for name, seconds in times.items():
        lower, median, upper = (1e3 * value for value in statistics.quantiles(seconds, n=4))
        size = f"{sizes[name] / 1e6:6.1f} MB" if name in sizes else ""
        ratio = statistics.median(seconds) / baseline
        print(f"{name:40} {median:6.1f} ms {f'{lower:.1f} to {upper:.1f} ms':>19} {ratio:6.2f} {size:>9}")


if __name__ == "__main__":
    sys.exit(main())
