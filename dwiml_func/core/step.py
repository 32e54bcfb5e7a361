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
from dwiml_func.core.weights import with_eval_params
from dwiml_func.optim._kernel import read_number
from dwiml_func.optim.chain import update_with
from dwiml_func.optim.gates import skipped_too_often
from dwiml_func.types import Grads, Metrics, Optimizer, OptState, Sum

__all__ = ["NON_FINITE", "NonFiniteError", "eval_step", "train_step"]

NON_FINITE = "non_finite"
"""Name of the sum that a deferred check leaves: its total is the first step that was not finite, its weight 1."""

SKIPPED = "skipped"
"""Name of the sum that counts the batches that `skip_not_finite` skipped; its weight counts all batches."""

NonFinite = Literal["raise", "defer", "skip"]


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
    non_finite: NonFinite | None = None,
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
    key = fold_in(state.key, Stream.TRAIN_STEP, state.epoch, state.batch)
    out, grads = gradient_fn(loss_fn, state.params, state.buffers, batch, key=key, backend=backend)
    grads, norm, metrics = clip_and_measure(out, grads, clip_grad)

    policy = choose_policy(non_finite, state.opt_state, out.loss)
    is_bad: Any = False
    if policy == "raise":
        raise_if_not_finite(state, batch, out.loss.item(), norm.item())
    elif policy == "skip":
        is_bad = read_number(~(torch.isfinite(out.loss) & torch.isfinite(norm)))
        grads, metrics = spoil(grads, is_bad), skip_metrics(is_bad, metrics)
    params, opt_state = update_with(
        *(optimizer, grads, state.opt_state, state.params),
        lr=lr,
        step=state.step,
        donate=donate and policy != "defer",
        weight=out.weight,
    )
    buffers = out.buffers
    if policy == "skip":
        buffers = choose(is_bad, state.buffers, buffers)
    elif policy == "defer":
        keep_old, metrics = _defer_check(state, out.loss, norm, metrics)
        old, new = (state.params, state.buffers, state.opt_state), (params, buffers, opt_state)
        params, buffers, opt_state = (choose(keep_old, *pair) for pair in zip(old, new, strict=True))
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


def clip_and_measure(out: LossOut, grads: Grads, clip_grad: float | None) -> tuple[Grads, Tensor, dict[str, Sum]]:
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
    if taken := out.aux.keys() & {"loss", "grad_norm", "unclipped_grad_norm", NON_FINITE, SKIPPED}:
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


def choose(condition: bool | Tensor, first: Any, second: Any) -> Any:
    """Of two trees of tensors, the leaves of `first` where the condition holds, else those of `second`.

    The condition is a bool, a () tensor, or (K,) for leaves (K, ...). A leaf that `first` lacks, such as a count that
    starts, is zero there.
    """
    if isinstance(condition, bool):
        return first if condition else second
    if isinstance(second, Mapping):
        return {name: choose(condition, first.get(name, {}), leaf) for name, leaf in second.items()}
    if condition.dim() > 0:
        condition = condition.reshape(-1, *(1,) * (second.dim() - 1))
    return torch.where(condition, first if isinstance(first, Tensor) else torch.zeros_like(second), second)


def choose_policy(non_finite: NonFinite | None, opt_state: OptState, loss: Tensor) -> NonFinite:
    """What to do with a step that is not finite."""
    skips = can_skip(opt_state)
    if non_finite == "skip" and not skips:
        raise ValueError(
            "Expected an optimizer with skip_not_finite for non_finite='skip'. Received: one without. "
            "Use chain(skip_not_finite(3), ...)."
        )
    if non_finite is not None:
        return non_finite
    if skips:
        return "skip"
    return "defer" if loss.device.type != "cpu" or is_transformed() else "raise"


def spoil(grads: Grads, is_bad: bool | Tensor) -> Grads:
    """Gradients that are NaN where the step is bad, also if only the loss was."""
    if is_bad is False:
        return grads
    return {
        name: grad if grad is None else torch.where(torch.as_tensor(is_bad, device=grad.device), torch.nan, grad)
        for name, grad in grads.items()
    }


def skip_metrics(is_bad: bool | Tensor, metrics: Mapping[str, Sum]) -> dict[str, Sum]:
    """The sums of a batch, zero if it is skipped, and the count of skipped batches."""
    if isinstance(is_bad, bool):
        kept = {name: Sum(0.0, 0.0) if is_bad else own for name, own in metrics.items()}
        return {**kept, SKIPPED: Sum(float(is_bad), 1.0)}
    kept = {
        name: Sum(*(torch.where(is_bad, 0.0, torch.as_tensor(part, device=is_bad.device)) for part in own))
        for name, own in metrics.items()
    }
    return {**kept, SKIPPED: Sum(is_bad.to(torch.float64), torch.ones_like(is_bad, dtype=torch.float64))}


def check_not_skipped_too_often(state: TrainState) -> None:
    """Raise a NonFiniteError if `skip_not_finite` has skipped more steps in a row than it accepts."""
    if SKIPPED in state.sums and bool(skipped_too_often(state.opt_state)):
        raise NonFiniteError(
            f"The loss or the gradient was not finite in too many steps in a row, up to "
            f"{location(state.epoch, state.batch - 1, state.step - 1)}. Check the inputs, lower the learning rate or "
            "clip the gradient."
        )


def can_skip(opt_state: OptState) -> bool:
    """Whether the state is that of an optimizer with `skip_not_finite`."""
    if "max_in_a_row" in opt_state and "in_a_row" in opt_state:
        return True
    return any(can_skip(part) for part in opt_state.values() if isinstance(part, Mapping))


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
