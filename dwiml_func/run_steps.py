"""The steps of a run: compiled or not, on whole batches or on shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from dwiml_func.compiled.gradient import JitGradient
from dwiml_func.compiled.step import jit_step
from dwiml_func.compiled.warmup import WarmStep
from dwiml_func.core.loss import LossFn
from dwiml_func.core.metrics import Metrics
from dwiml_func.core.state import TrainState
from dwiml_func.core.step import eval_step, train_step
from dwiml_func.distributed.sharding import Peers, sharded_loss, sharded_value_and_grad
from dwiml_func.optim.optimizers import Optimizer

__all__ = ["make_eval_step", "make_step"]


def make_step(
    *,
    loss_fn: LossFn,
    optimizer: Optimizer,
    clip_grad: float | None,
    num_shards: int,
    peers: Peers,
    compile_for: Callable[[], Any] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The training step, which takes over the memory of the states that it is given.

    Of a sharded step the gradient of a shard is compiled, and the sums and the optimizer are as without compilation. In
    each process it is compiled for the same shard, so that all have the same code and any number gives the same bits.

    Args:
        loss_fn, optimizer, clip_grad: as for `train_step`.
        num_shards: parts of a batch; above 1 the step takes batches that are cut.
        peers: the processes that share the shards.
        compile_for: gives a batch, or a shard of one, to compile for; None does not compile.

    Returns:
        `step(state, batch, lr=lr)`.

    Example:
        >>> state, metrics = make_step(**parts)(state, batch, lr=0.001)  # doctest: +SKIP
    """
    parts: dict[str, Any] = {"loss_fn": loss_fn, "optimizer": optimizer, "clip_grad": clip_grad, "donate": True}
    if num_shards == 1:
        if compile_for is None:
            return partial(train_step, **parts)
        step = jit_step(**parts, dynamic=True)
        return WarmStep(step, eager=step.eager, graph=step.graph, first_batch=compile_for)
    eager = partial(train_step, **parts, gradient_fn=sharded_value_and_grad(peers))
    if compile_for is None:
        return eager
    gradient = JitGradient(loss_fn, dynamic=True)
    compiled = partial(train_step, **parts, gradient_fn=sharded_value_and_grad(peers, gradient))
    return WarmStep(compiled, eager=eager, graph=gradient.graph, first_batch=lambda: (compile_for(),) * num_shards)


def make_eval_step(loss_fn: LossFn, *, num_shards: int, peers: Peers) -> Callable[[TrainState, Any], Metrics]:
    """The validation step.

    Args:
        loss_fn, num_shards, peers: as for `make_step`.

    Returns:
        `eval_step(state, batch)`.

    Example:
        >>> evaluate = make_eval_step(loss_fn, num_shards=1, peers=ALONE)  # doctest: +SKIP
    """
    return partial(eval_step, loss_fn=loss_fn if num_shards == 1 else sharded_loss(loss_fn, peers))
