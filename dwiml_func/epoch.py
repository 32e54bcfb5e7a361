"""An epoch is a fold of a step over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dwiml_func.metrics import Metrics, Sum, add_metrics
from dwiml_func.state import TrainState
from dwiml_func.step import NON_FINITE, NonFiniteError

__all__ = ["EvalStep", "TrainStep", "epoch_fn", "eval_epoch_fn"]

TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
"""`step(state, batch) -> (state, metrics)`: `train_step` with everything static bound."""

EvalStep = Callable[[TrainState, Any], Metrics]
"""`step(state, batch) -> metrics`: `eval_step` with the loss bound."""


def epoch_fn(
    state: TrainState,
    batches: Iterable[Any],
    *,
    step: TrainStep,
    on_batch: Callable[[TrainState, Metrics], None] | None = None,
) -> tuple[TrainState, Metrics]:
    """Train on the batches that are left of an epoch, and close the epoch.

    Args:
        state: the run. When `state.batch` is above 0 the epoch is under way, and `batches` must start at that batch.
        batches: training batches, in order.
        step: `step(state, batch) -> (state, metrics)`, e.g. `partial(train_step, loss_fn=..., optimizer=..., lr=...)`.
        on_batch: called with the state and the batch's sums after each step, for snapshots and progress bars.

    Returns:
        The run with `epoch` one higher, `batch` 0 and no sums, and the sums of the whole epoch, batches before a resume
        included.

    Raises:
        ValueError: the epoch has no batch at all.
        NonFiniteError: a loss or gradient was not finite.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from dwiml_func import init_state, module_loss, optim, train_step
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
        >>> step = partial(train_step, loss_fn=loss_fn, optimizer=optim.sgd(), lr=0.1)
        >>> state, sums = epoch_fn(init_state(model, optim.sgd(), seed=0), [torch.ones(4, 2)] * 3, step=step)
        >>> state.epoch, state.step, sums["loss"].weight
        (1, 3, 12.0)
    """
    for batch in batches:
        state, metrics = step(state, batch)
        if on_batch is not None:
            on_batch(state, metrics)
    if state.batch == 0:
        raise ValueError(f"Epoch {state.epoch + 1} has no batch. Expected at least one: is the data set empty?")
    sums = dict(state.sums)
    first_bad = sums.pop(NON_FINITE, None)
    if first_bad is not None and float(first_bad.weight) > 0:
        _raise_deferred(state, first_bad)
    return state.replace(epoch=state.epoch + 1, batch=0, sums={}), sums


def eval_epoch_fn(state: TrainState, batches: Iterable[Any], *, step: EvalStep) -> Metrics:
    """Evaluate all batches.

    Args:
        state: the run; it is not changed.
        batches: validation batches, in order.
        step: `step(state, batch) -> metrics`, e.g. `partial(eval_step, loss_fn=...)`.

    Returns:
        The sums over all batches; empty without batches.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from dwiml_func import eval_step, init_state, module_loss, optim
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
        >>> state = init_state(model, optim.sgd(), seed=0)
        >>> eval_epoch_fn(state, [torch.ones(4, 2)] * 3, step=partial(eval_step, loss_fn=loss_fn))["loss"].weight
        12.0
    """
    sums: dict[str, Sum] = {}
    for index, batch in enumerate(batches):
        sums = add_metrics(sums, step(state.replace(batch=index), batch))
    return sums


def _raise_deferred(state: TrainState, first_bad: Sum) -> None:
    bad_step = int(first_bad.total)
    batch = bad_step - (state.step - state.batch)
    raise NonFiniteError(
        f"The loss or the gradient was not finite in epoch {state.epoch + 1}, batch {batch} (step {bad_step}). "
        f"No later step was taken. Train that epoch again with non_finite='raise' to see the batch's ids."
    )
