"""An epoch: a fold of a step over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from dwiml_func._checks import truncated_repr
from dwiml_func.core.metrics import add_metrics
from dwiml_func.core.non_finite import NON_FINITE, SKIPPED, check_finite, check_not_skipped_too_often
from dwiml_func.core.state import TrainState
from dwiml_func.types import Metrics, Sum

__all__ = [
    "EvalStep",
    "OnBatch",
    "TrainStep",
    "check_has_batch",
    "checked_result",
    "end_epoch",
    "epoch_fn",
    "epoch_sums",
    "eval_epoch_fn",
    "train_steps",
]

TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
"""`step(state, batch) -> (state, metrics)`: `train_step` with everything static bound."""

EvalStep = Callable[[TrainState, Any], Metrics]
"""`step(state, batch) -> metrics`: `eval_step` with the loss bound."""

OnBatch = Callable[[TrainState, Metrics], object]
"""Called with the state and the batch's sums after each batch."""


def train_steps(state: TrainState, batches: Iterable[Any], *, step: TrainStep) -> Iterator[tuple[TrainState, Metrics]]:
    """Train on batches, one step at a time, within the current epoch.

    Args:
        state: the state to start from.
        batches: training batches, in order.
        step: `step(state, batch) -> (state, metrics)`.

    Yields:
        The state after each step, and the batch's sums. `end_epoch` closes the epoch.

    Raises:
        TypeError: the step did not return a pair of a state and its sums, or not the state one batch further.
        NonFiniteError: a loss or gradient was not finite.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from dwiml_func import init_state, module_loss, sgd, train_step
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
        >>> step = partial(train_step, loss_fn=loss_fn, optimizer=sgd(), lr=0.1)
        >>> for state, metrics in train_steps(init_state(model, sgd(), seed=0), [torch.ones(4, 2)] * 2, step=step):
        ...     print(state.batch, metrics["loss"].weight)
        1 4.0
        2 4.0
    """
    for batch in batches:
        state, metrics = checked_result(state, step(state, batch))
        yield state, metrics


def end_epoch(state: TrainState) -> tuple[TrainState, Metrics]:
    """Close the current epoch.

    Args:
        state: the state after the epoch's last batch.

    Returns:
        The state with `epoch` one higher, `batch` 0 and no sums, and the sums of the epoch.

    Raises:
        ValueError: the epoch has no batch at all.
        NonFiniteError: a step left word of a loss or gradient that was not finite.

    Example:
        >>> import torch
        >>> from dwiml_func import init_state, sgd
        >>> state = init_state(torch.nn.Linear(2, 1), sgd(), seed=0).replace(batch=3, sums={"loss": Sum(1.0, 2.0)})
        >>> end_epoch(state)[0].epoch, end_epoch(state)[1]
        (1, {'loss': Sum(total=1.0, weight=2.0)})
    """
    check_has_batch(state)
    check_not_skipped_too_often(state)
    sums = epoch_sums(state)
    return state.replace(epoch=state.epoch + 1, batch=0, sums={}, validations=()), sums


def epoch_fn(
    state: TrainState, batches: Iterable[Any], *, step: TrainStep, on_batch: OnBatch | None = None
) -> tuple[TrainState, Metrics]:
    """Train on the remaining batches of an epoch, and close the epoch.

    Args:
        state: the state to start from. When `state.batch` is above 0, `batches` must start at that batch.
        batches: training batches, in order.
        step: `step(state, batch) -> (state, metrics)`, e.g. `partial(train_step, loss_fn=..., optimizer=..., lr=...)`,
            or `partial(jit_step(...), lr=...)`, which takes runs of equal shapes in one loop where `on_batch` is None.
        on_batch: called with the state and the batch's sums after each step, for checkpoints and progress bars.

    Returns:
        The state with `epoch` one higher, `batch` 0 and no sums, and the sums of the whole epoch, including batches
        before a resume.

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
    if on_batch is None and (fold := _fold_of(step)) is not None:
        return end_epoch(fold(state, batches))
    for batch in batches:
        state, metrics = checked_result(state, step(state, batch))
        if on_batch is not None:
            on_batch(state, metrics)
    return end_epoch(state)


def eval_epoch_fn(
    state: TrainState, batches: Iterable[Any], *, step: EvalStep, on_batch: OnBatch | None = None
) -> Metrics:
    """Evaluate all batches.

    Args:
        state: the state; it is not changed.
        batches: validation batches, in order.
        step: `step(state, batch) -> metrics`, e.g. `partial(eval_step, loss_fn=...)`.
        on_batch: called with the state and the batch's sums after each batch.

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
        metrics = step(state.replace(batch=index), batch)
        if not isinstance(metrics, Mapping) or not all(isinstance(each, Sum) for each in metrics.values()):
            raise TypeError(
                f"Expected an eval_step that returns a dict of sums, such as {{'loss': Sum(total, weight)}}. "
                f"Received: {truncated_repr(metrics)}"
            )
        sums = add_metrics(sums, metrics)
        if on_batch is not None:
            on_batch(state, metrics)
    return sums


def check_has_batch(state: Any) -> None:
    """Raise ValueError when an epoch had no training batch; `state` is a `TrainState` or an `EnsembleState`."""
    if state.batch == 0:
        raise ValueError(f"Epoch {state.epoch + 1} has no batch. Expected at least one. Is the dataset empty?")


def _fold_of(step: TrainStep) -> Callable[[TrainState, Iterable[Any]], TrainState] | None:
    """`fold(state, batches) -> state` of a step that has one, with the arguments that are bound to the step."""
    if not isinstance(step, partial):
        return getattr(step, "fold", None)
    fold = getattr(step.func, "fold", None)
    return None if fold is None or step.args else partial(fold, **step.keywords)


def checked_result(old: TrainState, result: Any) -> tuple[TrainState, Metrics]:
    """What a step returned, if it keeps to the contract."""
    is_pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], TrainState)
    if not is_pair or not isinstance(result[1], Mapping):
        raise TypeError(
            f"Expected a step that returns (state, metrics), a TrainState and a dict of sums. "
            f"Received: {type(result).__name__}"
        )
    new = result[0]
    if (new.epoch, new.batch) != (old.epoch, old.batch + 1):
        raise TypeError(
            f"Expected a step that returns the state after batch {old.batch + 1} of epoch {old.epoch + 1}. "
            f"Received: the state after batch {new.batch} of epoch {new.epoch + 1}. Return what train_step returned, "
            "or count the batch."
        )
    if isinstance(is_bad := result[1].get(SKIPPED, Sum(0.0, 0.0)).total, float) and is_bad:
        check_not_skipped_too_often(new)  # elsewhere than on the CPU, at the end of the epoch
    return result


def epoch_sums(state: TrainState) -> Metrics:
    """The sums of the current epoch, for a report; NonFiniteError as `check_finite`."""
    check_finite(state)
    return {name: metric for name, metric in state.sums.items() if name != NON_FINITE}
