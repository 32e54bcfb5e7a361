"""What a pure training step costs beside a bare torch loop, on a model so small that nearly all of it is overhead."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from timing import interleaved, medians_of
from torch import Tensor, nn
from verdicts import conclude

from dwiml_func import Optimizer, adam, adamw, chain, ema, init_state, jit_step, module_loss, train_step
from dwiml_func.optim import by_name, clip_by_global_norm

BATCH = 64
TURN = 10  # steps in a row
LR = 1e-3
BARE = "bare torch.optim.Adam loop"
PURE = "pure train_step"
DONATED = "donated train_step"
COMPILED = "compiled, donated, stochastic=False"
BARE_CHAIN = "bare loop: clipping, groups, EMA"
CHAIN = "chain of clipping, groups and EMA"
LIMITS = {PURE: (1.2, BARE), DONATED: (1.1, BARE), COMPILED: (0.4, BARE), CHAIN: (1.1, BARE_CHAIN)}
OPTIMIZER = adam()
NO_DECAY = {"*bias": {"weight_decay": 0.0}}
TURNS = (
    f"Variants take turns of {TURN} steps, as a step follows a step in a training loop. 'On its own': turns of one,\n"
    "which finds another variant's code and data in the processor's caches, with the ratio to the bare loop's."
)
WHY = (
    "Why 'autograd' is the default backend: torch.func.grad_and_value always builds a graph of the backward pass\n"
    "(create_graph=True), which a training step throws away; torch.autograd.grad on detached leaves builds none. Both\n"
    "are pure. 'func' is for what it alone can do: vmap and jacrev over the loss."
)


def main() -> int:
    """Print a table of medians and ratios, and whether the limits hold. Exit code 1 when one does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads (default: 1)")
    parser.add_argument("--rounds", type=int, default=1000, help="turns of each variant (default: 1000)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    variants = make_variants()
    turns = {name: partial(take_turn, run) for name, run in variants.items()}
    times = interleaved(turns, options.rounds, warm_up=options.rounds // 10)
    ratios = print_table(times, medians_of(interleaved(variants, options.rounds)))
    print(f"\ntorch {torch.__version__}, {options.threads} thread(s), {options.rounds} interleaved rounds, one process")
    print(TURNS)
    print(WHY)
    rows = [(name, ratios[name] / ratios[base], base, limit) for name, (limit, base) in LIMITS.items()]
    return conclude(
        (ratio <= limit, f"{name} takes {ratio:.2f} times the {base}, at most {limit} required")
        for name, ratio, base, limit in rows
    )


def make_model() -> nn.Module:
    """The same small model each time: 16-32-32-3."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


def squared_error(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Mean squared error of a batch, and its size."""
    return (model(batch[0]) - batch[1]).square().mean(), len(batch[0])


def make_variants() -> dict[str, Callable[[], None]]:
    """Functions that each take one step of their own run, on the same batch."""
    generator = torch.Generator().manual_seed(1)
    batch = (torch.randn(BATCH, 16, generator=generator), torch.randn(BATCH, 3, generator=generator))

    def bare(foreach: bool | None = None) -> Callable[[], None]:
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=LR, foreach=foreach)

        def run() -> None:
            optimizer.zero_grad()
            loss, _ = squared_error(model, batch)
            loss.backward()
            optimizer.step()

        return run

    def bare_chain() -> Callable[[], None]:
        model = make_model()
        decays = [[p for n, p in model.named_parameters() if ("bias" in n) == is_bias] for is_bias in (True, False)]
        groups = [{"params": decays[0], "weight_decay": 0.0}, {"params": decays[1], "weight_decay": 0.01}]
        optimizer = torch.optim.AdamW(groups, lr=LR)
        params = list(model.parameters())
        averages = [param.detach().clone() for param in params]

        def run() -> None:
            optimizer.zero_grad()
            loss, _ = squared_error(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            torch._foreach_lerp_(averages, [param.detach() for param in params], 0.001)

        return run

    def ours(optimizer: Optimizer = OPTIMIZER, *, stochastic: bool = True, **options: object) -> Callable[[], None]:
        loss_fn = module_loss(make_model(), squared_error, stochastic=stochastic)
        step = partial(train_step, loss_fn=loss_fn, optimizer=optimizer, lr=LR, **options)
        state = init_state(make_model(), optimizer, seed=0)

        def run() -> None:
            nonlocal state
            state, _ = step(state, batch)

        return run

    def compiled(donate: bool = False) -> Callable[[], None]:
        loss_fn = module_loss(make_model(), squared_error, stochastic=False)
        step = jit_step(loss_fn=loss_fn, optimizer=adam(), donate=donate)
        state = init_state(make_model(), adam(), seed=0)

        def run() -> None:
            nonlocal state
            state, _ = step(state, batch, lr=LR)

        run()
        print(f"jit_step(donate={donate}): compiled in {step.compile_seconds:.1f} s, {step.num_compilations} graph")
        return run

    return {
        BARE: bare(),
        "bare loop, Adam(foreach=True)": bare(foreach=True),
        PURE: ours(),
        DONATED: ours(donate=True),
        "pure, stochastic=False": ours(stochastic=False),
        "donated, stochastic=False": ours(donate=True, stochastic=False),
        "pure, backend='func'": ours(backend="func"),
        "compiled, pure, stochastic=False": compiled(),
        COMPILED: compiled(donate=True),
        BARE_CHAIN: bare_chain(),
        CHAIN: ours(chain(clip_by_global_norm(1.0), ema(by_name(adamw, NO_DECAY), 0.999)), donate=True),
    }


def take_turn(run: Callable[[], None]) -> float:
    """Seconds of a step, of several in a row."""
    start = time.perf_counter()
    for _ in range(TURN):
        run()
    return (time.perf_counter() - start) / TURN


def print_table(times: dict[str, list[float]], single: dict[str, float]) -> dict[str, float]:
    """Print medians and quartiles in microseconds; return the medians as multiples of the bare loop's."""
    bare = statistics.median(times[BARE])
    ratios = {}
    print(f"{'a step, MLP 16-32-32-3, batch 64':36} {'median':>8} {'quartiles':>16} {'ratio':>6} {'on its own':>18}")
    for name, seconds in times.items():
        lower, median, upper = (1e6 * value for value in statistics.quantiles(seconds, n=4))
        ratios[name] = statistics.median(seconds) / bare
        own = f"{1e6 * single[name]:.0f} us {single[name] / single[BARE]:6.2f}"
        print(f"{name:36} {median:5.0f} us {f'{lower:.0f} to {upper:.0f} us':>16} {ratios[name]:6.2f} {own:>18}")
    return ratios


if __name__ == "__main__":
    sys.exit(main())
