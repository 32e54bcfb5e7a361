"""Updates written into donated tensors under a condition that only the device knows, piece by piece.

A step with a deferred check computes new values, and keeps the old ones where the loss or the gradient was not finite.
Done for all parameters at once, that takes a second copy of them and of the optimizer's state, and several of what is
computed on the way. Here a piece of them is computed and written before the next, for updates that treat each element,
or each parameter, by itself. What others compute, and what those keep beside, is written into the old tensors once all
is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from dwiml_func._trees import choose, given
from dwiml_func.types import Gate, Grads, Number, Optimizer, OptState, Params, Transform

__all__ = ["can_update_in_place", "commit", "is_separable", "separable", "transform_in_place", "update_in_place"]

_PIECES = 16  # of all parameters
_MIN_PIECE = 2**18  # elements: small models are updated at once

_Piece = tuple[list[str], slice | None]
_By = Literal["element", "parameter"]


def separable(update: Callable[..., Any], *within: Optimizer, by: _By = "element") -> Any:
    """Mark an update that gives each element, or each parameter, the same by itself as together with others.

    It waits for no device, and what its state has beside tensors by the parameters' names are numbers of the step. One
    that calls other optimizers is no more separable than they are.
    """
    kinds = {by, *(getattr(optimizer.update, "separable_by", None) for optimizer in within)}
    coarsest = "parameter" if "parameter" in kinds else "element"
    update.separable_by = None if None in kinds else coarsest  # type: ignore[attr-defined]
    return update


def is_separable(optimizer: Optimizer) -> bool:
    """Whether the update is marked as `separable`."""
    return getattr(optimizer.update, "separable_by", None) is not None


def can_update_in_place(optimizer: Optimizer, opt_state: OptState) -> bool:
    """Whether `update_in_place` takes it: marked as `separable`, or elementwise with state `{kind: {name: tensor}}`."""
    if is_separable(optimizer):
        return True
    kinds = opt_state.values()
    is_flat = all(isinstance(kind, Mapping) and all(isinstance(t, Tensor) for t in kind.values()) for kind in kinds)
    return is_flat and optimizer.is_elementwise


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
    state = _copied(opt_state)
    for names, part in _pieces(params, grads, opt_state, cuts=_by(optimizer) == "element"):
        old = {name: _cut(params[name], part) for name in names}
        own = _of(opt_state, names, part, params)
        some = {name: _cut(grad, part) if (grad := grads[name]) is not None else None for name in names}
        new, new_state = optimizer.update(some, own, old, lr=lr, step=step, donate=False)
        _write(keep_old, old, new, like=old)
        _merge(state, _write(keep_old, own, new_state, like=old))
    return dict(params), state


def transform_in_place(
    link: Transform,
    grads: dict[str, Tensor | None],
    state: OptState,
    params: Params,
    *,
    keep_old: Tensor,
    **options: Any,
) -> tuple[dict[str, Any], list[Gate]]:
    """A link of `chain` that replaces the gradients in their dict, which frees the old ones, and writes its state.

    Args:
        link: its `update.start` makes, of all gradients that are given, an update that takes those of some parameters.
        grads: the gradients; they are replaced.
        state, params: of the link.
        keep_old: a () bool tensor, whether the state stays as it is.
        options: those of the link's update.

    Returns:
        The state, and the gate if the link has one.
    """
    update, gates = link.update.start(given(grads)), []  # type: ignore[attr-defined]
    new_state = _copied(state)
    for names, _ in _pieces(params, grads, state, cuts=False):
        own = _of(state, names, None, params)
        old = {name: params[name] for name in names}
        changed, piece, *gates = update({name: grads[name] for name in names}, own, old, **options)
        grads.update(changed)
        _merge(new_state, _write(keep_old, own, piece, like=old))
    return new_state, gates


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
    keep_old: Tensor, old: Mapping[str, Any], new: Mapping[str, Any], *, like: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Write new values into old tensors; return what has none, and counts and numbers, which other pieces read."""
    rest: dict[str, Any] = {}
    is_by_name = _is_by_name(new, like)
    for name, leaf in new.items():
        own = old.get(name)
        if isinstance(leaf, Mapping):
            rest[name] = _write(keep_old, own or {}, leaf, like=like)
        elif own is None or own.dtype == torch.int64 or not is_by_name or own.dim() != like[name].dim():
            rest[name] = choose(keep_old, own, leaf)
        elif own is not leaf:
            torch.where(keep_old, own, leaf, out=own)
    return rest


def _by(optimizer: Optimizer) -> _By | None:
    return getattr(optimizer.update, "separable_by", "element" if optimizer.is_elementwise else None)


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copied(leaf) if isinstance(leaf, Mapping) else leaf for name, leaf in tree.items()}


def _merge(tree: dict[str, Any], rest: Mapping[str, Any]) -> None:
    for name, leaf in rest.items():
        if isinstance(leaf, Mapping):
            _merge(tree.setdefault(name, {}), leaf)
        else:
            tree[name] = leaf


def _of(tree: Mapping[str, Any], names: Iterable[str], part: slice | None, params: Params) -> dict[str, Any]:
    """The state of some parameters, with all numbers."""
    if _is_by_name(tree, params):
        return {name: _cut(tree[name], part) for name in names if name in tree}
    return {key: _of(leaf, names, part, params) if isinstance(leaf, Mapping) else leaf for key, leaf in tree.items()}


def _is_by_name(tree: Mapping[str, Any], params: Params) -> bool:
    return tree.keys() <= params.keys() and all(isinstance(leaf, Tensor) for leaf in tree.values())


def _pieces(params: Params, grads: Grads, opt_state: OptState, *, cuts: bool) -> Iterator[_Piece]:
    """Parameters together, or a part of one that is large, flattened, where `cuts` allows it."""
    most = max(_MIN_PIECE, sum(param.numel() for param in params.values()) // _PIECES)
    together: list[str] = []
    size = 0
    for name, param in params.items():
        if cuts and param.numel() > most and _can_be_cut(name, param, grads, opt_state, params):
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


def _can_be_cut(name: str, param: Tensor, grads: Grads, opt_state: OptState, params: Params) -> bool:
    all_of_it = [param, grads[name], *_leaves(_of(opt_state, [name], None, params), name)]
    return all(t is not None and (t.dim() == 0 or (t.shape == param.shape and t.is_contiguous())) for t in all_of_it)


def _leaves(tree: Mapping[str, Any], name: str) -> Iterator[Tensor]:
    for key, leaf in tree.items():
        if isinstance(leaf, Mapping):
            yield from _leaves(leaf, name)
        elif key == name:
            yield leaf


def _cut(tensor: Tensor, part: slice | None) -> Tensor:
    return tensor if part is None or tensor.dim() == 0 else tensor.view(-1)[part]
