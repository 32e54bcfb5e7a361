"""From a formula on lists of tensors to an optimizer: which parameters take part, and how many updates each has had."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from dwiml_func._transforms import read_number
from dwiml_func._trees import given
from dwiml_func.optim._foreach import Arithmetic, Tensors, arithmetic_for
from dwiml_func.optim.in_place import separable
from dwiml_func.types import Grads, Number, Optimizer, OptState, Params

__all__ = [
    "Kernel",
    "apply_kernel",
    "check_count",
    "check_options",
    "is_not_zero",
    "lerp",
    "optimizer_from_kernel",
    "scalar",
]

Kernel = Callable[
    [Arithmetic, Tensors, Tensors, dict[str, Tensors], Number, Number, bool], tuple[Tensors, dict[str, Tensors]]
]
"""(arithmetic, grads, params, opt_state, lr, step, donate) -> (params, opt_state), lists in one order of names."""


def optimizer_from_kernel(
    kernel: Kernel,
    kinds: Mapping[str, Callable[[Tensor], Tensor]],
    *numbers: Number,
    uses_step: bool = False,
    on_reals: bool = True,
) -> Optimizer:
    """The optimizer that applies `kernel`. `kinds` maps each part of its state to the function that starts it.

    `numbers` are further numbers of the formula, such as a weight decay. The flags are those of `apply_kernel`.
    """

    def init(params: Params) -> OptState:
        return {kind: {name: start(p) for name, p in params.items()} for kind, start in kinds.items()}

    def update(
        grads: Grads, opt_state: OptState, params: Params, *, lr: Number, step: Number, donate: bool = False
    ) -> tuple[dict[str, Tensor], OptState]:
        return apply_kernel(
            *(kernel, tuple(kinds), grads, opt_state, params, *numbers),
            lr=lr,
            step=step,
            donate=donate,
            uses_step=uses_step,
            on_reals=on_reals,
        )

    return Optimizer(init, separable(update), is_elementwise=True)


def apply_kernel(
    kernel: Kernel,
    kinds: Iterable[str],
    grads: Grads,
    opt_state: OptState,
    params: Params,
    *numbers: Number,
    lr: Number,
    step: Number,
    donate: bool,
    uses_step: bool,
    on_reals: bool = True,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Update the parameters that have a gradient.

    With `on_reals`, complex tensors are pairs of real numbers, as in most optimizers of `torch.optim`.
    With `uses_step`, each parameter's step is the number of its own updates, as in `torch.optim`: `opt_state["missed"]`
    counts the steps without a gradient, as () int64 tensors, and holds only the names that ever missed one.
    """
    missed: Mapping[str, Tensor] = opt_state.get("missed", {})
    used = given({name: grads[name] for name in params})
    new_params: dict[str, Tensor] = dict(params)
    new_state: dict[str, dict[str, Tensor]] = {kind: dict(opt_state[kind]) for kind in kinds}
    for own_step, names in _by_step(list(used), missed, step):
        old: dict[str, Tensors] = {kind: [opt_state[kind][name] for name in names] for kind in new_state}
        values, lists = _on_reals(
            *(kernel, [used[name] for name in names], [params[name] for name in names], old, numbers),
            lr=lr,
            step=own_step,
            donate=donate,
            on_reals=on_reals,
        )
        new_params.update(zip(names, values, strict=True))
        for kind, tensors in lists.items():
            new_state[kind].update(zip(names, tensors, strict=True))
    if uses_step and (missed or len(used) < len(params)):
        new_state["missed"] = {**missed}
        for name in params.keys() - used.keys():
            new_state["missed"][name] = missed.get(name, scalar(params[name], 0, torch.int64)) + 1
    return new_params, new_state


def _by_step(names: list[str], missed: Mapping[str, Tensor], step: Number) -> list[tuple[Number, list[str]]]:
    if not missed:
        return [(step, names)] if names else []
    groups: dict[Number, list[str]] = {}  # a tensor is a key of its own
    for name in names:
        groups.setdefault(read_number(missed[name]) if name in missed else 0, []).append(name)
    return [(step - count, group) for count, group in groups.items()]


def _on_reals(
    kernel: Kernel,
    grads: Tensors,
    params: Tensors,
    opt_state: dict[str, Tensors],
    numbers: tuple[Number, ...],
    *,
    lr: Number,
    step: Number,
    donate: bool,
    on_reals: bool,
) -> tuple[Tensors, dict[str, Tensors]]:
    is_complex, old = [on_reals and param.is_complex() for param in params], opt_state
    if any(is_complex):
        grads, params = _as_real(grads), _as_real(params)
        opt_state = {kind: _as_real(tensors) for kind, tensors in opt_state.items()}
    run = arithmetic_for(itertools.chain(params, grads, *opt_state.values()), lr, step, *numbers)
    if isinstance(step, Tensor):
        step = step.to(torch.float64)  # bias corrections lose half their digits in float32
    params, opt_state = kernel(run, grads, params, opt_state, lr, step, donate)
    if any(is_complex):
        params = [torch.view_as_complex(p) if flag else p for p, flag in zip(params, is_complex, strict=True)]
        opt_state = {
            kind: [torch.view_as_complex(t) if o.is_complex() else t for t, o in zip(tensors, old[kind], strict=True)]
            for kind, tensors in opt_state.items()
        }
    return params, opt_state


def _as_real(tensors: Tensors) -> Tensors:
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]


def scalar(like: Tensor, value: float, dtype: torch.dtype) -> Tensor:
    """A () tensor on the device of `like`, one for each member where `like` is mapped by vmap."""
    return like.new_full((), value, dtype=dtype)


def lerp(run: Arithmetic, start: Tensors, end: Tensors, weight: Number, *, reuse: bool = False) -> Tensors:
    """`start + weight * (end - start)`, also for a weight that is a tensor of another dtype."""
    if isinstance(weight, Tensor):
        return run("add", start, run("sub", end, start), alpha=weight)
    return run("lerp", start, end, weight, reuse=reuse)


def is_not_zero(number: Number) -> bool:
    """Whether a term with this factor must be computed."""
    return isinstance(number, Tensor) or number != 0


def check_count(name: str, value: int, *, at_least: int = 1) -> None:
    """Raise ValueError for what is no integer of at least 1."""
    if not hasattr(value, "__index__") or value < at_least:
        raise ValueError(f"Expected {name} of at least {at_least}. Received: {value!r}")


def check_options(**values: Number) -> None:
    """Raise ValueError for a decay rate (a name that starts with "beta" or "alpha") outside [0, 1), or another number
    that is negative or not finite."""
    for name, value in values.items():
        if isinstance(value, Tensor):  # it may stand for many values, or for none yet
            continue
        is_decay_rate = name.startswith(("beta", "alpha"))
        if not (0 <= value < 1 if is_decay_rate else 0 <= value < float("inf")):
            expected = "0 <= value < 1" if is_decay_rate else "a finite value of at least 0"
            raise ValueError(f"Expected {name} with {expected}. Received: {name}={value}")
