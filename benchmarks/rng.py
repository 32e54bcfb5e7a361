"""What randomness by address costs: keys and random numbers, beside torch's generator and `jax.random`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import numpy as np
import torch
from timing import interleaved, medians_of
from torch.nn.functional import dropout
from verdicts import conclude

from dwiml_func import Key, Stream, fold_in, numpy_rng, torch_rng

KEY, REPEATS = Key(1234), 100
HIDDEN, POINTS, STREAMLINES = (11_700, 100), (11_700, 3), 1_000_000
FOLD, BLOCK = "fold_in(key, stream, epoch, batch)", "torch_rng(key), empty"
FLOOR, FORKED = "its floor: get_state, manual_seed, set_state", "the usual way: torch.random.fork_rng, manual_seed"
GENERATOR, SEEDED = "numpy_rng(key)", "numpy.random.default_rng(seed)"
DROPOUT, NOISE, PLAN = "dropout of 11,700 x 100", "noise of 11,700 x 3", "a permutation of 1,000,000"
OURS, TORCH, JAX = "by key", "torch, global generator", "jax.random, jitted"
MAX_OF_USUAL_WAY = 0.2
LIMITS = {DROPOUT: (TORCH, 1.1), NOISE: (JAX, 1.0), PLAN: (JAX, 1.0)}


def main() -> int:
    """Print tables and whether the limits hold. Exit code 1 when one does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads (default: 1)")
    parser.add_argument("--rounds", type=int, default=60, help="rounds, each of everything (default: 60)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.rounds} rounds in turn, one process\n")

    keys = medians_of(interleaved(repeated(key_variants()), options.rounds))
    print("| a key, a generator | median |\n|---|---|")
    for name, seconds in keys.items():
        print(f"| {name} | {1e6 * seconds / REPEATS:.2f} µs |")

    print("\n| random numbers | " + " | ".join((OURS, TORCH, JAX)) + " |\n|---|---|---|---|")
    medians = {}
    for name, variants in sample_variants().items():
        medians[name] = medians_of(interleaved(variants, max(options.rounds // (4 if name == PLAN else 1), 1)))
        print(f"| {name} | " + " | ".join(f"{1e3 * seconds:.2f} ms" for seconds in medians[name].values()) + " |")

    ratio = (keys[FOLD] + keys[BLOCK]) / keys[FORKED]
    verdicts = [
        (
            ratio <= MAX_OF_USUAL_WAY,
            f"a step's key and its block take {ratio:.2f} times torch.random.fork_rng with manual_seed, "
            f"at most {MAX_OF_USUAL_WAY} required",
        )
    ]
    for name, (beside, limit) in LIMITS.items():
        ratio = medians[name][OURS] / medians[name][beside]
        verdicts += [(ratio <= limit, f"{name} by key takes {ratio:.2f} times {beside}; at most {limit:g} required")]
    print()
    return conclude(verdicts)


def repeated(variants: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], None]]:
    """Each many times over, for a clock that is not fine enough."""

    def many(run: Callable[[], object]) -> Callable[[], None]:
        def run_many() -> None:
            for _ in range(REPEATS):
                run()

        return run_many

    return {name: many(run) for name, run in variants.items()}


def key_variants() -> dict[str, Callable[[], object]]:
    """What leads from a position in the run to a generator."""
    import jax

    batches = count()
    key = fold_in(KEY, Stream.TRAIN_STEP, 3, 7)
    jax_key, jax_fold_in = jax.random.key(1234), jax.jit(jax.random.fold_in)
    generator = torch.default_generator

    def ours() -> None:
        with torch_rng(key):
            pass

    def forked() -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234)

    def floor() -> None:
        state = generator.get_state()
        generator.manual_seed(1234)
        generator.set_state(state)

    return {
        FOLD: lambda: fold_in(KEY, Stream.TRAIN_STEP, 3, next(batches)),
        "jax.random.fold_in": lambda: jax.random.fold_in(jax_key, next(batches)).block_until_ready(),
        "jax.random.fold_in, jitted": lambda: jax_fold_in(jax_key, next(batches)).block_until_ready(),
        BLOCK: ours,
        FLOOR: floor,
        FORKED: forked,
        GENERATOR: lambda: numpy_rng(key),
        SEEDED: lambda: np.random.default_rng(1234),
    }


def sample_variants() -> dict[str, dict[str, Callable[[], object]]]:
    """The random numbers of a run: dropout of a layer, noise on a batch's points, the order of an epoch."""
    import jax
    import jax.numpy as jnp

    hidden, batches = torch.randn(HIDDEN), count()
    jax_hidden, jax_key = jnp.asarray(hidden.numpy()), jax.random.key(1234)

    def by_key(sample: Callable[[Key], object]) -> Callable[[], object]:
        return lambda: sample(fold_in(KEY, Stream.TRAIN_STEP, 3, next(batches)))

    def jitted(sample: Callable[[Any, Any], Any]) -> Callable[[], object]:
        compiled = jax.jit(lambda key, batch, x: sample(jax.random.fold_in(key, batch), x))
        return lambda: compiled(jax_key, next(batches), jax_hidden).block_until_ready()

    def dropped(key: Key) -> torch.Tensor:
        with torch_rng(key):
            return dropout(hidden, 0.1)

    return {
        DROPOUT: {
            OURS: by_key(dropped),
            TORCH: lambda: dropout(hidden, 0.1),
            JAX: jitted(lambda key, x: jnp.where(jax.random.bernoulli(key, 0.9, HIDDEN), x / 0.9, 0.0)),
        },
        NOISE: {
            OURS: by_key(lambda key: numpy_rng(key).standard_normal(POINTS, dtype=np.float32)),
            TORCH: lambda: torch.randn(POINTS),
            JAX: jitted(lambda key, _: jax.random.normal(key, POINTS)),
        },
        PLAN: {
            OURS: by_key(lambda key: numpy_rng(key).permutation(STREAMLINES)),
            TORCH: lambda: torch.randperm(STREAMLINES),
            JAX: jitted(lambda key, _: jax.random.permutation(key, STREAMLINES)),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
