"""Updates written into donated tensors under a condition that only the device knows, piece by piece.

A step with a deferred check computes new values, and keeps the old ones where the loss or the gradient was not finite.
Done for all parameters at once, that takes a second copy of them and of the optimizer's state. Here a piece of them is
computed and written before the next, for optimizers that update each element by itself, also within chains, averages
and groups. What others compute, and what those keep beside, is written into the old tensors once all is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from dwiml_func._trees import choose
from dwiml_func.types import Grads, Number, Optimizer, OptState, Params

__all__ = ["can_update_in_place", "commit", "update_in_place"]

_PIECES = 16  # of all parameters
_MIN_PIECE = 2**18  # elements: small models are updated at once

_Piece = tuple[list[str], slice | None]


def can_update_in_place(optimizer: Optimizer, opt_state: OptState) -> bool:
    """Whether each element is updated by itself, with state `{kind: {name: tensor}}`, numbers of a parameter apart."""
    kinds = opt_state.values()
    is_flat = all(isinstance(kind, Mapping) and all(isinstance(t, Tensor) for t in kind.values()) for kind in kinds)
    return is_flat and (optimizer.is_elementwise or getattr(optimizer.update, "has_numbers", False))


def update_in_place(
    optimizer: Optimizer,
    grads: Grads,
    opt_state: OptState,
    params: Params,
    *,
    keep_old: Tensor,
    lr: Number,
    step: Number,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `choose(keep_old, old, optimizer.update(...))` gives, in the memory of the old tensors.

    The optimizer must fit `can_update_in_place`; `keep_old` is a () bool tensor.
    """
    state: dict[str, Any] = {kind: dict(tensors) for kind, tensors in opt_state.items()}
    for names, part in _pieces(params, grads, opt_state):
        old = {name: _cut(params[name], part) for name in names}
        own = {kind: {n: _cut(tensors[n], part) for n in names if n in tensors} for kind, tensors in opt_state.items()}
        given = {name: _cut(grad, part) if (grad := grads[name]) is not None else None for name in names}
        new, new_state = optimizer.update(given, own, old, lr=lr, step=step, donate=False)
        _write(keep_old, old, new, like=old)
        for kind, tensors in new_state.items():
            rest = _write(keep_old, own.get(kind, {}), tensors, like=old)
            state.setdefault(kind, {}).update(rest)
    return dict(params), state


def commit(keep_old: Tensor, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What `choose(keep_old, old, new)` gives, in the memory of the old tensors where that is possible.

    No old tensor is written into where a new one elsewhere is a view of any: `new` would change with it.
    """
    places = {leaf.untyped_storage().data_ptr(): path for path, leaf in tree_flatten_with_path(old)[0] if leaf.numel()}
    for path, leaf in tree_flatten_with_path(new)[0]:
        if leaf.numel() and places.get(leaf.untyped_storage().data_ptr(), path) != path:
            return choose(keep_old, old, new)
    return _committed(keep_old, old, new)


def _committed(keep_old: Tensor, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in {**new, **old}:
        own, leaf = old.get(name), new.get(name)
        if isinstance(own, Mapping) and isinstance(leaf, Mapping):
            result[name] = _committed(keep_old, own, leaf)
        elif isinstance(own, Tensor) and isinstance(leaf, Tensor) and own.dtype == leaf.dtype != torch.int64:
            result[name] = own if own is leaf else torch.where(keep_old, own, leaf, out=own)
        else:
            result[name] = choose(keep_old, own, leaf)
    return result


def _write(
    keep_old: Tensor, old: Mapping[str, Tensor], new: Mapping[str, Tensor], *, like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Write new values into old tensors; return what has none, and counts and numbers, which other pieces read."""
    rest = {}
    for name, tensor in new.items():
        own = old.get(name)
        if own is tensor:
            continue
        if own is None or own.dtype == torch.int64 or own.dim() != like[name].dim():
            rest[name] = choose(keep_old, own, tensor)
        else:
            torch.where(keep_old, own, tensor, out=own)
    return rest


def _pieces(params: Params, grads: Grads, opt_state: OptState) -> Iterator[_Piece]:
    """Parameters together, or a part of one that is large, flattened."""
    most = max(_MIN_PIECE, sum(param.numel() for param in params.values()) // _PIECES)
    together: list[str] = []
    size = 0
    for name, param in params.items():
        if param.numel() > most and _can_be_cut(name, param, grads, opt_state):
            for start in range(0, param.numel(), most):
                yield [name], slice(start, start + most)
            continue
        if together and size + param.numel() > most:
            yield together, None
            together, size = [], 0
        together.append(name)
        size += param.numel()
    if together:
        yield together, None


def _can_be_cut(name: str, param: Tensor, grads: Grads, opt_state: OptState) -> bool:
    all_of_it = [param, grads[name], *(tensors[name] for tensors in opt_state.values() if name in tensors)]
    return all(t is not None and (t.dim() == 0 or (t.shape == param.shape and t.is_contiguous())) for t in all_of_it)


def _cut(tensor: Tensor, part: slice | None) -> Tensor:
    return tensor if part is None or tensor.dim() == 0 else tensor.view(-1)[part]
