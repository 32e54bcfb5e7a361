"""The NaN policy: a step whose loss or gradient is NaN or infinite raises, at once or later, or is skipped.

"raise": `raise_if_not_finite` reads the numbers before the update. "defer": `defer_check` keeps the old values on the
device, and `check_finite` raises when the epoch ends or is saved. "skip": the optimizer has `skip_not_finite`; `spoil`
and `skip_metrics` leave the batch to it, and `check_not_skipped_too_often` raises after too many in a row. They are
applied in `core/step.py`, for ensembles in `ensemble/step.py`, for compiled steps in `compiled/step_graph.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dwiml_func._transforms import is_transformed, read_number
from dwiml_func.core.state import TrainState
from dwiml_func.optim.gates import skipped_too_often
from dwiml_func.types import Grads, OptState, Sum

__all__ = [
    "NON_FINITE",
    "SKIPPED",
    "NonFinite",
    "NonFiniteError",
    "can_skip",
    "check_finite",
    "check_not_skipped_too_often",
    "check_policy",
    "choose_policy",
    "defer_check",
    "is_bad_step",
    "location",
    "raise_if_not_finite",
    "skip_metrics",
    "spoil",
]

NON_FINITE = "non_finite"
"""Name of the sum that a deferred check leaves: its total is the first step that was not finite, its weight 1."""

SKIPPED = "skipped"
"""Name of the sum that counts the batches that `skip_not_finite` skipped; its weight counts all batches."""

NonFinite = Literal["raise", "defer", "skip"]
"""A policy, see `train_step`."""


class NonFiniteError(ArithmeticError):
    """A loss or a gradient was NaN or infinite. The step was not taken; the state before it is unchanged.

    Args:
        message: the text.
        at: epoch and batch, counted from 1, where one batch is the cause.

    Example:
        >>> raise NonFiniteError("loss is nan")
        Traceback (most recent call last):
        ...
        dwiml_func.core.non_finite.NonFiniteError: loss is nan
    """

    def __init__(self, message: str, *, at: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.at = at


def choose_policy(non_finite: NonFinite | None, opt_state: OptState, loss: Tensor) -> NonFinite:
    """What to do with a step that is not finite."""
    check_policy(non_finite)
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


def check_policy(non_finite: NonFinite | None) -> None:
    """Raise ValueError for a policy that does not exist."""
    if non_finite is not None and non_finite not in get_args(NonFinite):
        raise ValueError(f"Expected non_finite 'raise', 'defer', 'skip' or None. Received: {non_finite!r}")


def is_bad_step(loss: Tensor, norm: Tensor) -> Tensor:
    """Whether a loss or a gradient norm is not finite, each () or (K,)."""
    return ~(torch.isfinite(loss) & torch.isfinite(norm))


def raise_if_not_finite(state: TrainState, batch: Any, loss: float, norm: float, *, weight: float | Tensor = 1) -> None:
    """Raise a NonFiniteError if the loss or the gradient norm of the next step of `state` is not finite."""
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"The {name} is {value} in {location(state.epoch, state.batch, state.step)}{_ids(batch)}. "
                + ("The step was not taken. " if read_number(weight) else "The batch has no points. ")
                + "Check these inputs, lower the learning rate or clip the gradient.",
                at=(state.epoch + 1, state.batch + 1),
            )


def defer_check(
    state: TrainState, loss: Tensor, norm: Tensor, metrics: dict[str, Sum]
) -> tuple[Tensor, dict[str, Sum]]:
    """Whether to keep the old values, decided on the device, and the sums with the first step that was not finite."""
    bad = is_bad_step(loss, norm)
    earlier = state.sums.get(NON_FINITE, Sum(0.0, 0.0)).weight > 0
    none_before = ~earlier if isinstance(earlier, Tensor) else not earlier  # no copy of a bool to the device: it waits
    first = (bad & none_before).to(torch.float64)
    return bad | earlier, {**metrics, NON_FINITE: Sum(first * state.step, first)}


def check_finite(state: TrainState) -> None:
    """Raise NonFiniteError if a deferred check found a step of the current epoch that was not finite."""
    first_bad = state.sums.get(NON_FINITE, Sum(0.0, 0.0))
    if float(first_bad.weight) > 0:
        bad_step = int(first_bad.total)
        batch = bad_step - (state.step - state.batch)
        where = location(state.epoch, batch, bad_step)
        raise NonFiniteError(
            f"The loss or the gradient was not finite in {where}. "
            f"No later step was taken. Train that epoch again with non_finite='raise' to see the batch's ids.",
            at=(state.epoch + 1, batch + 1),
        )


def can_skip(opt_state: OptState) -> bool:
    """Whether the state is that of an optimizer with `skip_not_finite`."""
    if "max_in_a_row" in opt_state:
        return True
    return any(can_skip(part) for part in opt_state.values() if not isinstance(part, Tensor))


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
    kept = {name: Sum(*(torch.where(is_bad, 0.0, part) for part in own)) for name, own in metrics.items()}
    return {**kept, SKIPPED: Sum(is_bad.to(torch.float64), torch.ones_like(is_bad, dtype=torch.float64))}


def check_not_skipped_too_often(state: TrainState) -> None:
    """Raise a NonFiniteError if `skip_not_finite` has skipped more steps in a row than it accepts."""
    if SKIPPED in state.sums and bool(skipped_too_often(state.opt_state)):
        raise NonFiniteError(
            f"The loss or the gradient was not finite in too many steps in a row, up to "
            f"{location(state.epoch, state.batch - 1, state.step - 1)}. Check the inputs, lower the learning rate or "
            "clip the gradient."
        )


def location(epoch: int, batch: int, step: int) -> str:
    """Where a run stands, as messages name it, counted from 1; the arguments are numbers done before it."""
    return f"epoch {epoch + 1}, batch {batch + 1} (step {step + 1})"


def _ids(batch: Any) -> str:
    ids = getattr(batch, "ids", None)
    if ids is None:
        return ""
    numbers = [int(i) for i in ids]
    more = f", ... ({len(numbers)} in all)" if len(numbers) > 8 else ""
    return f", ids {', '.join(map(str, numbers[:8]))}{more}"
