"""One training step and one validation step: `(state, batch) -> (state, metrics)`, everything static keyword-only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from dwiml_func._transforms import is_transformed
from dwiml_func.core.gradients import AutodiffBackend, ValueAndGrad, clip_by_global_norm, global_norm, value_and_grad
from dwiml_func.core.loss import LossFn, LossOut
from dwiml_func.core.loss_check import check_loss_fn
from dwiml_func.core.metrics import weighted_sum
from dwiml_func.core.rng import Stream, fold_in
from dwiml_func.core.state import TrainState, advance, check_not_donated
from dwiml_func.types import Metrics, Optimizer, Sum

__all__ = ["NON_FINITE", "NonFiniteError", "eval_step", "train_step"]

NON_FINITE = "non_finite"
"""Name of the sum that a deferred check leaves: its total is the first step that was not finite, its weight 1."""


class NonFiniteError(ArithmeticError):
    """A loss or a gradient was NaN or infinite. The step was not taken; the state before it is unchanged.

    Example:
        >>> raise NonFiniteError("loss is nan")
        Traceback (most recent call last):
        ...
        dwiml_func.core.step.NonFiniteError: loss is nan
    """


def train_step(
    state: TrainState,
    batch: Any,
    *,
    loss_fn: LossFn,
    optimizer: Optimizer,
    lr: float | Tensor,
    clip_grad: float | None = None,
    donate: bool = False,
    backend: AutodiffBackend | None = None,
    gradient_fn: ValueAndGrad = value_and_grad,
    non_finite: Literal["raise", "defer"] | None = None,
) -> tuple[TrainState, Metrics]:
    """Take one optimizer step.

    Args:
        state: the run before the step. It is not changed, unless it is donated.
        batch: what the loss takes. If it has an attribute `ids`, a NonFiniteError names them.
        loss_fn: the loss, see `dwiml_func.core.loss`.
        optimizer: an init/update pair, see `dwiml_func.optim`.
        lr: learning rate, a number or a () tensor.
        clip_grad: largest global gradient norm; None does not clip.
        donate: reuse the memory of `state`, which must not be used afterwards (doing so raises an error).
        backend: `"autograd"` or `"func"`, see `dwiml_func.core.gradients`; None chooses.
        gradient_fn: evaluates loss and gradients, e.g. `sharded_value_and_grad(...)` for batches cut into shards.
        non_finite: `"raise"` checks the loss and the gradient norm at once, which waits for the device; `"defer"` keeps
            the old parameters, buffers and optimizer state, and `epoch_fn` raises at the end of the epoch. None raises
            on the CPU, and defers elsewhere and under transforms of torch.func.

    Returns:
        The run after the step, and the batch's sums: `loss` and the auxiliary metrics, weighted by points, and
        `unclipped_grad_norm` and `grad_norm` (before and after clipping), weighted by batches. The returned state has
        them added to those of the epoch.

    Raises:
        NonFiniteError: the loss or the gradient norm is NaN or infinite.
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
    key = fold_in(state.key, Stream.TRAIN_STEP, state.epoch, state.batch)
    out, grads = gradient_fn(loss_fn, state.params, state.buffers, batch, key=key, backend=backend)
    grads, norm, metrics = clip_and_measure(out, grads, clip_grad)

    defer = non_finite == "defer"
    if non_finite is None:
        defer = out.loss.device.type != "cpu" or is_transformed()
    if not defer:
        raise_if_not_finite(state, batch, out.loss.item(), norm.item())
    params, opt_state = optimizer.update(
        grads, state.opt_state, state.params, lr=lr, step=state.step, donate=donate and not defer
    )
    buffers = out.buffers
    if defer:
        keep_old, metrics = _defer_check(state, out.loss, norm, metrics)
        old, new = (state.params, state.buffers, state.opt_state), (params, buffers, opt_state)
        params, buffers, opt_state = (choose(keep_old, *pair) for pair in zip(old, new, strict=True))
    return advance(state, params, buffers, opt_state, metrics, donate=donate), metrics


