"""The recurrent core, forwards and backwards, beside torch's own LSTM and a scan in JAX, and beside the arithmetic."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timing import interleaved
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from verdicts import conclude

from dwiml_func.models.rnn.stacked import StackedRNN

NUM_SEQUENCES, NUM_INPUTS, LAYER_SIZES = 100, 48, (100, 100)
NUM_GATES = {"lstm": 4, "gru": 3}
LAYERS = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
OURS, PACKED, PADDED, JAX = "ours", "packed nn.{}", "padded nn.{}", "jitted JAX scan"
# Of gradients, relative to their largest value. In float32 they agree to 1e-6, but a hidden value within rounding of
# zero may pass the ReLU between the layers in one variant and not in another, which moves the first layer's by 1e-3.
TOLERANCE = 1e-2
# Freed memory goes back to the system at once, so that the resident memory is that in use.
PROMPT_FREE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> int:
    """Print a table for each number of threads, and whether the limits hold. Exit code 1 when one does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads to measure with (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each variant (default: 9)")
    parser.add_argument("--worker", nargs=2, metavar=("KEY", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return serve(*options.worker, num_threads=options.threads[0])
    sizes = batch_sizes()
    print(
        f"{NUM_SEQUENCES} sequences of 20 to 220 points, {sum(sizes)} points, {NUM_INPUTS} inputs, 100 + 100 features"
    )
    peaks = {rnn_key: measure_peaks(rnn_key) for rnn_key in LAYERS}
    verdicts = []
    for num_threads in options.threads:
        set_threads(num_threads)
        gemm = gemm_rate()
        print(f"\ntorch {torch.__version__}, {num_threads} thread(s), matrix products alone {gemm:.0f} GFLOP/s")
        for rnn_key in LAYERS:
            times = measure_times(rnn_key, num_threads, options.rounds)
            medians = print_table(rnn_key, times, peaks[rnn_key], gemm)
            if rnn_key == "lstm":
                verdicts += judge(medians, num_threads)
    print()
    return conclude(verdicts)


def judge(medians: dict[str, float], num_threads: int) -> list[tuple[bool, str]]:
    """Whether the LSTM is as fast as required."""
    verdicts = []
    for name, limit in ((PACKED.format("LSTM"), 4.0), (PADDED.format("LSTM"), 1.0), (JAX, 1.0)):
        ratio = medians[name] / medians[OURS]
        text = f"{ratio:.2f} times faster than {name} on {num_threads} thread(s), at least {limit:g} required"
        verdicts.append((ratio >= limit, text))
    return verdicts


def set_threads(num_threads: int) -> None:
    """Keep this process, and those it starts, on as many cores; JAX has no other way."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(range(os.cpu_count() or 1))[:num_threads])
    torch.set_num_threads(num_threads)


def gemm_rate() -> float:
    """GFLOP/s of one large matrix product in float32, the best of 20."""
    x = torch.randn(1024, 1024)
    seconds = interleaved({"": partial(torch.mm, x, x)}, 20)[""]
    return 2 * 1024**3 / min(seconds) / 1e9


def num_operations(rnn_key: str) -> float:
    """Floating-point operations of the matrix products, forwards and backwards; the inputs need no gradient."""
    total = 0
    for size_below, size in zip((NUM_INPUTS, *LAYER_SIZES[:-1]), LAYER_SIZES, strict=True):
        by_input, by_hidden = size_below * NUM_GATES[rnn_key] * size, size * NUM_GATES[rnn_key] * size
        total += 2 * (by_input + by_hidden) + by_hidden  # the gates, the weights' gradients, the hidden states'
        total += by_input if size_below is not NUM_INPUTS else 0
    return 2.0 * total * sum(batch_sizes())


def batch_sizes() -> list[int]:
    """Rows of each time step: 20 to 220, 117 in the mean."""
    lengths = (20 + 200 * np.linspace(0, 1, NUM_SEQUENCES) ** 1.062).round()
    return [int((lengths > time).sum()) for time in range(int(lengths.max()))]


class Data(NamedTuple):
    """Packed rows: inputs (P, F), and by what the outputs are multiplied to make the loss, their mean, (P, H)."""

    inputs: Tensor
    factors: Tensor

    def padded(self) -> Data:
        """The same, (T, S, ...), zeros where there is no row."""
        sizes = batch_sizes()
        exists = torch.arange(sizes[0]) < torch.tensor(sizes)[:, None]
        padded = [tensor.new_zeros(*exists.shape, tensor.shape[1]) for tensor in self]
        for into, tensor in zip(padded, self, strict=True):
            into[exists] = tensor
        return Data(*padded)


def make_data() -> tuple[Data, Callable[[str], StackedRNN]]:
    """The same data and models in every process."""
    generator = torch.Generator().manual_seed(1)
    num_rows = sum(batch_sizes())
    data = Data(*(torch.randn(num_rows, size, generator=generator) for size in (NUM_INPUTS, LAYER_SIZES[-1])))

    def make_model(rnn_key: str) -> StackedRNN:
        torch.manual_seed(0)
        return StackedRNN(rnn_key, NUM_INPUTS, LAYER_SIZES)

    return data, make_model


def torch_variants(rnn_key: str) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """Functions that return the gradients of the weights. What each must reorder is done before, or not at all."""
    data, make_model = make_data()
    model, sizes = make_model(rnn_key), batch_sizes()
    kind, sizes_tensor, padded = LAYERS[rnn_key], torch.tensor(sizes), data.padded()
    layers = [kind(size, size_out) for size, size_out in zip((NUM_INPUTS, *LAYER_SIZES), LAYER_SIZES, strict=False)]
    for number, layer in enumerate(layers):
        layer.load_state_dict(model.get_submodule(f"rnn_{number}").state_dict())
    first, second = layers

    def run_ours() -> Sequence[Tensor]:
        loss = (model(data.inputs, sizes) * data.factors).mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    def run_packed() -> Sequence[Tensor]:
        hidden = first(PackedSequence(data.inputs, sizes_tensor))[0].data.relu()
        outputs = second(PackedSequence(hidden, sizes_tensor))[0].data
        return torch.autograd.grad((outputs * data.factors).mean(), [*first.parameters(), *second.parameters()])

    def run_padded() -> Sequence[Tensor]:
        outputs = second(first(padded.inputs)[0].relu())[0]
        loss = (outputs * padded.factors).sum() / data.factors.numel()
        return torch.autograd.grad(loss, [*first.parameters(), *second.parameters()])

    name = kind.__name__
    return {OURS: run_ours, PACKED.format(name): run_packed, PADDED.format(name): run_padded}


def jax_variant(rnn_key: str) -> Callable[[], Sequence[Any]]:
    """The same in JAX: two `lax.scan` over padded time steps, jitted; all inputs in one matrix product first."""
    import jax
    import jax.numpy as jnp

    data, make_model = make_data()
    padded = [jnp.asarray(tensor.numpy()) for tensor in data.padded()]
    weights = [jnp.asarray(weight.detach().numpy()) for weight in make_model(rnn_key).parameters()]
    num_values = data.factors.numel()

    def lstm_step(weight_hh: Any, _: Any, state: Any, rows: Any) -> Any:
        hidden, cell = state
        gates = jnp.split(rows + hidden @ weight_hh.T, 4, axis=1)
        cell = jax.nn.sigmoid(gates[1]) * cell + jax.nn.sigmoid(gates[0]) * jnp.tanh(gates[2])
        hidden = jax.nn.sigmoid(gates[3]) * jnp.tanh(cell)
        return (hidden, cell), hidden

    def gru_step(weight_hh: Any, bias_hh: Any, state: Any, rows: Any) -> Any:
        (hidden,) = state
        by_input, by_hidden = jnp.split(rows, 3, axis=1), jnp.split(hidden @ weight_hh.T + bias_hh, 3, axis=1)
        reset, update = (jax.nn.sigmoid(by_input[i] + by_hidden[i]) for i in range(2))
        candidate = jnp.tanh(by_input[2] + reset * by_hidden[2])
        hidden = candidate + update * (hidden - candidate)
        return (hidden,), hidden

    def loss_of(weights: Any, inputs: Any, factors: Any) -> Any:
        rows = inputs
        for number, size in enumerate(LAYER_SIZES):
            weight_ih, weight_hh, bias_ih, bias_hh = weights[4 * number : 4 * number + 4]
            rows = jax.nn.relu(rows) if number else rows
            zeros = jnp.zeros((rows.shape[1], size))
            if rnn_key == "lstm":
                gates, step, state = rows @ weight_ih.T + (bias_ih + bias_hh), lstm_step, (zeros, zeros)
            else:
                gates, step, state = rows @ weight_ih.T + bias_ih, gru_step, (zeros,)
            rows = jax.lax.scan(partial(step, weight_hh, bias_hh), state, gates)[1]
        return (rows * factors).sum() / num_values

    gradient = jax.jit(jax.grad(loss_of))
    return lambda: jax.block_until_ready(gradient(weights, *padded))


def serve(rnn_key: str, variant: str, *, num_threads: int) -> int:
    """In a process of its own: for each line read run the variant once, and print the seconds and the peak memory."""
    torch.set_num_threads(num_threads)
    run = jax_variant(rnn_key) if variant == JAX else torch_variants(rnn_key)[variant]
    print(json.dumps([np.asarray(gradient).tolist() for gradient in run()]), flush=True)
    for _ in sys.stdin:
        before = start_peak()
        start = time.perf_counter()
        run()
        print(json.dumps([time.perf_counter() - start, resident("VmHWM") - before]), flush=True)
    return 0


def start_peak() -> float:
    """Begin a new peak of this process's memory, and return its present bytes; nan where there is no /proc."""
    if (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")
    return resident("VmRSS")


def resident(name: str) -> float:
    """Bytes of this process's memory, now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(name)), float("nan"))


class Worker:
    """A variant in a process of its own."""

    def __init__(self, rnn_key: str, variant: str, num_threads: int, **environment: str) -> None:
        command = [sys.executable, __file__, "--threads", str(num_threads), "--worker", rnn_key, variant]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.gradients = [torch.tensor(gradient) for gradient in self._read()]

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def run(self) -> tuple[float, float]:
        """Run once, and return the seconds and the bytes at the peak, above those before."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return tuple(self._read())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def measure_peaks(rnn_key: str) -> dict[str, float]:
    """Bytes that a run takes at its peak, by variant, each in its own process. All must have the same gradients."""
    expected, peaks = None, {}
    for name in (*torch_variants(rnn_key), JAX):
        worker = Worker(rnn_key, name, 1, **PROMPT_FREE)
        expected = expected or worker.gradients
        for gradient, right in zip(worker.gradients, expected, strict=True):
            error = ((gradient - right).abs().max() / right.abs().max()).item()
            assert error < TOLERANCE, f"{name}: gradients differ by {error}"
        peaks[name] = worker.run()[1]
        worker.close()
    return peaks


def measure_times(rnn_key: str, num_threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, by variant; they take turns, JAX in its own process."""
    jax_worker = Worker(rnn_key, JAX, num_threads)
    times = interleaved({**torch_variants(rnn_key), JAX: lambda: jax_worker.run()[0]}, rounds, warm_up=1)
    jax_worker.close()
    return times


def print_table(rnn_key: str, times: dict[str, list[float]], peaks: dict[str, float], gemm: float) -> dict[str, float]:
    """Print medians, quartiles, GFLOP/s and memory; return the medians."""
    operations = num_operations(rnn_key)
    print(
        f"{rnn_key.upper() + ', forwards and backwards':28} {'median':>9} {'quartiles':>15} {'GFLOP/s':>8} {'peak':>9}"
    )
    medians = {}
    for name, seconds in times.items():
        lower, _, upper = (1e3 * value for value in statistics.quantiles(seconds, n=4))
        medians[name] = statistics.median(seconds)
        rate = operations / medians[name] / 1e9
        quartiles = f"{lower:.0f} to {upper:.0f} ms"
        print(f"{name:28} {1e3 * medians[name]:6.1f} ms {quartiles:>15} {rate:8.1f} {peaks[name] / 1e6:6.0f} MB")
    least = operations / gemm / 1e9
    print(f"{'the matrix products alone':28} {1e3 * least:6.1f} ms {'':15} {gemm:8.1f}")
    return medians


if __name__ == "__main__":
    sys.exit(main())
