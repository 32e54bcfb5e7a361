"""A step that leaves batches out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import wraps
from typing import Any

from dwiml_func._checks import truncated_repr
from dwiml_func.core.rates import Step
from dwiml_func.core.state import TrainState
from dwiml_func.types import Metrics

__all__ = ["parse_batch", "skip_batches"]


def skip_batches(step: Step, batches: Iterable[tuple[int, int]]) -> Step:
    """Make a step that leaves batches out, such as one whose loss was not finite.

    A batch that is left out counts as a batch and a step, of the learning rate too, and changes nothing else: no
    parameter, no optimizer state, no metric.

    Args:
        step: `step(state, batch, lr=...)`: `train_step` with the other arguments bound, or any other.
        batches: epoch and batch of each, counted from 1.

    Returns:
        A step for `train_and_validate`.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from dwiml_func import init_state, module_loss, sgd, train_step
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
        >>> step = skip_batches(partial(train_step, loss_fn=loss_fn, optimizer=sgd()), [(1, 1)])
        >>> state, metrics = step(init_state(model, sgd(), seed=0), torch.full((4, 2), torch.nan), lr=0.1)
        >>> state.step, state.batch, metrics
        (1, 1, {})
    """
    left_out = frozenset(batches)

    @wraps(step, updated=())
    def skipping(state: TrainState, batch: Any, *, lr: Any) -> tuple[TrainState, Metrics]:
        if (state.epoch + 1, state.batch + 1) in left_out:
            return state.replace(step=state.step + 1, batch=state.batch + 1), {}
        return step(state, batch, lr=lr)

    return skipping


def parse_batch(text: str) -> tuple[int, int]:
    """Read an epoch and a batch, counted from 1: "12:40"; ValueError for any other text."""
    found = re.fullmatch(r"([1-9][0-9]{0,8}):([1-9][0-9]{0,8})", text, re.ASCII)
    if found is None:
        raise ValueError(
            f"skip_batches: expected an epoch and a batch, counted from 1, such as 12:40. "
            f"Received: {truncated_repr(text)}."
        )
    return int(found[1]), int(found[2])
