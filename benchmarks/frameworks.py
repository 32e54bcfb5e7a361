"""A training step of the MLP of `step_overhead.py` in Lightning, ignite and JAX, each in its own way, beside ours.

All begin with the same weights and take the same batches with the same Adam; after a first run their losses must agree.
"""

# pyright: reportMissingImports=false
# The libraries come with the extra "bench"; one that is not installed is skipped.

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from step_overhead import BATCH, LR, make_model, squared_error
from timing import interleaved, medians_of
from verdicts import conclude

from dwiml_func import adam, epoch_fn, init_state, jit_step, module_loss, train_step

BARE, EAGER, COMPILED = "bare torch.optim.Adam loop", "ours, eager (donated)", "ours, compiled (donated)"
FOLDED = "ours, compiled, a run in epoch_fn"
LIGHTNING, IGNITE = "Lightning Trainer.fit", "ignite Engine"
LINEN, NNX, SCAN = (
    "JAX: flax.linen TrainState, jax.jit",
    "JAX: flax.nnx Optimizer, nnx.jit",
    "JAX: a run as one lax.scan",
)
LIMIT = 0.2  # compiled, of Lightning's time
LIMITS = {COMPILED: 0.2, FOLDED: 0.1}  # of the bare loop's time
TOLERANCE = 1e-5  # of losses, relative; rounding differs, and the steps carry it on

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Variant(NamedTuple):
    """A run through all batches, which may return its own seconds, and the loss of the first batch afterwards."""

    run: Callable[[], object]
    loss: Callable[[], float]


def main() -> int:
    """Print a table of medians and ratios, and whether the limits hold. Exit code 1 when one does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps of each run (default: 300)")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each variant, in turn (default: 15)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    sizes = ((BATCH, 16), (BATCH, 3))
    batches: Any = [tuple(torch.randn(size, generator=generator) for size in sizes) for _ in range(options.steps)]
    variants = {BARE: bare(batches), EAGER: ours(False, batches), COMPILED: ours(True, batches)}
    variants[FOLDED] = folded(batches)
    for modules, makers in LIBRARIES.items():
        try:
            for module in modules:
                importlib.import_module(module)
        except ImportError as error:
            print(f'skip: {", ".join(makers)}: {error} (pip install -e ".[bench]")')
        else:
            variants |= {name: make(batches) for name, make in makers.items()}

    losses = {}
    for name, variant in variants.items():  # also the warm-up
        variant.run()
        losses[name] = variant.loss()
    medians = medians_of(interleaved({name: own.run for name, own in variants.items()}, options.rounds, warm_up=1))
    print(f"torch {torch.__version__}, 1 thread, runs of {options.steps} steps, {options.rounds} rounds in turn\n")
    print("| one step, MLP 16-32-32-3, batch 64 | median | ratio | loss after a run |\n|---|---|---|---|")
    for name, seconds in medians.items():
        ratio = seconds / medians[BARE]
        print(f"| {name} | {1e6 * seconds / options.steps:.0f} µs | {ratio:.2f} | {losses[name]:.6f} |")
    difference = max(abs(loss / losses[BARE] - 1) for loss in losses.values())
    text = f"losses after {options.steps} steps differ by {difference:.1e} of theirs, at most {TOLERANCE:.0e} required"
    verdicts = [(difference <= TOLERANCE, text)]
    for name, limit in LIMITS.items():
        ratio = medians[name] / medians[BARE]
        verdicts += [(ratio <= limit, f"{name}: {ratio:.2f} times the bare loop, at most {limit:g} required")]
    if LIGHTNING in medians:
        ratio = medians[COMPILED] / medians[LIGHTNING]
        verdicts += [(ratio <= LIMIT, f"compiled takes {ratio:.2f} times Lightning's time, at most {LIMIT} required")]
    print()
    return conclude(verdicts)


def bare(batches: Batches) -> Variant:
    """A plain loop."""
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def run() -> None:
        for batch in batches:
            optimizer.zero_grad()
            squared_error(model, batch)[0].backward()
            optimizer.step()

    return Variant(run, lambda: squared_error(model, batches[0])[0].item())


def ours(is_compiled: bool, batches: Batches) -> Variant:
    """`train_step` or `jit_step`, without a seed, since the model is deterministic."""
    fixed = {"loss_fn": module_loss(make_model(), squared_error, stochastic=False), "optimizer": adam(), "donate": True}
    step: Any = jit_step(**fixed) if is_compiled else partial(train_step, **fixed)
    state = init_state(make_model(), adam(), seed=0)

    def run() -> None:
        nonlocal state
        for batch in batches:
            state, _ = step(state, batch, lr=LR)

    def loss() -> float:
        model = make_model()
        model.load_state_dict(dict(state.params))
        return squared_error(model, batches[0])[0].item()

    return Variant(run, loss)


def folded(batches: Batches) -> Variant:
    """`jit_step` through `epoch_fn`, which takes batches of equal shapes in one loop around the graph."""
    fixed = {"loss_fn": module_loss(make_model(), squared_error, stochastic=False), "optimizer": adam(), "donate": True}
    step = partial(jit_step(**fixed), lr=LR)
    state = init_state(make_model(), adam(), seed=0)

    def run() -> None:
        nonlocal state
        state, _ = epoch_fn(state, batches, step=step)

    def loss() -> float:
        model = make_model()
        model.load_state_dict(dict(state.params))
        return squared_error(model, batches[0])[0].item()

    return Variant(run, loss)


def lightning(batches: Batches) -> Variant:
    """`Trainer.fit` of an epoch, with logging, checkpoints and bars off; its time is that of the epoch alone."""
    pl = importlib.import_module("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    class Module(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return squared_error(self.model, batch)[0]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=LR)

    class Clock(pl.Callback):  # type: ignore[name-defined, misc]
        seconds = 0.0

        def on_train_epoch_start(self, *_: Any) -> None:
            self.seconds = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            self.seconds = time.perf_counter() - self.seconds

    module = Module()
    dataset: Any = batches
    loader = torch.utils.data.DataLoader(dataset, batch_size=None)
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

    def run() -> float:
        clock = Clock()
        pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[clock], **off).fit(module, loader)
        return clock.seconds

    return Variant(run, lambda: squared_error(module.model, batches[0])[0].item())


def ignite(batches: Batches) -> Variant:
    """The `Engine` that ignite's helper makes."""
    engine = importlib.import_module("ignite.engine")
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    trainer = engine.create_supervised_trainer(model, optimizer, torch.nn.functional.mse_loss)
    run = partial(trainer.run, batches, max_epochs=1)
    return Variant(run, lambda: squared_error(model, batches[0])[0].item())


