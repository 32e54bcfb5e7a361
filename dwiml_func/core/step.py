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
from dwiml_func.core.metrics import add_metrics, weighted_sum
from dwiml_func.core.rng import Stream, fold_in
from dwiml_func.core.state import TrainState, check_not_donated, mark_donated
from dwiml_func.types import Metrics, Optimizer, Sum

__all__ = ["NON_FINITE", "NonFiniteError", "eval_step", "train_step"]

NON_FINITE = "non_finite"
"""Name of the sum that a deferred check leaves: its total is the first step that was not finite, its weight 1."""


class NonFiniteError(ArithmeticError):
    """A loss or a gradient was NaN or infinite; the parameters before it are whole, and the step was not taken.

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
        state: the run before the step. Nothing in it is changed, unless it is donated.
        batch: what the loss takes. If it has an attribute `ids`, an error names them.
        loss_fn: the loss, see `dwiml_func.core.loss`.
        optimizer: an init/update pair, see `dwiml_func.optim`.
        lr: learning rate, a number or a () tensor.
        clip_grad: largest global gradient norm; None does not clip.
        donate: reuse the memory of `state`, which must not be used afterwards (doing so raises an error).
        backend: `"autograd"` or `"func"`, see `dwiml_func.core.gradients`; None takes what fits.
        gradient_fn: evaluates loss and gradients, e.g. `sharded_value_and_grad(process_group)` for batches cut into shards.
        non_finite: `"raise"` looks at the loss and the gradient norm at once, which waits for the device; `"defer"`
            leaves parameters, buffers and moments as they were, on the device, and `epoch_fn` raises at its end.
            None raises on the CPU, and defers elsewhere and under transforms of torch.func.

    Returns:
        The run after the step, and the batch's sums: `loss` and the loss's further means, weighted by points, and
        `unclipped_grad_norm` and `grad_norm` (before and after clipping), weighted by batches. The same sums are added
        to those of the epoch in the returned state.

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
        params = _choose(keep_old, state.params, params)
        buffers = _choose(keep_old, state.buffers, buffers)
        opt_state = {kind: _choose(keep_old, state.opt_state[kind], opt_state[kind]) for kind in opt_state}
    if donate:  # an optimizer that skips an update gives back the very dicts that `mark_donated` empties
        params, opt_state = dict(params), dict(opt_state)
    new_state = TrainState(
        params=params,
        buffers=buffers,
        opt_state=opt_state,
        key=state.key,
        step=state.step + 1,
        epoch=state.epoch,
        batch=state.batch + 1,
        sums=add_metrics(state.sums, metrics),
        best=state.best,
    )
    if donate:
        mark_donated(state)
    return new_state, metrics


def eval_step(state: TrainState, batch: Any, *, loss_fn: LossFn) -> Metrics:
    """Evaluate one batch without gradients, in evaluation mode.

    Args:
        state: the run; nothing in it is changed. Draws, if the model makes any when evaluated, are those of
            `state.epoch` and `state.batch`.
        batch: what the loss takes.
        loss_fn: the loss.

    Returns:
        The batch's sums: `loss` and the loss's further means, weighted by points. They may be NaN or infinite.

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
    """Clip gradients, and sum up what a step reports.

    Args:
        out: what the loss returned.
        grads: gradients by name.
        clip_grad: largest global norm; None does not clip.

    Returns:
        The gradients to use, their norm before clipping, and the batch's sums.

    Raises:
        ValueError: the loss has a further mean of a name that the step itself uses.
    """
    if clip_grad is None:
        norm = clipped_norm = global_norm(grads)
    else:
        grads, norm, clipped_norm = clip_by_global_norm(grads, clip_grad)
    metrics = loss_metrics(out)
    metrics["unclipped_grad_norm"] = weighted_sum(norm, 1)
    metrics["grad_norm"] = weighted_sum(clipped_norm, 1)
    return grads, norm, metrics


def loss_metrics(out: LossOut) -> dict[str, Sum]:
    """The sums of a loss's output: its own, and those of its further means."""
    if taken := out.aux.keys() & {"loss", "grad_norm", "unclipped_grad_norm", NON_FINITE}:
        raise ValueError(f"Further means of a loss cannot be called {', '.join(sorted(taken))}: the step's own are.")
    means = {"loss": out.loss, **out.aux}
    return {name: weighted_sum(*(m if isinstance(m, tuple) else (m, out.weight))) for name, m in means.items()}


def raise_if_not_finite(state: TrainState, batch: Any, loss: float, norm: float) -> None:
    """Refuse a step whose loss or gradient norm is not finite.

    Args:
        state: the run before the step.
        batch: the batch; if it has an attribute `ids`, the error names them.
        loss: the batch's loss.
        norm: the global norm of its gradient, before clipping.

    Raises:
        NonFiniteError: one of them is NaN or infinite.
    """
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"The {name} is {value} in epoch {state.epoch + 1}, batch {state.batch} (step {state.step})"
                f"{_ids(batch)}. The step was not taken. "
                "Look at these inputs, lower the learning rate or clip the gradient."
            )


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
    """Note the first step that is not finite in the sums, and say on the device whether to keep the old values."""
    bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
    earlier = state.sums.get(NON_FINITE, Sum(0.0, 0.0)).weight > 0
    first = (bad & ~torch.as_tensor(earlier, device=bad.device)).to(torch.float64)
    return bad | earlier, {**metrics, NON_FINITE: Sum(first * state.step, first)}


def _choose(keep_old: Tensor, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.where(keep_old, old[name], new[name]) for name in new}
