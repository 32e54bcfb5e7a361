"""How much faster an ensemble trains than its members one after the other.

Times are those of the processor, in this process: other work on the machine, which hits short steps hardest, counts
little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from verdicts import conclude

from dwiml_func import Key, adam, ensemble_step, init_state, module_loss, stack_states, torch_rng, train_step
from dwiml_func.data import StreamlineBatch
from dwiml_func.models import Learn2Track, compute_batch_loss

MLP, LEARN2TRACK, DROPOUT = "16 MLPs", "8 Learn2Track", "8 Learn2Track, dropout"
ONE_BY_ONE, SAME, EACH = "one after the other", "ensemble", "ensemble, lr and weight decay of each"
LIMITS = {MLP: 4.0, LEARN2TRACK: 1.5}


def main() -> int:
    """Print a table of medians and ratios, and whether the limits hold. Exit code 1 when one does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads (default: 1)")
    parser.add_argument("--rounds", type=int, default=300, help="steps of the MLPs (default: 300); a tenth for others")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    settings: dict[str, tuple[Any, ...]] = {
        MLP: (make_mlp, squared_error, mlp_batch(), 16, options.rounds),
        LEARN2TRACK: (make_learn2track, compute_batch_loss, streamlines(), 8, options.rounds // 10),
        DROPOUT: (partial(make_learn2track, dropout=0.1), compute_batch_loss, streamlines(), 8, options.rounds // 10),
    }
    gains = {}
    print(f"{'one step of all members':26} {'':38} {'median':>9} {'quartiles':>20} {'faster':>7}")
    for name, (make, loss, batch, num_members, rounds) in settings.items():
        times = measure(make_variants(make, loss, batch, num_members), rounds)
        alone = statistics.median(times[ONE_BY_ONE])
        for variant, seconds in times.items():
            lower, median, upper = (1e3 * value for value in statistics.quantiles(seconds, n=4))
            gains[name, variant] = alone / statistics.median(seconds)
            quartiles = f"{lower:.2f} to {upper:.2f} ms"
            print(f"{name:26} {variant:38} {median:6.2f} ms {quartiles:>20} {gains[name, variant]:7.2f}")
    print(f"\ntorch {torch.__version__}, {options.threads} thread(s), interleaved, processor time of one process")
    return conclude(
        (
            gains[name, SAME] >= limit,
            f"an ensemble of {name} is {gains[name, SAME]:.2f} times faster, at least {limit} required",
        )
        for name, limit in LIMITS.items()
    )


def make_mlp(seed: int) -> nn.Module:
    """The MLP of `step_overhead.py`: 16-32-32-3."""
    with torch_rng(Key(seed)):
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


def mlp_batch() -> tuple[Tensor, Tensor]:
    """64 rows."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 16, generator=generator), torch.randn(64, 3, generator=generator)


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Mean squared error of a batch, and its size."""
    return (model(batch[0]) - batch[1]).square().mean(), len(batch[0])


def make_learn2track(seed: int, dropout: float = 0.0) -> nn.Module:
    """An LSTM of 16 and 12 features."""
    with torch_rng(Key(seed)):
        return Learn2Track(28, rnn_layer_sizes=(16, 12), nb_previous_dirs=1, dropout=dropout)


def streamlines() -> StreamlineBatch:
    """24 streamlines of 30 to 76 points, with 28 features."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.arange(30, 78, 2)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    num_points, ids = int(offsets[-1]), torch.arange(len(lengths))
    return StreamlineBatch(
        points=torch.randn(num_points, 3, generator=generator).cumsum(0),
        offsets=offsets,
        subject=torch.zeros_like(ids),
        ids=ids,
        inputs=torch.randn(num_points - len(lengths), 28, generator=generator),
    )


def make_variants(
    make: Callable[[int], nn.Module], compute_loss: Any, batch: Any, num_members: int
) -> dict[str, Callable[[], None]]:
    """Functions that each take one step with all members of their own runs, on the same batch."""
    loss_fn = module_loss(make(0), compute_loss)
    start = [init_state(make(seed), adam(), seed=seed) for seed in range(num_members)]
    state_of_each = list(start)
    options: dict[str, Any] = {"loss_fn": loss_fn, "clip_grad": 1.0}
    alone = partial(train_step, **options, optimizer=adam(weight_decay=0.01), lr=1e-3)

    def one_after_the_other() -> None:
        state_of_each[:] = [alone(state, batch)[0] for state in state_of_each]

    def together(**numbers: Any) -> Callable[[], None]:
        ensemble = stack_states(start)

        def run() -> None:
            nonlocal ensemble
            ensemble, _ = ensemble_step(ensemble, batch, **options, **numbers)

        return run

    each = torch.logspace(-4, -2, num_members, dtype=torch.float64)
    return {
        ONE_BY_ONE: one_after_the_other,
        SAME: together(optimizer=adam(weight_decay=0.01), lr=1e-3),
        EACH: together(optimizer=adam, lr=each, weight_decay=each),
    }


def measure(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of the processor for each step. The variants take turns, in an order that rotates."""
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-max(rounds // 10, 2), rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.process_time()
            variants[name]()
            elapsed = time.process_time() - start
            if index >= 0:
                times[name].append(elapsed)
    return times


if __name__ == "__main__":
    sys.exit(main())
