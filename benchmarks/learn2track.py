"""A whole training batch of Learn2Track, beside a stateful baseline that works one streamline at a time."""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stateful import FEATURES, StatefulData, write_file
from timing import interleaved, medians_of
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from verdicts import conclude

from dwiml_func import Key, adam, init_state, module_loss, train_step
from dwiml_func.data import Augmentation, BatchRequest, LoaderSpec, StreamlineBatch, load_batch, open_dataset
from dwiml_func.data.augmentation import Kind, rng_of
from dwiml_func.models import Learn2Track, compute_batch_loss
from dwiml_func.models.baselines import angular_error
from dwiml_func.optim.transformations import global_norm

NUM_STREAMLINES, LAYER_SIZES, LR, WEIGHT_DECAY, NOISE, KEY = 100, (100, 100), 1e-3, 0.01, 0.05, Key(1)
SPEC = LoaderSpec(
    interpolation="trilinear-corner",  # as dwi_ml places values
    augmentation=Augmentation(noise_gaussian_size_forward=NOISE, noise_gaussian_size_loss=NOISE),
)
NUM_COMPARED = 10
# Float32 sums in another order differ by 1e-6 or less of a loss; each of the updates between carries that on.
TOLERANCE = 1e-4
OURS, BASELINE, LIMIT = "ours", "stateful baseline", 5.0


