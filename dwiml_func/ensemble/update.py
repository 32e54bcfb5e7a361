"""The optimizer's update of all members of an ensemble at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from dwiml_func._trees import given
from dwiml_func.ensemble.state import EnsembleState
from dwiml_func.optim.chain import resolve_optimizer, update_with
from dwiml_func.types import Grads, Optimizer, OptState, Params

__all__ = ["broadcast_to", "update_members"]


def update_members(
    ensemble: EnsembleState,
    grads: Grads,
    optimizer: Optimizer | Callable[..., Optimizer],
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor | None,
    weight: float | Tensor,
    step: int | Tensor,
) -> tuple[Params, OptState]:
    """The optimizer's update of all members at once."""
    example = resolve_optimizer(optimizer, weight_decay if isinstance(optimizer, Optimizer) else 0.0)
    dense = given(grads)
    if not example.is_elementwise or len(dense) < len(grads) or "missed" in ensemble.opt_state:
        numbers = {"lr": lr, "weight_decay": weight_decay, "weight": weight}
        return _updated_by_vmap(ensemble, grads, optimizer, step, **numbers)
    if isinstance(optimizer, Optimizer) and not isinstance(lr, Tensor):
        return optimizer.update(dense, ensemble.opt_state, ensemble.params, lr=lr, step=cast(int, step))
    return _updated_by_broadcast(ensemble, dense, optimizer, step, lr, weight_decay)


def _updated_by_vmap(
    ensemble: EnsembleState,
    grads: Grads,
    optimizer: Optimizer | Callable[..., Optimizer],
    step: int | Tensor,
    **numbers: Any,
) -> tuple[Params, OptState]:
    mapped = {name: number for name, number in numbers.items() if isinstance(number, Tensor)}

    def one(dense: Params, opt_state: OptState, params: Params, own: dict[str, Tensor]) -> tuple[Params, OptState]:
        options = {**numbers, **own}
        decay = options.pop("weight_decay")
        made = optimizer if isinstance(optimizer, Optimizer) else optimizer(**decayed(decay))
        values = {name: dense.get(name) for name in params}, opt_state, params
        return update_with(made, *values, step=step, donate=False, **options)

    def decayed(decay: float | Tensor | None) -> dict[str, float | Tensor]:
        return {} if decay is None else {"weight_decay": decay}

    trees = given(grads), dict(ensemble.opt_state), dict(ensemble.params)
    return torch.func.vmap(one)(*trees, mapped)


def _updated_by_broadcast(
    ensemble: EnsembleState,
    grads: Params,
    optimizer: Optimizer | Callable[..., Optimizer],
    step: int | Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor | None,
) -> tuple[Params, OptState]:
    params: dict[str, Tensor] = {}
    opt_state: dict[str, dict[str, Tensor]] = {kind: {} for kind in ensemble.opt_state}
    groups: dict[Any, list[str]] = {}  # leaves to which the members' numbers broadcast in one shape and dtype
    for name, leaf in grads.items():
        groups.setdefault((leaf.dim(), leaf.dtype), []).append(name)
    for names in groups.values():
        broadcast = partial(broadcast_to, like=grads[names[0]])
        decay = {} if weight_decay is None else {"weight_decay": broadcast(weight_decay)}
        made = optimizer if isinstance(optimizer, Optimizer) else optimizer(**decay)
        old_state = {kind: _some(own, names) for kind, own in ensemble.opt_state.items()}
        values = (_some(grads, names), old_state, _some(ensemble.params, names))
        new_params, new_state = made.update(*values, lr=broadcast(lr), step=cast(int, step))
        params |= new_params
        opt_state = {kind: {**own, **new_state[kind]} for kind, own in opt_state.items()}
    return _some(params, grads), {kind: _some(own, grads) for kind, own in opt_state.items()}


def _some(leaves: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    return {name: leaves[name] for name in names}


def broadcast_to(number: float | Tensor, like: Tensor) -> float | Tensor:
    """A number (K,) for each member, in the dtype of a leaf (K, ...) and a shape that broadcasts to it."""
    return number.to(like).reshape(-1, *(1,) * (like.dim() - 1)) if isinstance(number, Tensor) else number
