"""A training step of the MLP of `step_overhead.py` in Lightning and ignite, each in its own way, beside ours."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from step_overhead import BATCH, LR, make_model, squared_error
from timing import interleaved, medians_of

from dwiml_func import adam, init_state, module_loss, train_step
from dwiml_func.jit import jit_step

BARE, EAGER, COMPILED = "bare torch.optim.Adam loop", "ours, eager (donated)", "ours, compiled (donated)"
LIGHTNING, IGNITE = "Lightning Trainer.fit", "ignite Engine"
LIMIT = 0.2  # compiled, of Lightning's time


def main() -> int:
    """Print a table of medians and ratios, and whether the limit holds. Exit code 1 when it does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="steps of each run (default: 300)")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each variant, in turn (default: 9)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    batch = (torch.randn(BATCH, 16, generator=generator), torch.randn(BATCH, 3, generator=generator))
    batches = [batch] * options.steps
    variants = {BARE: bare, EAGER: partial(ours, False), COMPILED: partial(ours, True)}
    for name, module, make in ((LIGHTNING, "lightning", lightning), (IGNITE, "ignite.engine", ignite)):
        try:
            importlib.import_module(module)
        except ImportError:
            print(f'skip: {name} is not installed (pip install -e ".[bench]")')
        else:
            variants[name] = make
    medians = medians_of(interleaved({name: make(batches) for name, make in variants.items()}, options.rounds))
    print(f"torch {torch.__version__}, 1 thread, runs of {options.steps} steps, {options.rounds} rounds in turn\n")
    print("| one step, MLP 16-32-32-3, batch 64 | median | ratio |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {1e6 * seconds / options.steps:.0f} µs | {seconds / medians[BARE]:.2f} |")
    if LIGHTNING not in medians:
        return 0
    ratio = medians[COMPILED] / medians[LIGHTNING]
    verdict = "pass" if ratio <= LIMIT else "FAIL"
    print(f"\n{verdict}: compiled takes {ratio:.2f} times Lightning's time, at most {LIMIT} is required")
    return int(ratio > LIMIT)


def bare(batches: list[Any]) -> Callable[[], object]:
    """A plain loop."""
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def run() -> None:
        for batch in batches:
            optimizer.zero_grad()
            squared_error(model, batch)[0].backward()
            optimizer.step()

    return run


def ours(is_compiled: bool, batches: list[Any]) -> Callable[[], object]:
    """`train_step` or `jit_step`, without a seed for draws that the model does not make."""
    fixed = {"loss_fn": module_loss(make_model(), squared_error, stochastic=False), "optimizer": adam(), "donate": True}
    step: Any = jit_step(**fixed) if is_compiled else partial(train_step, **fixed)
    state = init_state(make_model(), adam(), seed=0)

    def run() -> None:
        nonlocal state
        for batch in batches:
            state, _ = step(state, batch, lr=LR)

    return run


def lightning(batches: list[Any]) -> Callable[[], object]:
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

    return run


def ignite(batches: list[Any]) -> Callable[[], object]:
    """An Engine around the step that its helper makes."""
    engine = importlib.import_module("ignite.engine")
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    trainer = engine.create_supervised_trainer(model, optimizer, torch.nn.functional.mse_loss)
    return lambda: trainer.run(batches, max_epochs=1)


if __name__ == "__main__":
    sys.exit(main())
