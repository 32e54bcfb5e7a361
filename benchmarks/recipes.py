"""One training in ours, Lightning and optax: how many lines it takes, and whether a kill at any batch changes its end.

The task: an MLP with dropout, batches in random order, AdamW without weight decay on biases, clipping, accumulation
over two batches, an average of the weights, and a learning rate with warm-up and cosine by step. Each saves after
every batch, or as often as it can. A run is killed after a batch and started again; its last parameters and averages
must have the bits of the run that was not. The libraries come with the extra "bench"; one that is not installed is
skipped.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import ast
import inspect
import logging
import pickle
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset
from verdicts import conclude

NUM_BATCHES, NUM_EPOCHS = 10, 2
X = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Killed(BaseException):
    """Stands for the kill: no library catches it as an error of the training."""


def make_model() -> torch.nn.Sequential:
    """The same first weights in every call."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1)
    return torch.nn.Sequential(*layers)


def ours(folder: Path, kill_at: int | None) -> list[torch.Tensor]:
    from dwiml_func import (
        accumulate,
        adamw,
        by_name,
        chain,
        cosine,
        ema,
        from_loader,
        init_state,
        module_loss,
        per_step,
        restore_or,
        save,
        train_and_validate,
        train_step,
        warm_up,
    )
    from dwiml_func.optim import clip_by_global_norm

    model = make_model()
    loss_fn = module_loss(model, lambda m, b: ((m(b[0]) - b[1]).square().mean(), len(b[0])))
    groups = by_name(adamw, {"*.bias": {"weight_decay": 0.0}}, weight_decay=0.1)
    optimizer = chain(accumulate(2), clip_by_global_norm(1.0), ema(groups, 0.9))

    def on_batch(state: Any, metrics: Any) -> None:
        save(folder, state)
        if state.step == kill_at:
            raise Killed

    state, _ = restore_or(folder, init_state(model, optimizer, seed=0))
    for state, _ in train_and_validate(  # noqa: B020, B007
        state,
        train=from_loader(lambda: DataLoader(TensorDataset(X, Y), batch_size=10, shuffle=True)),
        step=partial(train_step, loss_fn=loss_fn, optimizer=optimizer),
        learning_rate=per_step(warm_up(cosine(0.01, length=20), length=5)),
        max_epochs=NUM_EPOCHS,
        on_batch=on_batch,
    ):
        pass
    assert optimizer.eval_params is not None
    return [*state.params.values(), *optimizer.eval_params(state.opt_state, state.params).values()]


def in_lightning(folder: Path, kill_at: int | None) -> list[torch.Tensor]:
    import lightning as L
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.num_batches = make_model(), 0

        def training_step(self, batch: Any, index: int) -> Any:
            return (self.model(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            named = list(self.model.named_parameters())
            decayed = [p for n, p in named if not n.endswith("bias")]
            rest = [p for n, p in named if n.endswith("bias")]
            groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, lr=0.01)
            parts = [LinearLR(optimizer, 0.2, total_iters=2), CosineAnnealingLR(optimizer, 8)]
            schedule = SequentialLR(optimizer, parts, [2])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Kill(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch * NUM_BATCHES + trainer.fit_loop.batch_idx + 1 == kill_at:
                raise Killed

    L.seed_everything(0, verbose=False)
    module, average = Module(), EMAWeightAveraging(decay=0.9)
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, save_last=True)
    trainer = L.Trainer(
        max_epochs=NUM_EPOCHS, accumulate_grad_batches=2, gradient_clip_val=1.0, accelerator="cpu", logger=False,
        callbacks=[average, checkpoints, Kill()], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(X, Y), batch_size=10, shuffle=True)
    trainer.fit(module, loader, ckpt_path="last" if (folder / "last.ckpt").exists() else None)
    return [parameter.detach() for parameter in module.model.parameters()]


def in_optax(folder: Path, kill_at: int | None) -> list[torch.Tensor]:
    import jax
    import jax.numpy as jnp
    import optax

    params = {n: jnp.asarray(p.detach().numpy()) for n, p in make_model().named_parameters()}
    is_decayed = {n: not n.endswith("bias") for n in params}
    schedule = optax.warmup_cosine_decay_schedule(0.002, 0.01, 2, 10)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1, mask=is_decayed))
    optimizer = optax.MultiSteps(inner, 2)

    def loss(params: Any, x: Any, y: Any, key: Any) -> Any:
        hidden = jnp.tanh(x @ params["0.weight"].T + params["0.bias"])
        hidden = hidden * jax.random.bernoulli(key, 0.8, hidden.shape) / 0.8
        return ((hidden @ params["3.weight"].T + params["3.bias"] - y) ** 2).mean()

    @jax.jit
    def step(params: Any, opt_state: Any, average: Any, x: Any, y: Any, key: Any) -> Any:
        grads = jax.grad(loss)(params, x, y, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params, moved = optax.apply_updates(params, updates), optimizer.has_updated(opt_state)
        mixed = optax.incremental_update(params, average, 0.1)
        return params, opt_state, jax.tree.map(lambda new, old: jnp.where(moved, new, old), mixed, average)

    state, done, path = (params, optimizer.init(params), params), 0, folder / "state.pickle"
    if path.exists():
        state, done = pickle.loads(path.read_bytes())
    key, x, y = jax.random.key(0), X.numpy(), Y.numpy()
    while done < NUM_EPOCHS * NUM_BATCHES:
        epoch, batch = divmod(done, NUM_BATCHES)
        order = np.random.default_rng([0, epoch]).permutation(len(x))[10 * batch : 10 * (batch + 1)]
        state = step(*state, x[order], y[order], jax.random.fold_in(key, done))
        done += 1
        (folder / "new.pickle").write_bytes(pickle.dumps((jax.device_get(state), done)))
        (folder / "new.pickle").replace(path)
        if done == kill_at:
            raise Killed
    return [torch.from_numpy(np.array(leaf)) for tree in (state[0], state[2]) for leaf in tree.values()]


def num_lines(function: Callable[..., Any]) -> int:
    """Lines of code, blank ones, comments and imports apart."""
    source = textwrap.dedent(inspect.getsource(function))
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    left_out = {line for node in imports for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in left_out for n, line in lines)


def same_ends(run: Callable[[Path, int | None], list[torch.Tensor]]) -> int:
    """How many kills, one after each batch, end in the uninterrupted run's bits."""
    with tempfile.TemporaryDirectory() as folder:
        whole = run(Path(folder), None)
    same = 0
    for kill_at in range(1, NUM_BATCHES * NUM_EPOCHS + 1):
        with tempfile.TemporaryDirectory() as folder:
            with suppress(Killed):
                run(Path(folder), kill_at)
            end = run(Path(folder), None)
        same += all(torch.equal(one, other) for one, other in zip(whole, end, strict=True))
    return same


def main() -> int:
    """Print the table, and whether the requirement holds. Exit code 1 when it does not."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # Lightning tells of every run
    total, found = NUM_BATCHES * NUM_EPOCHS, {}
    for name, run in {"ours": ours, "Lightning": in_lightning, "optax": in_optax}.items():
        try:
            found[name] = same_ends(run)
        except ModuleNotFoundError as error:
            print(f"skip: {name}: {error}")
            continue
        print(f"{name:10} {num_lines(run):3} lines, {found[name]:2} of {total} kills end in the uninterrupted state")
    text = f"{found['ours']} of {total} kills end in the uninterrupted state, at least {total} required"
    return conclude([(found["ours"] == total, text)])


if __name__ == "__main__":
    sys.exit(main())