def eval_step(state: TrainState, batch: Any, *, loss_fn: LossFn) -> Metrics:
    """Evaluate one batch without gradients, in evaluation mode.

    Args:
        state: the run; it is not changed. A model that is stochastic in evaluation gets the random numbers of
            `state.epoch` and `state.batch`.
        batch: what the loss takes.
        loss_fn: the loss.

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
    key = fold_in(state.key, Stream.VALID_STEP, state.epoch, state.batch)
    check_loss_fn(loss_fn, state.params, state.buffers, batch, key=key, train=False)
    with torch.no_grad():
        return loss_metrics(loss_fn(state.params, state.buffers, batch, key=key, train=False))


def clip_and_measure(
    out: LossOut, grads: dict[str, Tensor], clip_grad: float | None
) -> tuple[dict[str, Tensor], Tensor, dict[str, Sum]]:
    """Clip gradients to a global norm; return them, their norm before clipping, and the batch's sums."""
    if clip_grad is None:
        norm = clipped_norm = global_norm(grads)
    else:
        grads, norm, clipped_norm = clip_by_global_norm(grads, clip_grad)
    metrics = loss_metrics(out)
    metrics["unclipped_grad_norm"] = weighted_sum(norm, 1)
    metrics["grad_norm"] = weighted_sum(clipped_norm, 1)
    return grads, norm, metrics


def loss_metrics(out: LossOut) -> dict[str, Sum]:
    """The sums of a loss and of its auxiliary metrics."""
    if taken := out.aux.keys() & {"loss", "grad_norm", "unclipped_grad_norm", NON_FINITE}:
        raise ValueError(f"`aux` uses the reserved metric name {', '.join(map(repr, sorted(taken)))}.")
    means = {"loss": out.loss, **out.aux}
    return {name: weighted_sum(*(m if isinstance(m, tuple) else (m, out.weight))) for name, m in means.items()}


def raise_if_not_finite(state: TrainState, batch: Any, loss: float, norm: float) -> None:
    """Raise a NonFiniteError if the loss or the gradient norm of the next step of `state` is not finite."""
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"The {name} is {value} in {location(state.epoch, state.batch, state.step)}{_ids(batch)}. "
                "The step was not taken. Check these inputs, lower the learning rate or clip the gradient."
            )


def location(epoch: int, batch: int, step: int) -> str:
    """Where a run stands, as messages name it, counted from 1; the arguments are numbers done before it."""
    return f"epoch {epoch + 1}, batch {batch + 1} (step {step + 1})"


def choose(condition: Tensor, first: Any, second: Any) -> Any:
    """Of two trees of tensors, the leaves of `first` where the condition holds, else those of `second`.

    The condition is a () tensor, or (K,) for leaves (K, ...).
    """
    if isinstance(second, Mapping):
        return {name: choose(condition, first[name], leaf) for name, leaf in second.items()}
    if condition.dim() > 0:
        condition = condition.reshape(-1, *(1,) * (second.dim() - 1))
    return torch.where(condition, first, second)


def _ids(batch: Any) -> str:
    ids = getattr(batch, "ids", None)
    if ids is None:
        return ""
    numbers = [int(i) for i in ids]
    more = f", ... ({len(numbers)} in all)" if len(numbers) > 8 else ""
    return f", ids {', '.join(map(str, numbers[:8]))}{more}"


def _defer_check(
    state: TrainState, loss: Tensor, norm: Tensor, metrics: dict[str, Sum]
) -> tuple[Tensor, dict[str, Sum]]:
    """Whether to keep the old values, decided on the device, and the sums with the first step that was not finite."""
    bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
    earlier = state.sums.get(NON_FINITE, Sum(0.0, 0.0)).weight > 0
    first = (bad & ~torch.as_tensor(earlier, device=bad.device)).to(torch.float64)
    return bad | earlier, {**metrics, NON_FINITE: Sum(first * state.step, first)}
