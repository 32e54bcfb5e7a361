"""Whether an optimizer's state is of that optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.utils._pytree import tree_map

from dwiml_func._checks import listed
from dwiml_func._transforms import is_transformed
from dwiml_func.types import Optimizer, OptState, Params

__all__ = ["check_opt_state"]

_CHECKED: WeakSet[Any] = WeakSet()
"""The update functions, or the factories, of optimizers whose state was checked."""

_LATER = frozenset({"missed", "unused"})  # counts that start with the first parameter that a batch does not use


def check_opt_state(
    optimizer: Optimizer | Callable[..., Optimizer], opt_state: OptState, params: Params, *, is_stacked: bool = False
) -> None:
    """Compare the tree of a state with that of the optimizer, before its first update; ValueError if they differ.

    `is_stacked`: state and parameters are those of an ensemble, with its members along their first dimension.
    """
    known = optimizer.update if isinstance(optimizer, Optimizer) else optimizer
    if is_transformed() or known in _CHECKED:
        return
    if is_stacked:
        opt_state, params = tree_map(lambda leaf: leaf[0], (opt_state, params))
    made = optimizer if isinstance(optimizer, Optimizer) else optimizer(weight_decay=0.0)
    rows = {name: param.detach()[:0] if param.dim() else param for name, param in params.items()}
    try:
        like = dict(_leaves(made.init(rows)))  # on the device meta, torch would import sympy, in half a second
    except (RuntimeError, NotImplementedError):  # an optimizer that reads values
        return
    own = dict(_leaves(opt_state))
    kinds, own_kinds = ({path[:-1] or path for path in paths} for paths in (like, own))
    if differing := kinds ^ own_kinds or like.keys() ^ own.keys():
        raise ValueError(
            f"The state was made for another optimizer: of their trees, {listed(map('/'.join, differing))} "
            f"{'is' if len(differing) == 1 else 'are'} in only one. Give init_state and the step the same optimizer, "
            f"or start a new one by state.replace(opt_state=optimizer.init(state.params))."
        )
    for path, leaf in like.items():
        if not isinstance(leaf, Tensor) or not isinstance(given := own[path], Tensor):
            continue
        is_like_param = path[-1] in rows and leaf.shape == rows[path[-1]].shape
        expected = params[path[-1]].shape if is_like_param else leaf.shape
        if given.shape != expected and (is_like_param or 0 not in leaf.shape):
            raise ValueError(
                f"opt_state: expected {'/'.join(path)} of shape {tuple(expected)}, as the parameters have it. "
                f"Received: {tuple(given.shape)}. To reset it: state.replace(opt_state=optimizer.init(state.params))."
            )
    _CHECKED.add(known)


def _leaves(tree: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The tensors and numbers by the branches above the parameters' names, and the names."""
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for name, part in tree.items():
        if name not in _LATER:
            yield from _leaves(part, *path, name)
