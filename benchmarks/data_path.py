"""What the data path costs: batches beside the per-streamline way and a training step, plans, and lazy memory."""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dipy.io.stateful_tractogram import StatefulTractogram
from stateful import FEATURES, StatefulData, write_file
from timing import interleaved, medians_of
from torch import Tensor
from verdicts import conclude

from dwiml_func import Key, adam, init_state, module_loss, train_step
from dwiml_func.data import (
    Augmentation,
    BatchRequest,
    DatasetIndex,
    LoaderSpec,
    Prefetched,
    SamplerSpec,
    epoch_batches,
    load_batch,
    open_dataset,
    sample_epoch,
)
from dwiml_func.models import Learn2Track, compute_batch_loss

NOISE, SHARE = 0.05, 0.5
SPEC = LoaderSpec(
    augmentation=Augmentation(
        noise_gaussian_size_forward=NOISE, noise_gaussian_size_loss=NOISE, split_ratio=SHARE, reverse_ratio=SHARE
    )
)
KEY = Key(1)
ALLOWED_MB = 500  # beside the cache


def main() -> int:
    """Print tables and whether the limits hold. Exit code 1 when one does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads (default: 1)")
    parser.add_argument("--rounds", type=int, default=40, help="batches of each variant (default: 40)")
    parser.add_argument("--lazy-gb", type=float, default=0, help="also write a file of this size and read it lazily")
    parser.add_argument("--cache-gb", type=float, default=0.5, help="with --lazy-gb: the cache (default: 0.5)")
    parser.add_argument("--folder", default=None, help="where temporary files go")
    parser.add_argument("--read-lazily", default=None, help=argparse.SUPPRESS)  # the measured process of --lazy-gb
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.read_lazily:
        return read_lazily(options.read_lazily, options.cache_gb)
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.rounds} interleaved rounds, one process\n")
    verdicts = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "data.hdf5"
        write_file(path, num_subjects=2, num_streamlines=1000, side=48)
        verdicts += batches(path, options.rounds)
        overlap(path)
        verdicts += plans()
        if options.lazy_gb:
            verdicts += lazy_memory(Path(folder) / "large.hdf5", options)
    print()
    return conclude(verdicts)


class PerStreamline:
    """The baseline: streamlines one by one; splitting and reversing rebuild their tractogram, as in dwi_ml."""

    def __init__(self, path: Path, *, lazily: bool) -> None:
        self.data = StatefulData(path, lazily=lazily, placed_at=0.5)

    def load(self, ids: np.ndarray) -> tuple[list[Tensor], ...]:
        """Streamlines, inputs, noisy streamlines, noisy targets."""
        rng = np.random.default_rng(0)
        all_lines: list[Tensor] = []
        all_inputs: list[Tensor] = []
        for _, lines, inputs in self.data.load(ids, partial(self.augment, rng=rng)):
            all_lines += lines
            all_inputs += inputs
        noisy = [[self.add_noise(line) for line in all_lines] for _ in range(2)]
        return all_lines, all_inputs, *noisy

    @staticmethod
    def augment(tractogram: StatefulTractogram, rng: np.random.Generator) -> StatefulTractogram:
        """Split and reverse a share."""
        lines: Any = tractogram.streamlines
        chosen, parts = set(rng.permutation(len(lines))[: int(SHARE * len(lines))].tolist()), []
        for i, line in enumerate(lines):
            if i in chosen and len(line) > 12:
                cut = rng.integers(6, len(line) - 6)
                parts += [line[: cut + 1], line[cut:]]
            else:
                parts.append(line)
        tractogram = StatefulTractogram.from_sft(parts, tractogram)
        chosen, lines = set(rng.permutation(len(parts))[: int(SHARE * len(parts))].tolist()), tractogram.streamlines
        turned = [line[::-1] if i in chosen else line for i, line in enumerate(lines)]
        return StatefulTractogram.from_sft(turned, tractogram)

    @staticmethod
    def add_noise(line: Tensor) -> Tensor:
        """Clipped normal noise."""
        return line + torch.clip(torch.randn_like(line) * NOISE, -2 * NOISE, 2 * NOISE)


def batches(path: Path, rounds: int) -> list[tuple[bool, str]]:
    """A batch of 100 streamlines: loaded, augmented, interpolated, beside a training step on it."""
    ids = np.random.default_rng(1).permutation(2000)[:100]
    request = BatchRequest(ids, KEY, 0, 0)
    memory, lazily = open_dataset(path), open_dataset(path, lazy=True)
    batch = load_batch(request, dataset=memory, spec=SPEC)
    variants: dict[str, Callable[[], object]] = {
        "from memory": lambda: load_batch(request, dataset=memory, spec=SPEC),
        "per streamline, from memory": partial(PerStreamline(path, lazily=False).load, ids),
        "lazily": lambda: load_batch(request, dataset=lazily, spec=SPEC),
        "per streamline, lazily": partial(PerStreamline(path, lazily=True).load, ids),
        "Learn2Track training step, LSTM 100+100": partial(make_step(), batch),
    }
    medians = medians_of(interleaved(variants, rounds))
    print(f"a batch of 100 streamlines, {batch.num_points + 100} points, {FEATURES} features, 2 subjects, median")
    for name, seconds in medians.items():
        print(f"  {name:42} {1e3 * seconds:8.2f} ms")
    gains = [medians[f"per streamline, {name}"] / medians[name] for name in ("from memory", "lazily")]
    share = medians["from memory"] / medians["Learn2Track training step, LSTM 100+100"]
    lazy_share = medians["lazily"] / medians["Learn2Track training step, LSTM 100+100"]
    return [
        (gains[0] >= 3, f"from memory {gains[0]:.1f} times faster than per streamline, at least 3 required"),
        (gains[1] >= 3, f"lazily {gains[1]:.1f} times faster than per streamline, at least 3 required"),
        (
            share <= 0.1,
            f"a batch takes {share:.1%} of a training step ({lazy_share:.1%} lazily), at most 10 % required",
        ),
    ]


def make_step() -> Callable[[Any], None]:
    """A function that takes one training step of its own run, on the batch it is given."""
    torch.manual_seed(0)
    model = Learn2Track(FEATURES, nb_previous_dirs=1)
    step = partial(train_step, loss_fn=module_loss(model, compute_batch_loss), optimizer=adam(), lr=1e-3, donate=True)
    state = init_state(model, adam(), seed=0)

    def run(batch: Any) -> None:
        nonlocal state
        state, _ = step(state, batch)

    return run


def overlap(path: Path) -> None:
    """An epoch of 20 batches trained on, loaded in each of the ways; lazily, and no volume fits the cache."""
    dataset = open_dataset(path, lazy=True, cache_size=0)
    take_step = make_step()

    def epoch(num_workers: int, ahead: bool) -> None:
        loader = epoch_batches(dataset, SamplerSpec(), SPEC, key=KEY, epoch=0, num_workers=num_workers, augment_key=KEY)
        for batch in Prefetched(loader) if ahead else loader:
            take_step(batch)

    ways = {
        "nothing ahead": partial(epoch, 0, False),
        "a thread": partial(epoch, 0, True),
        "1 process": partial(epoch, 1, False),
        "2 processes": partial(epoch, 2, False),
    }
    medians = medians_of(interleaved(ways, 3))
    print(f"\nan epoch of 20 training steps, volumes read again for each batch, {os.cpu_count()} cores")
    for name, seconds in medians.items():
        print(f"  {name:42} {seconds:8.2f} s")


def plans() -> list[tuple[bool, str]]:
    """Plans of an epoch, all streamlines, 50 subjects."""
    specs = {
        "nb_streamlines": SamplerSpec(max_batches=None),
        "length_mm": SamplerSpec(batch_size=10_000, batch_size_units="length_mm", max_batches=None),
        "5 subjects a batch, 1 cycle": SamplerSpec(nb_subjects_per_batch=5, cycles=1, max_batches=None),
    }
    numbers = (10_000, 100_000, 1_000_000, 5_000_000)
    print("\nthe plan of an epoch, 50 subjects, seconds" + "".join(f"{number:>11,}" for number in numbers))
    slowest = 0.0
    for name, spec in specs.items():
        seconds = []
        for number in numbers:
            lengths = np.random.default_rng(0).uniform(20, 200, number)
            index = DatasetIndex(tuple(map(str, range(50))), np.full(50, number // 50), lengths)
            times = []
            for _ in range(3 if number <= 1_000_000 else 1):
                start = time.perf_counter()
                sample_epoch(index, spec, KEY, 0)
                times.append(time.perf_counter() - start)
            seconds.append(statistics.median(times))
        slowest = max(slowest, seconds[2])
        print(f"  {name:40}" + "".join(f"{value:11.3f}" for value in seconds))
    return [(slowest <= 1, f"the plan of 1,000,000 streamlines takes {slowest:.2f} s at most, at most 1 s required")]


def lazy_memory(path: Path, options: argparse.Namespace) -> list[tuple[bool, str]]:
    """Write a large file, and read it lazily in a process of its own."""
    side = 96
    num_subjects = max(1, round(options.lazy_gb * 1e9 / (side**3 * FEATURES * 4)))
    write_file(path, num_subjects=num_subjects, num_streamlines=2000, side=side)
    command = [sys.executable, __file__, "--read-lazily", str(path), "--cache-gb", str(options.cache_gb)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, limit = float(done.stdout) / 1e6, 1e3 * options.cache_gb + ALLOWED_MB
    what = f"a lazy epoch over {path.stat().st_size / 1e9:.1f} GB with a cache of {options.cache_gb:g} GB"
    return [(peak <= limit, f"{what} peaks at {peak:.0f} MB, Python and torch included; at most {limit:.0f} required")]


def read_lazily(path: str, cache_gb: float) -> int:
    """Load an epoch and print the peak of this process in bytes."""
    dataset = open_dataset(path, lazy=True, cache_size=int(cache_gb * 1e9))
    spec = SamplerSpec(nb_subjects_per_batch=2, cycles=10, max_batches=None)
    for _ in Prefetched(epoch_batches(dataset, spec, SPEC, key=KEY, epoch=0, augment_key=KEY)):
        pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return 0


if __name__ == "__main__":
    sys.exit(main())