def main() -> int:
    """Print the time of a batch, by stage, and whether the limit holds. Exit code 1 when it does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads (default: 1)")
    parser.add_argument("--rounds", type=int, default=11, help="batches of each variant (default: 11)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.hdf5"
        write_file(path, num_subjects=2, num_streamlines=1000, side=48)
        variants = {OURS: Ours(path), BASELINE: Baseline(path)}
        pairs = [[variant.train(number) for variant in variants.values()] for number in range(NUM_COMPARED)]
        runs = {name: partial(train_again, variant) for name, variant in variants.items()}
        times = interleaved(runs, options.rounds, warm_up=1)
    ratio = print_tables(times, variants, options.rounds, options.threads)
    difference = max(abs(ours - baseline) / abs(baseline) for ours, baseline in pairs)
    verdicts = [
        (ratio >= LIMIT, f"a batch is {ratio:.1f} times faster than the baseline's, at least {LIMIT:g} required"),
        (
            difference <= TOLERANCE,
            f"losses of the first {NUM_COMPARED} batches, to {pairs[-1][0]:.6f} and {pairs[-1][1]:.6f}, differ by "
            f"{difference:.1e} of theirs, at most {TOLERANCE:.0e} required",
        ),
    ]
    return conclude(verdicts)


def train_again(variant: Any) -> None:
    """One more batch, the first."""
    variant.train(0)


def print_tables(times: dict[str, list[float]], variants: dict[str, Any], rounds: int, num_threads: int) -> float:
    """Print the medians, whole and by stage; return how many times faster ours is."""
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            for stage in variant.stages(0):
                end = time.perf_counter()
                seconds[name].setdefault(stage, []).append(end - start)
                start = end
    stages = {name: medians_of(by_stage) for name, by_stage in seconds.items()}
    medians = medians_of(times)
    print(f"torch {torch.__version__}, {num_threads} thread(s), {rounds} interleaved rounds, one process")
    print(f"a batch of {NUM_STREAMLINES} streamlines of 80 to 160 points, {FEATURES} features, LSTM 100 + 100\n")
    print(f"{'median':34} {OURS:>12} {BASELINE:>20}")
    for stage in stages[OURS]:
        print_row(stage, stages[OURS][stage], stages[BASELINE][stage])
    print_row("a whole batch", medians[OURS], medians[BASELINE])
    print()
    return medians[BASELINE] / medians[OURS]


def print_row(name: str, ours: float, baseline: float) -> None:
    """Seconds, and their ratio."""
    print(f"  {name:32} {1e3 * ours:9.1f} ms {1e3 * baseline:17.1f} ms {baseline / ours:6.1f} times")


def make_model() -> Learn2Track:
    """The same first weights for both."""
    torch.manual_seed(0)
    return Learn2Track(FEATURES, nb_previous_dirs=1, rnn_layer_sizes=LAYER_SIZES)


def make_ids(number: int) -> np.ndarray:
    """Which streamlines batch `number` has."""
    return np.random.default_rng(1).permutation(2000)[number * NUM_STREAMLINES :][:NUM_STREAMLINES]


class Ours:
    """Flat arrays and pure functions."""

    def __init__(self, path: Path) -> None:
        self._dataset = open_dataset(path)
        model, self._optimizer = make_model(), adam(weight_decay=WEIGHT_DECAY)
        self._loss_fn = module_loss(model, compute_batch_loss)
        self._step = partial(train_step, loss_fn=self._loss_fn, optimizer=self._optimizer, lr=LR, donate=True)
        self._state = init_state(model, self._optimizer, seed=0)

    def _load(self, number: int) -> StreamlineBatch:
        return load_batch(BatchRequest(make_ids(number), KEY, 0, number), dataset=self._dataset, spec=SPEC)

    def train(self, number: int) -> float:
        """Train on batch `number`, and return its loss."""
        self._state, metrics = self._step(self._state, self._load(number))
        total, weight = metrics["loss"]
        return float(total / weight)

    def stages(self, number: int) -> Iterator[str]:
        """Do what `train` does in parts; yield the name of each when it is done. The state stays as it is."""
        batch = self._load(number)
        yield "streamlines, noise, inputs"
        state = self._state
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in state.params.items()}
        out = self._loss_fn(leaves, state.buffers, batch, key=KEY, train=True)
        yield "loss"
        grads = dict(zip(leaves, torch.autograd.grad(out.loss, list(leaves.values())), strict=True))
        yield "gradients"
        self._optimizer.update(grads, state.opt_state, state.params, lr=LR, step=state.step)
        global_norm(grads).item()
        yield "update, gradient norm"


class Baseline:
    """Lists of tensors, a module with packed `nn.LSTM` and `torch.optim.Adam`, as in dwi_ml.

    As favourable as that way allows: see `stateful.py`; streamlines are in memory, and dwi_ml's garbage collection
    at each batch is left out.
    """

    def __init__(self, path: Path) -> None:
        self._data = StatefulData(path, lazily=False, placed_at=0.0)
        model = make_model()
        sizes = (FEATURES + 3, *LAYER_SIZES)
        self._layers = nn.ModuleList(nn.LSTM(*pair) for pair in pairwise(sizes))
        for number, layer in enumerate(self._layers):
            layer.load_state_dict(model.rnn_model.get_submodule(f"rnn_{number}").state_dict())
        getter = [copy.deepcopy(model.direction_getter.get_submodule(f"layers.{number}")) for number in (0, 1)]
        self._first, self._last = getter
        self._modules = nn.ModuleList([self._layers, self._first, self._last])
        self._optimizer = torch.optim.Adam(self._modules.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)

    def train(self, number: int) -> float:
        """Train on batch `number`, and return its loss."""
        for _ in self.stages(number):
            pass
        return self.loss

    def stages(self, number: int) -> Iterator[str]:
        """Train, and yield the name of each stage when it is done."""
        lines, inputs = self._load(make_ids(number))
        noisy = self._with_noise(lines, number, Kind.NOISE_FORWARD)
        noisy_targets = self._with_noise(lines, number, Kind.NOISE_LOSS)
        yield "streamlines, noise, inputs"
        outputs = self._forward(inputs, noisy)
        targets = [line[1:] - line[:-1] for line in noisy_targets]
        loss = (1 - cosine_similarity(torch.cat(outputs), torch.cat(targets), dim=-1)).mean()
        errors = [angular_error(output.detach(), target) for output, target in zip(outputs, targets, strict=True)]
        torch.cat(errors).mean().item()
        yield "loss"
        self._optimizer.zero_grad()
        loss.backward()
        yield "gradients"
        grads = [parameter.grad for parameter in self._modules.parameters()]
        norm = sum(grad.norm(2).item() ** 2 for grad in grads if grad is not None) ** 0.5
        assert math.isfinite(norm)
        self._optimizer.step()
        self.loss = loss.item()
        yield "update, gradient norm"

    def _load(self, ids: np.ndarray) -> tuple[list[Tensor], list[Tensor]]:
        """Streamlines in the order of their ids, and the input volume at all of their points but the last."""
        lines, inputs = {}, {}
        for chosen, own_lines, own_inputs in self._data.load(ids):
            lines.update(zip(chosen, own_lines, strict=True))
            inputs.update(zip(chosen, own_inputs, strict=True))
        return [lines[i] for i in ids], [inputs[i] for i in ids]

    @staticmethod
    def _with_noise(lines: list[Tensor], number: int, kind: Kind) -> list[Tensor]:
        """Clipped normal noise, streamline by streamline, with our random numbers."""
        rng, noisy = rng_of(KEY, 0, number, kind), []
        for line in lines:
            noise = torch.from_numpy(rng.standard_normal(tuple(line.shape), dtype=np.float32))
            noisy.append(line + torch.clip(noise, -2, 2) * NOISE)
        return noisy

    def _forward(self, inputs: list[Tensor], noisy: list[Tensor]) -> list[Tensor]:
        """Directions for each streamline."""
        rows = []
        for line_inputs, line in zip(inputs, noisy, strict=True):
            dirs = line[1:] - line[:-1]
            previous = torch.cat([torch.zeros(1, 3), dirs[:-1]])
            rows.append(torch.cat([line_inputs, previous], dim=1))
        packed = pack_sequence(rows, enforce_sorted=False)
        for number, layer in enumerate(self._layers):
            packed = packed if number == 0 else with_data(packed, packed.data.relu())
            packed, _ = layer(packed)
        outputs = self._last(self._first(packed.data).relu())
        return unpack_sequence(with_data(packed, outputs))


def with_data(packed: PackedSequence, data: Tensor) -> PackedSequence:
    """The same sequences with other rows."""
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


if __name__ == "__main__":
    sys.exit(main())
