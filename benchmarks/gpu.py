"""Training on a GPU: our steps, with loading and augmentation, beside cuDNN in the usual loop, and what a step does.

It downloads nothing and takes at most four minutes: what has not started after three is left out. What fails prints a
line, and the rest runs. `--device cpu --tiny` runs all of it without a GPU, to see that it runs: the requirements
are those of one H100 or H200, and are skipped.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ensemble import make_learn2track, make_mlp, mlp_batch, squared_error, streamlines
from timing import interleaved, medians_of
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from verdicts import conclude

from dwiml_func import (
    Key,
    adam,
    capture_ensemble_step,
    ensemble_step,
    init_state,
    jit_step,
    module_loss,
    stack_states,
    torch_rng,
    train_step,
)
from dwiml_func.core.precision import set_matmul_precision
from dwiml_func.data import StreamlineBatch, StreamlineDataset
from dwiml_func.data.augmentation import Augmentation
from dwiml_func.data.dataset import DatasetIndex
from dwiml_func.data.device_data import copy_to_device, make_on_device, plan_batch
from dwiml_func.data.loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.data.padding import padded_lengths, with_fixed_shape, with_padded_length
from dwiml_func.data.prefetch import MovedAhead, Prefetched
from dwiml_func.data.resampling import Resampling
from dwiml_func.data.shards import cut_batch
from dwiml_func.data.streamlines import Streamlines, directions, offsets_of
from dwiml_func.models import Learn2Track, compute_batch_loss
from dwiml_func.models.transformers.transformer import Transformer

EAGER, CAPTURED = "ours, eager", "ours, captured"
PACKED, PADDED = "packed cuDNN, usual loop", "padded cuDNN, usual loop"
MLP, BARE = "tiny MLP", "bare torch.optim.Adam loop"
FEATURES, LR = 48, 1e-3
AUGMENTATION = Augmentation(reverse_ratio=0.5, split_ratio=0.2, noise_gaussian_size_forward=0.1)
MAX_GRAPHS, CAPTURES = 64, 60  # steps before the measurement, in which graphs are captured
LAST_START = 180.0  # seconds after which no further part of the benchmark starts
TURN = 0.4  # seconds that the steps of a turn take at most, unless one takes longer
LOSSES = "loss on the device, relative to the CPU's"


NAN = float("nan")
Variants = dict[tuple[str, str], Callable[[], Callable[[], None]]]
"""By model and variant: what makes a function that takes a step."""


class Case(NamedTuple):
    """What is trained: how many streamlines a batch, in which precision, and the layers of a recurrent model."""

    num_streamlines: int
    make: Callable[[], nn.Module]
    precision: str
    rnn_key: str | None = None
    sizes: tuple[int, ...] = ()


class Measured(NamedTuple):
    """Of one step: seconds, kernels (on a CPU operations), waits of the host, share of device time, peak bytes."""

    seconds: float
    num_kernels: float
    num_waits: float
    busy: float
    peak: int


def rnn(num: int, rnn_key: str, sizes: tuple[int, ...], precision: str) -> Case:
    """A Learn2Track model."""
    make = partial(Learn2Track, FEATURES, rnn_key=rnn_key, rnn_layer_sizes=sizes, nb_previous_dirs=1)
    return Case(num, make, precision, rnn_key, sizes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the machine, the table, and whether the limits hold. Exit code 1 when one does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where to train (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="small models and few steps: to see that all of it runs")
    options = parser.parse_args(arguments)
    device, tiny = torch.device(options.device), options.tiny
    if device.type == "cuda" and not torch.cuda.is_available():
        print("skip: no CUDA device was found; --device cpu --tiny shows that the script runs")
        return 0
    start = time.monotonic()
    describe(device)
    print(f"\n{'a training step':34} {'':26} {'time':>10} {'kernels':>8} {'waits':>6} {'busy':>6} {'peak':>9}")
    results: dict[tuple[str, str], Measured] = {}
    parts: dict[str, Callable[[], dict[tuple[str, str], Measured]]] = {
        name: partial(measure_case, name, case, device, tiny) for name, case in cases(tiny).items()
    }
    parts |= {"tiny MLP": partial(measure_mlp, device, tiny), "ensembles": partial(measure_ensembles, device, tiny)}
    difference = attempt(LOSSES, partial(loss_difference, device, tiny))
    for what, part in parts.items():
        if time.monotonic() - start > LAST_START:
            print(f"left out: {what}: {LAST_START:.0f} s have passed")
            continue
        for (name, variant), measured in (attempt(what, part) or {}).items():
            results[name, variant] = measured
            print_row(name, variant, measured)
    if not tiny:
        attempt("JAX", partial(print_jax, device))
    print(
        f"\n{time.monotonic() - start:.0f} s in all. Steps of ours load and augment their batches, those of the usual"
    )
    print("loops have batches in the device's memory. Waits are those that torch's sync debug mode warns of.")
    verdicts = judge(results, difference, tiny)
    if device.type == "cpu" or tiny:
        for _, text in verdicts:
            print(f"skip: {text.rsplit(', at most', 1)[0]}: not judged on {device}{' with --tiny' if tiny else ''}")
        return 0
    return conclude(verdicts)


def attempt(what: str, function: Callable[[], Any]) -> Any:
    """What a function returns; None, and a line that says why, where it fails."""
    try:
        return function()
    except Exception as error:
        print(f"failed: {what}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        return None


def describe(device: torch.device) -> None:
    """Print what computes."""
    print(f"torch {torch.__version__}, Python {platform.python_version()}, device {device}")
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        print(f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {versions}")
    print("float32 products in float32, but where tf32 is written")


def cases(tiny: bool) -> dict[str, Case]:
    """What is measured, by name."""
    if tiny:
        small: dict[str, Any] = {"input_embedded_size": 8, "nheads": 2, "n_layers_e": 1, "dropout_rate": 0.0}
        return {
            "6 x LSTM 8+8": rnn(6, "lstm", (8, 8), "bf16"),
            "6 x transformer": Case(6, partial(Transformer, FEATURES, model="tts", **small), "float32"),
        }
    options: dict[str, Any] = {"input_embedded_size": 128, "nheads": 8, "n_layers_e": 6, "dropout_rate": 0.0}
    transformer = partial(Transformer, FEATURES, model="tts", **options)
    return {
        "100 x LSTM 100+100": rnn(100, "lstm", (100, 100), "float32"),
        "1,000 x LSTM 512+512, bf16": rnn(1000, "lstm", (512, 512), "bf16"),
        "1,000 x GRU 500+500, bf16": rnn(1000, "gru", (500, 500), "bf16"),
        "100 x transformer 6 x 128, bf16": Case(100, transformer, "bf16"),
        "1,000 x LSTM 512+512, tf32": rnn(1000, "lstm", (512, 512), "tf32"),
    }


def make_dataset(num_streamlines: int, tiny: bool) -> StreamlineDataset:
    """Streamlines of 40 to 200 points, steps of half a voxel, in a volume of random features."""
    rng = np.random.default_rng(1)
    size, longest = (16, 40) if tiny else (96, 200)
    lengths = torch.from_numpy(rng.integers(longest // 5, longest + 1, num_streamlines))
    starts = torch.from_numpy(rng.uniform(0.25 * size, 0.75 * size, (num_streamlines, 3)).astype(np.float32))
    steps = rng.normal(size=(int(lengths.sum()), 3)).astype(np.float32)
    steps = torch.from_numpy(0.5 * steps / np.linalg.norm(steps, axis=1, keepdims=True))
    offsets, walked = offsets_of(lengths), steps.cumsum(0)
    origin = starts - walked[offsets[:-1]]
    return StreamlineDataset(
        path=Path("random.hdf5"),
        subset="training",
        index=DatasetIndex(("random",), np.array([num_streamlines])),
        volumes=(torch.from_numpy(rng.standard_normal((size, size, size, FEATURES), dtype=np.float32)),),
        streamlines=Streamlines(walked + origin.repeat_interleave(lengths, dim=0), offsets),
        voxel_sizes=torch.full((1, 3), 2.0),
        input_attributes={},
    )


class Plans:
    """Endless plans of batches at random, padded and in pinned memory; with `fill` of a few shapes."""

    def __init__(
        self, case: Case, dataset: StreamlineDataset, plan: Callable[..., StreamlineBatch], *, pin: bool, fill: bool
    ) -> None:
        self._case, self._dataset, self._plan, self._pin, self._fill = case, dataset, plan, pin, fill
        self._lengths = padded_lengths([dataset], Resampling())

    def __len__(self) -> int:
        return sys.maxsize

    def __iter__(self) -> Iterator[StreamlineBatch]:
        rng = np.random.default_rng(3)
        for number in itertools.count():
            ids = rng.permutation(self._dataset.index.num_total)[: self._case.num_streamlines]
            batch = with_padded_length(self._plan(BatchRequest(ids, Key(1), 0, number)), self._lengths)
            batch = with_fixed_shape(batch) if self._fill else batch
            yield batch.pin_memory() if self._pin else batch


def measure_case(name: str, case: Case, device: torch.device, tiny: bool) -> dict[tuple[str, str], Measured]:
    """Each variant of a case that this machine can run."""
    set_matmul_precision("high" if case.precision == "tf32" else "highest")
    dataset = make_dataset(4 * case.num_streamlines, tiny)
    spec = LoaderSpec(augmentation=AUGMENTATION)
    with torch_rng(Key(1)):
        model: Any = case.make().to(device)
    autocast = torch.bfloat16 if case.precision == "bf16" else None
    loss_fn = module_loss(model, compute_batch_loss, autocast=autocast)
    data = copy_to_device(dataset, spec, device)

    def batches(fill: bool) -> Iterator[StreamlineBatch]:
        plan = partial(plan_batch, data=data, spec=spec)
        plans: Any = Plans(case, dataset, plan, pin=device.type == "cuda", fill=fill)

        def move(plan: Any) -> Any:
            return make_on_device(plan.to(device, non_blocking=True), data=data, spec=spec)

        return iter(MovedAhead(Prefetched(plans), move, device))

    def ours(step: Callable[..., Any], *, fill: bool = False) -> Callable[[], None]:
        state, source = init_state(model, adam(), seed=1), batches(fill)

        def run() -> None:
            nonlocal state
            state, _ = step(state, next(source), lr=LR)

        return run

    options: dict[str, Any] = {"loss_fn": loss_fn, "optimizer": adam(), "donate": True, "non_finite": "defer"}
    captured = jit_step(**options, cuda_graphs=True, max_compilations=MAX_GRAPHS)
    variants: Variants = {
        (name, EAGER): lambda: ours(partial(train_step, **options)),
        (name, CAPTURED): lambda: captured_before(ours(captured, fill=True), captured, tiny),
    }
    if case.rnn_key is not None:
        batch = with_padded_length(
            load_batch(BatchRequest(np.arange(case.num_streamlines), Key(1), 0, 0), dataset=dataset, spec=LoaderSpec()),
            (1,),
        ).to(device)
        variants[name, PACKED] = lambda: usual_loop(case, batch, packed=True)
        variants[name, PADDED] = lambda: usual_loop(case, batch, packed=False)
    return measure(variants, device, tiny)


def captured_before(run: Callable[[], None], step: Any, tiny: bool) -> Callable[[], None]:
    """The function, called until its graphs are captured."""
    for _ in range(3 if tiny else CAPTURES):
        run()
    if step.cuda_graphs_reason is not None:
        print(f"without CUDA graphs: {step.cuda_graphs_reason}")
    return run


def usual_loop(case: Case, batch: StreamlineBatch, *, packed: bool) -> Callable[[], None]:
    """A stateful loop on one batch in memory: `nn.LSTM` or `nn.GRU`, Adam, clipping; loss and norm are read."""
    device, sizes = batch.inputs.device, (FEATURES, *case.sizes)
    kind: Any = nn.LSTM if case.rnn_key == "lstm" else nn.GRU
    layers = nn.ModuleList(kind(below, size) for below, size in itertools.pairwise(sizes)).to(device)
    last = nn.Linear(case.sizes[-1], 3).to(device)
    parameters = [*layers.parameters(), *last.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LR)
    lengths, length = batch.input_offsets.diff(), batch.padded_length or 0
    wanted = nn.functional.normalize(directions(batch.points, batch.offsets), dim=1)
    is_real = torch.arange(length, device=device)[:, None] < lengths  # (T, S)
    padded = batch.inputs.new_zeros(length, len(lengths), FEATURES)
    padded.transpose(0, 1)[is_real.t()] = batch.inputs
    targets = batch.inputs.new_zeros(length, len(lengths), 3)
    targets.transpose(0, 1)[is_real.t()] = wanted
    rows: Any = pack_padded_sequence(padded, lengths.cpu(), enforce_sorted=False) if packed else padded
    wanted = pack_padded_sequence(targets, lengths.cpu(), enforce_sorted=False).data if packed else targets
    mask = None if packed else is_real.to(padded.dtype)
    dtype = torch.bfloat16 if case.precision == "bf16" else None

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            x = rows
            for number, layer in enumerate(layers):
                if number:
                    x = x._replace(data=x.data.relu()) if packed else x.relu()
                x, _ = layer(x)
            outputs = last(x.data if packed else x)
        cosines = nn.functional.cosine_similarity(outputs.float(), wanted, dim=-1)
        loss = -cosines.mean() if mask is None else -(cosines * mask).sum() / mask.sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        _ = loss.item(), norm.item()

    return run


def measure_mlp(device: torch.device, tiny: bool) -> dict[tuple[str, str], Measured]:
    """A step of the MLP of `step_overhead.py`."""
    inputs, targets = mlp_batch()
    batch = inputs.to(device), targets.to(device)
    model, bare = make_mlp(0).to(device), make_mlp(0).to(device)
    optimizer = torch.optim.Adam(bare.parameters(), lr=LR)

    def usual() -> None:
        optimizer.zero_grad()
        squared_error(bare, batch)[0].backward()
        optimizer.step()

    options: dict[str, Any] = {
        "loss_fn": module_loss(model, squared_error, stochastic=False),
        "optimizer": adam(),
        "donate": True,
        "non_finite": "defer",
    }

    def ours(step: Callable[..., Any]) -> Callable[[], None]:
        state = init_state(model, adam(), seed=1)

        def run() -> None:
            nonlocal state
            state, _ = step(state, batch, lr=LR)

        return run

    captured = jit_step(**options, cuda_graphs=True)
    variants: Variants = {
        (MLP, BARE): lambda: usual,
        (MLP, EAGER): lambda: ours(partial(train_step, **options)),
        (MLP, CAPTURED): lambda: captured_before(ours(captured), captured, tiny),
    }
    return measure(variants, device, tiny)


def measure_ensembles(device: torch.device, tiny: bool) -> dict[tuple[str, str], Measured]:
    """One step of all members, for a few numbers of members."""
    on_device = tuple(part.to(device) for part in mlp_batch())
    lines = streamlines()
    lines = with_padded_length((cut_batch(lines, 12)[0] or lines) if tiny else lines, (1,)).to(device)
    kinds: Any = (
        ("MLPs", make_mlp, squared_error, on_device),
        ("Learn2Track", make_learn2track, compute_batch_loss, lines),
    )
    counts, variants = members(tiny), Variants()
    for kind, make, loss, batch in kinds:
        for count in counts[kind]:
            for variant in (EAGER, CAPTURED):
                is_captured = variant == CAPTURED
                own = partial(ensemble_of, count, make, loss, batch, device, is_captured=is_captured, tiny=tiny)
                variants[f"{count} {kind}", variant] = own
    return measure(variants, device, tiny)


def members(tiny: bool) -> dict[str, tuple[int, ...]]:
    """Numbers of members, by kind."""
    return {"MLPs": (1, 2), "Learn2Track": (1, 2)} if tiny else {"MLPs": (1, 8, 64), "Learn2Track": (1, 16)}


def ensemble_of(
    count: int,
    make: Callable[[int], nn.Module],
    loss: Any,
    batch: Any,
    device: torch.device,
    *,
    is_captured: bool,
    tiny: bool,
) -> Callable[[], None]:
    """A function that takes a step of all members."""
    ensemble = stack_states([init_state(make(seed).to(device), adam(), seed=seed) for seed in range(count)])
    options: dict[str, Any] = {"loss_fn": module_loss(make(0).to(device), loss), "optimizer": adam()}
    step = capture_ensemble_step(**options) if is_captured else partial(ensemble_step, **options)

    def run() -> None:
        nonlocal ensemble
        ensemble, _ = step(ensemble, batch, lr=LR)

    return captured_before(run, step, tiny) if is_captured else run


def measure(variants: Variants, device: torch.device, tiny: bool) -> dict[tuple[str, str], Measured]:
    """Seconds of a step in turns of steps in a row, then what a few steps do; of the variants that run."""

    def started(make: Callable[[], Callable[[], None]]) -> tuple[Callable[[], None], float]:
        run = make()
        if not tiny:
            run()
            synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        return run, time.perf_counter() - start

    ready = {key: attempt(", ".join(key), partial(started, make)) for key, make in variants.items()}
    runs = {key: run for key, own in ready.items() if own is not None for run in own[:1]}
    if not runs:
        return {}
    slowest = max(own[1] for own in ready.values() if own is not None)
    num_steps, rounds = (1, 1) if tiny else (max(1, min(20, int(TURN / slowest))), 3)

    def turn(run: Callable[[], None]) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(num_steps):
            run()
        synchronize(device)
        return (time.perf_counter() - start) / num_steps

    turns = {", ".join(key): partial(turn, run) for key, run in runs.items()}
    seconds = medians_of(interleaved(turns, rounds, warm_up=int(not tiny)))
    results = {}
    for key, run in runs.items():
        name = ", ".join(key)
        inspected = attempt(f"{name}, inspected", partial(inspect_step, run, device, seconds[name], 1 if tiny else 3))
        num_kernels, num_waits, busy, peak = inspected or (NAN, NAN, NAN, 0)
        results[key] = Measured(seconds[name], num_kernels, num_waits, busy, peak)
    return results


def inspect_step(
    run: Callable[[], None], device: torch.device, seconds: float, num_steps: int
) -> tuple[float, float, float, int]:
    """Kernels, waits, the share of the time in which the device is busy, and the peak of memory of a step."""
    on_gpu, peak, waits = device.type == "cuda", 0, 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in range(num_steps):
                    run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchronizing" in str(each.message) for each in found)
        peak = torch.cuda.max_memory_allocated(device)
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    synchronize(device)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(num_steps):
            run()
        synchronize(device)
    if on_gpu:
        kernels = [event for event in profiler.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    else:
        kernels = [event for event in profiler.events() or () if event.name.startswith("aten::")]
    busy = sum(event.time_range.elapsed_us() for event in kernels) * 1e-6 / num_steps / seconds if on_gpu else 0.0
    return len(kernels) / num_steps, waits / num_steps, busy, peak


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loss_difference(device: torch.device, tiny: bool) -> float:
    """How far the loss of a batch made and padded on the device is from that of the CPU, relative."""
    set_matmul_precision("highest")
    dataset, spec = make_dataset(20 if tiny else 400, tiny), LoaderSpec(augmentation=AUGMENTATION)
    request = BatchRequest(np.arange(10 if tiny else 100), Key(1), 0, 0)
    with torch_rng(Key(1)):
        model = Learn2Track(FEATURES, rnn_layer_sizes=(100, 100), nb_previous_dirs=1)
    with torch.no_grad():
        expected, *_ = compute_batch_loss(model, load_batch(request, dataset=dataset, spec=spec))
        data = copy_to_device(dataset, spec, device)
        plan = with_padded_length(plan_batch(request, data=data, spec=spec), (1,)).to(device)
        batch: Any = make_on_device(plan, data=data, spec=spec)
        loss, *_ = compute_batch_loss(model.to(device), replace(batch))
    return abs(loss.item() - expected.item()) / abs(expected.item())


def print_jax(device: torch.device) -> None:
    """The gradient of `rnn.py`'s scan in JAX, where it is installed and finds the same kind of device."""
    try:
        import jax  # pyright: ignore[reportMissingImports]
        from rnn import jax_variant
    except ImportError:
        print("skip: JAX is not installed")
        return
    wanted = "gpu" if device.type == "cuda" else "cpu"
    if jax.default_backend() != wanted:
        print(f"skip: JAX has no {wanted}, only {jax.default_backend()}")
        return
    run = jax_variant("lstm")
    seconds = medians_of(interleaved({"jax": run}, 5))["jax"]
    print(f"{'100 x LSTM 100+100':34} {'JAX, jitted scan: gradient':26} {1e3 * seconds:7.2f} ms")


