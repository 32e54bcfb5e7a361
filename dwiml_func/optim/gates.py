"""Transformations that decide which steps the later links of a `chain` take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dwiml_func._transforms import is_transformed, read_number
from dwiml_func._trees import choose, given
from dwiml_func.optim._foreach import arithmetic_for
from dwiml_func.optim._kernel import check_count, scalar
from dwiml_func.types import Gate, Grads, Number, OptState, Params, Transform

__all__ = ["accumulate", "skip_not_finite", "skipped_too_often"]


def accumulate(num_steps: int) -> Transform:
    """Collect the gradients of `num_steps` micro-batches, and let the later links take one step with their mean.

    The mean is weighted by the number of points of each micro-batch, so that micro-batches of unequal size give the
    gradient of one batch with all their points.

    Args:
        num_steps: micro-batches in each update.

    Returns:
        A link of `chain`. `step` counts micro-batches, and the gate opens at the last one of every `num_steps`.
        Its state is the running mean of the gradients, and the number of points in it. A parameter that some of the
        micro-batches do not use has a gradient of zero there. One that none of them uses has a gradient of None, as
        with `torch.optim`.

    Raises:
        ValueError: `num_steps` is below 1; at an update under `torch.compile` or a transform of `torch.func`, which
            cannot read how many micro-batches used a parameter, one is not used. (`jit_step` then steps eagerly.)

    Example:
        >>> from dwiml_func.optim import chain, sgd
        >>> optimizer = chain(accumulate(2), sgd())
        >>> params = {"w": torch.zeros(1)}
        >>> state = optimizer.init(params)
        >>> for step, (grad, num_points) in enumerate([(1.0, 30), (5.0, 10)]):
        ...     grads = {"w": torch.tensor([grad])}
        ...     params, state = optimizer.update(grads, state, params, lr=1.0, step=step, weight=num_points)
        ...     print(params["w"])
        tensor([0.])
        tensor([-2.])
    """
    check_count("num_steps", num_steps)

    def init(params: Params) -> OptState:
        points = scalar(next(iter(params.values())), 0.0, torch.float64)
        return {"mean": {name: torch.zeros_like(p) for name, p in params.items()}, "weight": points}

    def update(
        grads: Grads, state: OptState, params: Params, *, step: Any, weight: Number, donate: bool, **_: object
    ) -> tuple[Grads, OptState, Gate]:
        step, weight, before = read_number(step), read_number(weight), read_number(state["weight"])
        if isinstance(weight, Tensor):
            weight = weight.to(torch.float64)
        total = before + weight
        old = [state["mean"][name] for name in params]
        used = given(grads)
        if len(used) < len(params) and is_transformed():
            unused = next(name for name in params if name not in used)
            raise ValueError(
                f"Expected a loss that uses all parameters, to accumulate gradients under a transform of torch. "
                f"Received: one that does not use {unused}. Freeze it by requires_grad_(False)."
            )
        new = [used[name] if name in used else torch.zeros_like(p) for name, p in params.items()]
        if isinstance(total, Tensor):
            before = state["weight"]
            run = arithmetic_for([*old, *new], total)
            share = weight / torch.where(total == 0, 1.0, total)
            means = run("add", old, run("sub", new, old), alpha=share)
            means = [torch.where(before == 0, first, mean) for first, mean in zip(new, means, strict=True)]
        elif before == 0:
            means = [tensor.clone() for tensor in new]
        else:
            run = arithmetic_for([*old, *new])
            means = run("add", old, run("sub", new, old), alpha=weight / total, reuse=donate)
        is_last = (step + 1) % num_steps == 0
        mean = dict(zip(params, means, strict=True))
        emitted: dict[str, Tensor | None] = dict(mean)
        points = total if isinstance(total, Tensor) else torch.full_like(state["weight"], total)
        new_state: dict[str, Any] = {"mean": mean, "weight": choose(is_last, torch.zeros_like(points), points)}
        missed: Mapping[str, Tensor] = state.get("unused", {})
        counts = {}
        for name in params:
            if name in missed or name not in used:
                count = missed.get(name, scalar(params[name], 0, torch.int64)) + int(name not in used)
                counts[name] = choose(is_last, torch.zeros_like(count), count)
                known = read_number(count)
                if not isinstance(known, Tensor) and known == num_steps:
                    emitted[name] = None
        if counts:
            new_state["unused"] = counts
        return emitted, new_state, Gate(is_last, step // num_steps, total)

    update.start = lambda grads: update  # type: ignore[attr-defined]  # see `transform_in_place`
    return Transform(init, update)


def skip_not_finite(max_in_a_row: int) -> Transform:
    """Let the later links skip a step where a gradient is NaN or infinite.

    Args:
        max_in_a_row: skipped steps in a row that are accepted; see `skipped_too_often`.

    Returns:
        A link of `chain`. Its state counts the skipped steps in all, and in a row. The later links do not count a
        skipped step.

    Raises:
        ValueError: `max_in_a_row` is below 1.

    Example:
        >>> from dwiml_func.optim import chain, sgd
        >>> optimizer = chain(skip_not_finite(3), sgd())
        >>> params = {"w": torch.ones(1)}
        >>> params, state = optimizer.update(
        ...     {"w": torch.tensor([float("nan")])}, optimizer.init(params), params, lr=1.0, step=0
        ... )
        >>> params["w"], state["0"]["in_a_row"], skipped_too_often(state)
        (tensor([1.]), tensor(1), False)
    """
    check_count("max_in_a_row", max_in_a_row)

    def init(params: Params) -> OptState:
        like = next(iter(params.values()))
        counts = {"skipped": 0, "in_a_row": 0, "max_in_a_row": max_in_a_row}
        return {name: scalar(like, count, torch.int64) for name, count in counts.items()}

    def update(grads: Grads, state: OptState, params: Params, **options: Any) -> tuple[Grads, OptState, Gate]:
        return start(grads)(grads, state, params, **options)

    def start(all_grads: Grads) -> Callable[..., tuple[Grads, OptState, Gate]]:
        return partial(decide, read_number(_all_finite(all_grads)))

    def decide(
        is_finite: Any, grads: Grads, state: OptState, params: Params, *, step: Any, weight: Number, **_: object
    ) -> tuple[Grads, OptState, Gate]:
        skipped = read_number(state["skipped"])
        in_a_row = state["in_a_row"] + 1
        new_state = {
            "skipped": state["skipped"] + choose(is_finite, 0, 1),
            "in_a_row": choose(is_finite, torch.zeros_like(in_a_row), in_a_row),
            "max_in_a_row": state["max_in_a_row"],
        }
        return grads, new_state, Gate(is_finite, step - skipped, weight)

    update.start = start  # type: ignore[attr-defined]
    return Transform(init, update)


def skipped_too_often(opt_state: OptState) -> bool | Tensor:
    """Whether a `skip_not_finite` has skipped more steps in a row than its limit.

    Args:
        opt_state: state of any optimizer.

    Returns:
        A bool; a () bool tensor where the counts cannot be read.

    Example:
        >>> skipped_too_often({"0": {"in_a_row": torch.tensor(4), "max_in_a_row": torch.tensor(3)}})
        True
    """
    found: bool | Tensor = False
    if {"in_a_row", "max_in_a_row"} <= opt_state.keys():
        found = read_number(opt_state["in_a_row"] > opt_state["max_in_a_row"])
    for part in opt_state.values():
        if isinstance(part, Mapping):
            found = skipped_too_often(part) | found
    return found


def _all_finite(grads: Grads) -> bool | Tensor:
    tensors = [grad for grad in given(grads).values() if grad.numel()]
    if not tensors:
        return True
    largest = arithmetic_for(tensors)("norm", tensors, math.inf)  # the L2 norm of finite numbers can be infinite
    return torch.isfinite(torch.stack(list(largest))).all()
