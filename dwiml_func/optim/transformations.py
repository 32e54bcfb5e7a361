"""Transformations of gradients, links of `chain`: clipping and weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dwiml_func._trees import given
from dwiml_func.optim._foreach import arithmetic_for
from dwiml_func.optim._kernel import check_options, is_not_zero
from dwiml_func.optim.name_patterns import check_patterns, first_matches
from dwiml_func.types import Grads, Number, OptState, Params, Transform

__all__ = [
    "add_decayed_weights",
    "check_clip_norm",
    "clip_by_global_norm",
    "clip_by_value",
    "clip_grad_norm",
    "global_norm",
]


_Change = Callable[[Params, Params], Params]
"""From gradients and their parameters to other gradients."""


def clip_by_global_norm(max_norm: Number) -> Transform:
    """Scale all gradients so that their global L2 norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_`.

    Args:
        max_norm: the largest norm, > 0.

    Returns:
        A link of `chain`, without state.

    Raises:
        ValueError: `max_norm` is not above 0.

    Example:
        >>> from dwiml_func.optim import chain, sgd
        >>> optimizer = chain(clip_by_global_norm(1.0), sgd())
        >>> params, _ = optimizer.update({"w": torch.tensor([3.0, 4.0])}, {}, {"w": torch.zeros(2)}, lr=1.0, step=0)
        >>> params["w"]
        tensor([-0.6000, -0.8000])
    """
    _check_above_zero("max_norm", max_norm)

    def start(grads: Params) -> _Change:
        norm = global_norm(grads)
        return lambda grads, params: _clipped(grads, norm, max_norm)[0]

    return _stateless(start)


def clip_by_value(max_value: Number) -> Transform:
    """Limit every element of the gradients to [-max_value, max_value], as `torch.nn.utils.clip_grad_value_`.

    Args:
        max_value: the largest absolute value, > 0.

    Returns:
        A link of `chain`, without state.

    Raises:
        ValueError: `max_value` is not above 0.
        TypeError: at an update, a gradient is complex.

    Example:
        >>> from dwiml_func.optim import chain, sgd
        >>> optimizer = chain(clip_by_value(1.0), sgd())
        >>> params, _ = optimizer.update({"w": torch.tensor([3.0, -0.5])}, {}, {"w": torch.zeros(2)}, lr=1.0, step=0)
        >>> params["w"]
        tensor([-1.0000,  0.5000])
    """
    _check_above_zero("max_value", max_value)

    def clip(grads: Params, params: Params) -> Params:
        if complex_names := [name for name, grad in grads.items() if grad.is_complex()]:
            raise TypeError(
                f"Expected real gradients to clip by value. Received: a complex gradient of {complex_names[0]}. "
                "Use clip_by_global_norm."
            )
        if isinstance(max_value, Tensor):  # clamp takes tensors of the gradient's dtype only
            limits = [max_value.to(grad.dtype) for grad in grads.values()]
            tensors = [torch.clamp(grad, -limit, limit) for grad, limit in zip(grads.values(), limits, strict=True)]
            return dict(zip(grads, tensors, strict=True))
        tensors = list(grads.values())
        run = arithmetic_for(tensors)
        return dict(zip(grads, run("clamp_max", run("clamp_min", tensors, -max_value), max_value), strict=True))

    return _stateless(lambda grads: clip)


def add_decayed_weights(weight_decay: Number, *, mask: str = "*") -> Transform:
    """Add `weight_decay` times the parameter to its gradient: an L2 penalty.

    Args:
        weight_decay: factor of the parameters; a number, or a () tensor to differentiate with respect to it.
        mask: patterns of the parameters' names, as in `by_name`: `"*.weight"`, or alternatives such as
            `"encoder.*|decoder.*"`.

    Returns:
        A link of `chain`, without state. Before `sgd`, `adam` and `radam` it equals their own `weight_decay`; that of
        `adamw` is decoupled from the gradient, and another quantity.

    Raises:
        ValueError: `weight_decay` is negative or not finite; at `init`, `mask` matches no parameter.

    Example:
        >>> from dwiml_func.optim import chain, sgd
        >>> optimizer = chain(add_decayed_weights(0.5, mask="*weight"), sgd())
        >>> params = {"weight": torch.ones(1), "bias": torch.ones(1)}
        >>> grads = {"weight": torch.zeros(1), "bias": torch.zeros(1)}
        >>> params, _ = optimizer.update(grads, optimizer.init(params), params, lr=1.0, step=0)
        >>> float(params["weight"]), float(params["bias"])
        (0.5, 1.0)
    """
    check_options(weight_decay=weight_decay)

    def decay(grads: Params, params: Params) -> Params:
        if not is_not_zero(weight_decay):
            return grads
        matches = first_matches((mask,), tuple(grads))
        names = [name for name, match in zip(grads, matches, strict=True) if match is not None]
        if not names:
            return grads
        old, own = [grads[name] for name in names], [params[name] for name in names]
        run = arithmetic_for([*old, *own], weight_decay)
        return {**grads, **dict(zip(names, run("add", old, own, alpha=weight_decay), strict=True))}

    def init(params: Params) -> OptState:
        check_patterns((mask,), params)
        return {}

    return _stateless(lambda grads: decay)._replace(init=init)


def global_norm(grads: Grads) -> Tensor:
    """The L2 norm of all gradients taken as one vector: a () tensor, as `torch.nn.utils.get_total_norm`."""
    tensors = list(given(grads).values())
    if not tensors:
        return torch.tensor(0.0)
    return torch.linalg.vector_norm(torch.stack(list(arithmetic_for(tensors)("norm", tensors))))


def clip_grad_norm(grads: Grads, max_norm: Number) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Scale gradients that are given down to a global norm of at most `max_norm`; `clip_by_global_norm` is its link.

    Args:
        grads: tensors by name; they are not changed. None stays None.
        max_norm: the largest norm allowed, > 0.

    Returns:
        The scaled gradients (new tensors), the norm before and the norm after. The factor is
        min(1, max_norm / (norm + 1e-6)), bitwise identical to `torch.nn.utils.clip_grad_norm_`.

    Raises:
        ValueError: `max_norm` is not above 0; a negative value would flip the gradient's sign.

    Example:
        >>> grads, before, after = clip_grad_norm({"w": torch.tensor([3.0, 4.0])}, max_norm=1.0)
        >>> float(before), round(float(after), 3)
        (5.0, 1.0)
    """
    check_clip_norm(max_norm)
    used, norm = given(grads), global_norm(grads)
    clipped, factor = _clipped(used, norm, max_norm)
    return {**grads, **clipped}, norm, norm * factor


def check_clip_norm(max_norm: Number) -> None:
    """Raise a ValueError unless gradients can be scaled down to this norm."""
    if not isinstance(max_norm, Tensor) and (isinstance(max_norm, str) or not max_norm > 0):
        raise ValueError(f"Expected a clipping norm above 0, or None for no clipping. Received: {max_norm}")


def _clipped(grads: Params, norm: Tensor, max_norm: Number) -> tuple[dict[str, Tensor], Tensor]:
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    tensors = list(grads.values())
    scaled = arithmetic_for(tensors)("mul", tensors, factor) if tensors else []
    # Among gradients of several dtypes, the factor has the widest, and would give it to a () gradient.
    pairs = zip(tensors, scaled, strict=True)
    same = [new if new.dtype == old.dtype else new.to(old.dtype) for old, new in pairs]
    return dict(zip(grads, same, strict=True)), factor


def _stateless(start: Callable[[Params], _Change]) -> Transform:
    """A link that changes the gradients that are there, by what `start` makes of all; see `transform_in_place`."""

    def start_update(all_grads: Params) -> Callable[..., tuple[Grads, OptState]]:
        change = start(all_grads)

        def update_some(grads: Grads, state: OptState, params: Params, **_: object) -> tuple[Grads, OptState]:
            used = given(grads)
            return ({**grads, **change(used, params)} if used else grads), state

        return update_some

    def update(grads: Grads, state: OptState, params: Params, **_: object) -> tuple[Grads, OptState]:
        used = given(grads)
        return start_update(used)(grads, state, params) if used else (grads, state)

    update.start = start_update  # type: ignore[attr-defined]
    return Transform(lambda params: {}, update)


def _check_above_zero(name: str, value: Number) -> None:
    if isinstance(value, str) or not (isinstance(value, Tensor) or value > 0):  # a negative one would flip the sign
        raise ValueError(f"Expected {name} above 0. Received: {name}={value}")
