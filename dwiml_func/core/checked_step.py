"""A step that is computed twice and compared, against hardware that computes something else now and then."""

from __future__ import annotations

import logging
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from dwiml_func._checks import at_most_three
from dwiml_func.core.non_finite import location
from dwiml_func.core.rates import Step

__all__ = ["StepMismatchError", "checked_step"]


class StepMismatchError(ArithmeticError):
    """A step gave two different results. It was not taken; the state before it is unchanged.

    Example:
        >>> raise StepMismatchError("params/weight")
        Traceback (most recent call last):
        ...
        dwiml_func.core.checked_step.StepMismatchError: params/weight
    """


def checked_step(step: Step, every: int) -> Step:
    """Make a step that is computed twice, every so many steps, and taken only if both results are bitwise identical.

    Where they differ, a warning names step and tensors, and the step is computed twice more. It finds errors that do
    not repeat, such as flipped bits in activations, gradients or the optimizer's arithmetic; not a state that was
    changed in memory before the step, and no error that repeats.

    Args:
        step: `step(state, batch, lr=...)`, of a run or of an ensemble, also one that donates its state.
        every: every so many steps one is checked.

    Returns:
        A step for `train_and_validate`. It raises StepMismatchError where the results differ twice.

    Raises:
        ValueError: `every` is not at least 1.

    Example:
        >>> from functools import partial
        >>> from dwiml_func import init_state, module_loss, sgd, train_step
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
        >>> step = checked_step(partial(train_step, loss_fn=loss_fn, optimizer=sgd()), every=100)
        >>> state, _ = step(init_state(model, sgd(), seed=0), torch.ones(4, 2), lr=0.1)
        >>> state.step
        1
    """
    if every < 1:
        raise ValueError(f"Expected to check every step, or every so many. Received: every={every!r}")

    @wraps(step, updated=())
    def checked(state: Any, batch: Any, *, lr: Any) -> Any:
        if state.step % every:
            return step(state, batch, lr=lr)
        for is_last in (False, True):
            first, second = (step(_own(state), batch, lr=lr) for _ in range(2))
            if not (different := _different(first, second)):
                return first
            where = location(state.epoch, state.batch, state.step)
            text = f"Two computations of {where} differ in {at_most_three(different, ', ')}"
            if is_last:
                raise StepMismatchError(
                    f"{text}, twice in a row. The step was not taken. Is the memory or the processor faulty, or a part "
                    "of the model not deterministic? Resume on another machine."
                )
            logging.getLogger(__name__).warning("%s. Computing it again.", text)
        raise AssertionError("returned or raised")

    return checked


def _own(state: Any) -> Any:
    """The state, or the ensemble, with its own copy of what a step that donates or is replayed may write into."""
    parts = {name: dict(getattr(state, name)) for name in ("params", "buffers", "opt_state")}
    members = {name: getattr(state, name) for name in ("active", "done") if hasattr(state, name)}
    return state.replace(**tree_map(_copy, {**parts, **members}))


def _copy(tensor: Tensor) -> Tensor:
    is_shared = 0 in tensor.stride() and tensor.numel() > 1  # one for all members, which nothing writes into
    return tensor if is_shared else tensor.clone()


def _different(one: Any, other: Any) -> list[str]:
    """The tensors whose bits differ; they are compared on their device, and waited for once."""
    leaves, others = (tree_flatten_with_path(result)[0] for result in (_tree(one), _tree(other)))
    if [path for path, _ in leaves] != [path for path, _ in others]:
        return ["which tensors there are"]
    pairs = [(keystr(path), a, b) for (path, a), (_, b) in zip(leaves, others, strict=True)]
    flags = [_differs(a, b) for _, a, b in pairs]
    on_device = [flag for flag in flags if isinstance(flag, Tensor)]
    read = iter(torch.stack(on_device).tolist() if on_device else [])
    return [
        name.replace("'][", "/").replace("'", "").strip("[]")
        for (name, _, _), flag in zip(pairs, flags, strict=True)
        if (next(read) if isinstance(flag, Tensor) else flag)
    ]


def _tree(result: tuple[Any, Any]) -> dict[str, Any]:
    state, metrics = result
    return {
        "params": dict(state.params),
        "buffers": dict(state.buffers),
        "opt_state": dict(state.opt_state),
        "metrics": {name: list(own) for name, own in metrics.items()},
    }


def _differs(a: Any, b: Any) -> bool | Tensor:
    if not isinstance(a, Tensor):
        return repr(a) != repr(b)  # a NaN is equal to another
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return True
    bits = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.ne(*bits).any()