def print_row(name: str, variant: str, measured: Measured) -> None:
    """One row of the table."""
    numbers = f"{measured.num_kernels:8.0f} {measured.num_waits:6.1f} {100 * measured.busy:4.0f} %"
    print(f"{name:34} {variant:26} {1e3 * measured.seconds:7.2f} ms {numbers} {measured.peak / 2**20:5.0f} MiB")


def judge(results: dict[tuple[str, str], Measured], difference: float | None, tiny: bool) -> list[tuple[bool, str]]:
    """Whether each requirement is met, by ours captured where there is that, else eager; not what was not measured."""
    verdicts = []

    def limit(value: float | None, most: float, text: str, unit: str = "") -> None:
        found = "not measured" if value is None or value != value else f"{value:.3g}{unit}"
        verdicts.append((value is not None and value <= most, f"{text}: {found}, at most {most:g}{unit} required"))

    def seconds(name: str, *variants: str) -> float | None:
        found = [results[name, variant].seconds for variant in variants if (name, variant) in results]
        return found[0] if found else None

    def step(name: str) -> float | None:
        return seconds(name, CAPTURED, EAGER)

    def ratio(one: float | None, other: float | None) -> float | None:
        return None if one is None or other is None else one / other

    first, *others = cases(tiny)
    limit(scaled(step(first)), 2.5, f"{first}, loaded, augmented and trained", " ms")
    limit(ratio(step(first), seconds(first, PADDED)), 0.5, f"{first}, times {PADDED}")
    for name in others:
        if "LSTM 512" in name and "bf16" in name:
            limit(scaled(step(name)), 20, f"{name}, loaded, augmented and trained", " ms")
    limit(ratio(step(MLP), seconds(MLP, BARE)), 0.12, f"{MLP}, times the bare loop")
    for kind, counts in members(tiny).items():
        names = [f"{count} {kind}" for count in (counts[0], counts[-1])]
        limit(ratio(step(names[1]), step(names[0])), 1.5, f"{names[1]}, times one")
    waits = [own.num_waits for (_, variant), own in results.items() if variant in (EAGER, CAPTURED)]
    limit(sum(waits) if waits else None, 0, "waits of the host in a step")
    limit(difference, 1e-5, LOSSES)
    return verdicts


def scaled(seconds: float | None) -> float | None:
    """Milliseconds."""
    return None if seconds is None else 1e3 * seconds


if __name__ == "__main__":
    sys.exit(main())
