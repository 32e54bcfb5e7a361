"""Whether an optimizer's state is of that optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakSet

from dwiml_func._checks import listed
from dwiml_func._transforms import is_transformed
from dwiml_func.types import Optimizer, OptState, Params

__all__ = ["check_opt_state"]

_CHECKED: WeakSet[Any] = WeakSet()
"""The update functions, or the factories, of optimizers whose state was checked."""

_LATER = frozenset({"missed", "unused"})  # counts that start with the first parameter that a batch does not use


def check_opt_state(optimizer: Optimizer | Callable[..., Optimizer], opt_state: OptState, params: Params) -> None:
    """Compare the tree of a state with that of the optimizer, before its first update; ValueError if they differ."""
    known = optimizer.update if isinstance(optimizer, Optimizer) else optimizer
    if is_transformed() or known in _CHECKED:
        return
    made = optimizer if isinstance(optimizer, Optimizer) else optimizer(weight_decay=0.0)
    try:
        like = set(_paths(made.init({n: p.detach()[:0] if p.dim() else p for n, p in params.items()})))
    except (RuntimeError, NotImplementedError):  # an optimizer that reads values
        return
    own = set(_paths(opt_state))
    kinds, own_kinds = ({path[:-1] or path for path in paths} for paths in (like, own))
    if differing := kinds ^ own_kinds or like ^ own:
        raise ValueError(
            f"The state was made for another optimizer: of their trees, {listed(map('/'.join, differing))} "
            f"{'is' if len(differing) == 1 else 'are'} in only one. Give init_state and the step the same optimizer, "
            f"or start a new one by state.replace(opt_state=optimizer.init(state.params))."
        )
    _CHECKED.add(known)


def _paths(tree: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """The kinds of tensors, which are the branches above the parameters' names, and the names."""
    if not isinstance(tree, Mapping):
        yield path
        return
    for name, part in tree.items():
        if name not in _LATER:
            yield from _paths(part, *path, name)
