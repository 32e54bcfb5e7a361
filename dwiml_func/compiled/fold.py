"""Runs of batches that are alike: one loop around a graph, with the state in pieces until the run ends.

The loop does per step what each step needs: the graph, its random numbers, the sums. States and dicts between steps,
which nobody sees, are not made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from operator import add
from typing import Any

import numpy as np
import torch

from dwiml_func.compiled.direct import DirectCall, Leaves, flatten
from dwiml_func.core.non_finite import NON_FINITE, SKIPPED, check_not_skipped_too_often, raise_if_not_finite
from dwiml_func.core.state import TrainState
from dwiml_func.types import Sum

__all__ = ["END", "fold_alike"]

END: Any = object()
"""In place of a batch: there is none left."""


def fold_alike(
    state: TrainState,
    batches: Iterator[Any],
    *,
    leaves: Leaves,
    direct: DirectCall,
    numbers: tuple[float, ...],
    seeded: Callable[[int], AbstractContextManager[None]],
) -> tuple[TrainState, Any]:
    """Take steps as long as batches are like the one before.

    Args:
        state: the state after a step on the batch in `leaves`. The step must read its numbers at once, on the CPU.
        batches: the next batches.
        leaves, direct: of that state and batch.
        numbers: learning rate and, where it is given, weight decay.
        seeded: the generators of the step on a batch of this number.

    Returns:
        The state after the last of these steps, and the batch that is not alike; `END` if none is left.
    """
    lr, *decay = numbers
    blocked = float(state.sums[NON_FINITE].weight) if NON_FINITE in state.sums else 0.0
    given = np.array([lr, state.step, blocked, *decay])
    tensor = torch.from_numpy(given)
    own, done = leaves.state, 0
    sums = [float(part) for name in direct.names for part in state.sums[name]]

    def current() -> TrainState:
        pairs = zip(sums[::2], sums[1::2], strict=True)
        params, buffers, opt_state = leaves.rebuild(own)
        return state.replace(
            params=params,
            buffers=buffers,
            opt_state=opt_state,
            step=state.step + done,
            batch=state.batch + done,
            sums={**state.sums, **{name: Sum(*pair) for name, pair in zip(direct.names, pairs, strict=True)}},
        )

    for batch in batches:
        given[1] = state.step + done
        tensors: list[Any] = []
        try:
            is_alike = flatten(batch, tensors) == leaves.kind[0] and direct.accepts(tensors)
        except TypeError:
            is_alike = False
        if not is_alike:
            return current(), batch
        with seeded(state.batch + done):
            own, values = direct(tensors, own, tensor)
        loss, norm, _, _, *new = values.tolist()
        if direct.policy == "raise" and not (math.isfinite(loss) and math.isfinite(norm)):
            raise_if_not_finite(current(), batch, loss, norm)
        done += 1
        sums = list(map(add, sums, new))
        if direct.policy == "skip" and new[2 * direct.names.index(SKIPPED)]:
            check_not_skipped_too_often(current())
    return current(), END