def linen(is_scanned: bool, batches: Batches) -> Variant:
    """Optax in flax's `TrainState`, donated: a jitted step for each batch, or one jitted scan over all of them."""
    import jax
    import optax
    from flax import linen as nn
    from flax.training.train_state import TrainState

    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for _ in range(2):
                x = nn.relu(nn.Dense(32)(x))
            return nn.Dense(3)(x)

    def loss_of(params: Any, batch: Any) -> Any:
        return ((MLP().apply({"params": params}, batch[0]) - batch[1]) ** 2).mean()

    def step(state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(state.params, batch)
        return state.apply_gradients(grads=grads), loss

    params = {f"Dense_{number}": layer for number, layer in enumerate(jax_layers())}
    state = TrainState.create(apply_fn=MLP().apply, params=params, tx=optax.adam(LR))
    jax_batches = [tuple(jax.numpy.asarray(part.numpy()) for part in batch) for batch in batches]
    stacked = tuple(jax.numpy.stack(parts) for parts in zip(*jax_batches, strict=True))
    jitted = jax.jit(partial(jax.lax.scan, step) if is_scanned else step, donate_argnums=0)

    def run() -> None:
        nonlocal state
        for batch in [stacked] if is_scanned else jax_batches:
            state, _ = jitted(state, batch)
        jax.block_until_ready(state.params)

    return Variant(run, lambda: float(loss_of(state.params, jax_batches[0])))


def nnx(batches: Batches) -> Variant:
    """Optax in flax's later interface: `nnx.jit` over a step that updates a module and an `nnx.Optimizer`."""
    import jax
    import optax
    from flax import nnx

    class MLP(nnx.Module):
        def __init__(self) -> None:
            self.first, self.second, self.third = (
                nnx.Linear(*sizes, rngs=nnx.Rngs(0)) for sizes in ((16, 32), (32, 32), (32, 3))
            )

        def __call__(self, x: Any) -> Any:
            return self.third(nnx.relu(self.second(nnx.relu(self.first(x)))))

    def loss_of(model: Any, batch: Any) -> Any:
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    @nnx.jit
    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        loss, grads = nnx.value_and_grad(loss_of)(model, batch)
        optimizer.update(model, grads)
        return loss

    model = MLP()
    for layer, values in zip((model.first, model.second, model.third), jax_layers(), strict=True):
        layer.kernel, layer.bias = nnx.Param(values["kernel"]), nnx.Param(values["bias"])
    optimizer = nnx.Optimizer(model, optax.adam(LR), wrt=nnx.Param)
    jax_batches = [tuple(jax.numpy.asarray(part.numpy()) for part in batch) for batch in batches]

    def run() -> None:
        for batch in jax_batches:
            step(model, optimizer, batch)
        jax.block_until_ready(nnx.state(model))

    return Variant(run, lambda: float(loss_of(model, jax_batches[0])))


def jax_layers() -> list[dict[str, Any]]:
    """The first weights as flax lays them out."""
    import jax.numpy as jnp

    layers = [layer for layer in make_model().modules() if isinstance(layer, torch.nn.Linear)]
    pairs = [(np.ascontiguousarray(layer.weight.detach().numpy().T), layer.bias.detach().numpy()) for layer in layers]
    return [{"kernel": jnp.array(kernel), "bias": jnp.array(bias)} for kernel, bias in pairs]


LIBRARIES: dict[tuple[str, ...], dict[str, Callable[[Batches], Variant]]] = {
    ("lightning",): {LIGHTNING: lightning},
    ("ignite.engine",): {IGNITE: ignite},
    ("jax", "optax", "flax"): {LINEN: partial(linen, False), NNX: nnx, SCAN: partial(linen, True)},
}


if __name__ == "__main__":
    sys.exit(main())
