"""One training step and one validation step: `(state, batch) -> (state, metrics)`, everything static keyword-only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dwiml_func._transforms import is_transformed, read_number
from dwiml_func._trees import choose
from dwiml_func.core.gradients import AutodiffBackend, ValueAndGrad, is_differentiated, value_and_grad
from dwiml_func.core.loss import LossFn, LossOut
from dwiml_func.core.loss_check import check_loss_fn
from dwiml_func.core.metrics import weighted_sum
from dwiml_func.core.non_finite import (
    NON_FINITE,
    SKIPPED,
    NonFinite,
    choose_policy,
    defer_check,
    is_bad_step,
    raise_if_not_finite,
    skip_metrics,
    spoil,
)
from dwiml_func.core.rng import Stream, fold_in
from dwiml_func.core.state import TrainState, advance, check_can_donate, check_not_donated
from dwiml_func.core.weights import with_eval_params
from dwiml_func.optim.chain import resolve_optimizer, update_where, update_with
from dwiml_func.optim.schedules import as_rate
from dwiml_func.optim.state_check import check_opt_state
from dwiml_func.optim.transformations import clip_grad_norm, global_norm
from dwiml_func.types import Grads, Metrics, Optimizer, Sum

__all__ = ["clip_and_measure", "eval_step", "loss_metrics", "train_step"]

_RESERVED = {"loss", "grad_norm", "unclipped_grad_norm", NON_FINITE, SKIPPED, "step", "learning_rate", "weight_decay"}
"""Names of metrics that a step, its wrappers, or the logs of steps give."""


def train_step(
    state: TrainState,
    batch: Any,
    *,
    loss_fn: LossFn,
    optimizer: Optimizer | Callable[..., Optimizer],
    lr: float | Tensor,
    weight_decay: float | Tensor | None = None,
    clip_grad: float | None = None,
    donate: bool = False,
    backend: AutodiffBackend | None = None,
    gradient_fn: ValueAndGrad = value_and_grad,
    non_finite: NonFinite | None = None,
) -> tuple[TrainState, Metrics]:
    """Take one optimizer step.

    Args:
        state: the run before the step. It is not changed, unless it is donated.
        batch: what the loss takes. If it has an attribute `ids`, a NonFiniteError names them.
        loss_fn: the loss, see `dwiml_func.core.loss`.
        optimizer: an init/update pair, see `dwiml_func.optim`; with `weight_decay` a factory of one, such as `adamw`.
        lr: learning rate, a number or a () tensor.
        weight_decay: that of this step, given to the factory; `with_weight_decay` makes it follow a schedule.
        clip_grad: largest global gradient norm; None does not clip.
        donate: reuse the memory of `state`, which must not be used afterwards (doing so raises an error).
        backend: `"autograd"` or `"func"`, see `dwiml_func.core.gradients`; None chooses.
        gradient_fn: evaluates loss and gradients, e.g. `sharded_value_and_grad(...)` for batches cut into shards.
        non_finite: `"raise"` checks the loss and the gradient norm at once, which waits for the device; `"defer"` keeps
            the old parameters, buffers and optimizer state, and `epoch_fn` raises at the end of the epoch. `"skip"`
            leaves them to an optimizer with `skip_not_finite`: the batch counts in no sum but `skipped`, and an epoch
            raises once too many in a row were skipped. None skips where the optimizer can, else raises on the CPU, and
            defers elsewhere and under transforms of torch.func.

    Returns:
        The run after the step, and the batch's sums: `loss` and the auxiliary metrics, weighted by points, and
        `unclipped_grad_norm` and `grad_norm` (before and after clipping), weighted by batches. The returned state has
        them added to those of the epoch. Parameters that the batch does not use, and their optimizer state, stay as
        they are, as with `torch.optim`; see `value_and_grad`.

    Raises:
        NonFiniteError: the loss or the gradient norm is NaN or infinite, and must not be.
        ValueError: `"skip"` with an optimizer without `skip_not_finite`.
        RuntimeError: the state was donated to an earlier step.

    Example:
        >>> from dwiml_func.core.loss import module_loss
        >>> from dwiml_func.optim import sgd
        >>> from dwiml_func.core.state import init_state
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: ((model(x) - 1.0).square().mean(), len(x)))
        >>> state = init_state(model, sgd(), seed=0)
        >>> state, metrics = train_step(state, torch.ones(4, 2), loss_fn=loss_fn, optimizer=sgd(), lr=0.1)
        >>> state.step, sorted(metrics)
        (1, ['grad_norm', 'loss', 'unclipped_grad_norm'])
    """
    check_not_donated(state)
    lr, weight_decay = as_rate(lr), None if weight_decay is None else as_rate(weight_decay)
    own = resolve_optimizer(optimizer, weight_decay)
    check_opt_state(optimizer, state.opt_state, state.params)
    if donate and not state.batch:  # once an epoch
        check_can_donate(state)
    key = fold_in(state.key, Stream.TRAIN_STEP, state.epoch, state.batch)
    out, grads = gradient_fn(loss_fn, state.params, state.buffers, batch, key=key, backend=backend)
    grads, norm, metrics = clip_and_measure(out, grads, clip_grad)

    policy = choose_policy(non_finite, state.opt_state, out.loss)
    is_bad: Any = False
    if policy == "raise":
        raise_if_not_finite(state, batch, out.loss.item(), norm.item(), weight=out.weight)
    elif policy == "skip":
        is_bad = read_number(is_bad_step(out.loss, norm))
        grads, metrics = spoil(grads, is_bad), skip_metrics(is_bad, metrics)
    else:
        is_bad, metrics = defer_check(state, out.loss, norm, metrics)
    rates: dict[str, Any] = {"lr": lr, "step": state.step, "weight": out.weight}
    given = own, grads, state.opt_state, state.params
    if policy != "defer":
        params, opt_state = update_with(*given, **rates, donate=donate)
    elif donate and not is_transformed() and not is_differentiated(state.params, lr):
        params, opt_state = update_where(*given, **rates, keep_old=is_bad)
    else:
        params, opt_state = update_with(*given, **rates, donate=False)
        params, opt_state = choose(is_bad, state.params, params), choose(is_bad, state.opt_state, opt_state)
    buffers = choose(is_bad, state.buffers, out.buffers)
    return advance(state, params, buffers, opt_state, metrics, donate=donate), metrics


def eval_step(state: TrainState, batch: Any, *, loss_fn: LossFn, optimizer: Optimizer | None = None) -> Metrics:
    """Evaluate one batch without gradients, in evaluation mode.

    Args:
        state: the run; it is not changed. A model that is stochastic in evaluation gets the random numbers of
            `state.epoch` and `state.batch`.
        batch: what the loss takes.
        loss_fn: the loss.
        optimizer: the run's optimizer; evaluates the parameters that it evaluates with, such as an average. None
            evaluates `state.params`.

    Returns:
        The batch's sums: `loss` and the auxiliary metrics, weighted by points. They may be NaN or infinite.

    Example:
        >>> from dwiml_func.core.loss import module_loss
        >>> from dwiml_func.optim import sgd
        >>> from dwiml_func.core.state import init_state
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: ((model(x) * 0.0 + 2.0).mean(), len(x)))
        >>> eval_step(init_state(model, sgd(), seed=0), torch.ones(4, 2), loss_fn=loss_fn)
        {'loss': Sum(total=8.0, weight=4.0)}
    """
    check_not_donated(state)
    state = with_eval_params(state, optimizer)
    key = fold_in(state.key, Stream.VALID_STEP, state.epoch, state.batch)
    check_loss_fn(loss_fn, state.params, state.buffers, batch, key=key, train=False)
    with torch.no_grad():
        return loss_metrics(loss_fn(state.params, state.buffers, batch, key=key, train=False))


def clip_and_measure(
    out: LossOut, grads: Grads, clip_grad: float | None
) -> tuple[dict[str, Tensor | None], Tensor, dict[str, Sum]]:
    """Clip gradients to a global norm; return them, their norm before clipping, and the batch's sums."""
    metrics = loss_metrics(out)
    if clip_grad is None:
        norm = global_norm(grads)
        metrics["unclipped_grad_norm"] = metrics["grad_norm"] = weighted_sum(norm, 1)
    else:
        grads, norm, clipped_norm = clip_grad_norm(grads, clip_grad)
        metrics["unclipped_grad_norm"], metrics["grad_norm"] = weighted_sum(norm, 1), weighted_sum(clipped_norm, 1)
    return dict(grads), norm, metrics  # the update may replace them


def loss_metrics(out: LossOut) -> dict[str, Sum]:
    """The sums of a loss and of its auxiliary metrics."""
    if out.aux and (taken := out.aux.keys() & _RESERVED):
        raise ValueError(f"`aux` uses the reserved metric name {', '.join(map(repr, sorted(taken)))}.")
    means = {"loss": out.loss, **out.aux}
    return {name: weighted_sum(*(m if isinstance(m, tuple) else (m, out.weight))) for name, m in means.items()}
