"""Composition: transformations of gradients in a row, and the optimizer that writes the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dwiml_func._checks import truncated_repr
from dwiml_func._trees import choose
from dwiml_func.optim.in_place import can_update_in_place, commit, is_separable, transform_in_place, update_in_place
from dwiml_func.types import Gate, Grads, Number, Optimizer, OptState, Params, Transform

__all__ = [
    "chain",
    "check_optimizer",
    "resolve_optimizer",
    "update_gated",
    "update_where",
    "update_with",
    "without_gate",
]


def chain(*links: Transform | Optimizer) -> Optimizer:
    """Transform gradients in the order of the links, then update the parameters.

    Args:
        *links: transformations, and an optimizer as the last link. It may itself be a chain.

    Returns:
        An optimizer. Its state is `{"0": ..., "1": ..., "optimizer": ...}`: the state of each link that has any. A
        link that closes its gate (see `dwiml_func.types.Gate`) ends the step there: later links keep their states, and
        the parameters stay as they are.

    Raises:
        TypeError: the last link is not an optimizer, or an earlier one is not a transformation.

    Example:
        >>> import torch
        >>> from dwiml_func.optim import accumulate, adam, clip_by_global_norm
        >>> optimizer = chain(accumulate(2), clip_by_global_norm(1.0), adam())
        >>> params = {"w": torch.ones(2)}
        >>> state = optimizer.init(params)
        >>> sorted(state)
        ['0', 'optimizer']
        >>> for step in range(2):
        ...     params, state = optimizer.update({"w": torch.ones(2)}, state, params, lr=0.5, step=step)
        ...     print(params["w"])
        tensor([1., 1.])
        tensor([0.5000, 0.5000])
    """
    if not links:
        raise TypeError("Expected an optimizer as the last link of a chain. Received: no links")
    optimizer = check_optimizer("as the last link of a chain", links[-1])
    transforms: dict[str, Transform] = {}
    for number, link in enumerate(links[:-1]):
        if not isinstance(link, Transform):
            raise TypeError(
                f"Expected transformations before the last link of a chain. Received: {truncated_repr(link)} as link "
                f"{number + 1} of {len(links)}. An optimizer can only be the last link."
            )
        transforms[str(number)] = link
    are_ours = is_separable(optimizer) and all(hasattr(link.update, "start") for link in transforms.values())

    def init(params: Params) -> OptState:
        states = {key: link.init(params) for key, link in {**transforms, "optimizer": optimizer}.items()}
        return {key: state for key, state in states.items() if state}

    def gated(
        grads: Any,
        opt_state: OptState,
        params: Params,
        *,
        lr: Number,
        step: Any,
        donate: bool = False,
        weight: Number = 1,
        keep_old: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], OptState, Gate]:
        new_state = dict(opt_state)
        is_closed: bool | Tensor = False

        def store(key: str, state: OptState) -> None:
            if state:
                new_state[key] = choose(is_closed, opt_state.get(key, {}), state)

        for key, link in transforms.items():
            reuse = donate and is_closed is False
            options = {"lr": lr, "step": step, "weight": weight, "donate": reuse}
            own = opt_state.get(key, {})
            if keep_old is not None and are_ours:
                state, gates = transform_in_place(link, grads, own, params, keep_old=keep_old | is_closed, **options)
            else:
                grads, state, *gates = link.update(grads, own, params, **options)
            store(key, state)
            for gate in gates:
                if isinstance(gate.is_open, Tensor):
                    is_closed = ~gate.is_open | is_closed
                elif not gate.is_open:
                    return dict(params), new_state, gate._replace(is_open=False)
                step, weight = gate.step, gate.weight
        new_params, state, gate = update_gated(
            *(optimizer, grads, opt_state.get("optimizer", {}), params),
            lr=lr,
            step=step,
            donate=donate and is_closed is False,
            weight=weight,
            keep_old=None if keep_old is None else keep_old | is_closed,
        )
        store("optimizer", state)
        if is_closed is False:
            return new_params, new_state, gate
        return choose(is_closed, params, new_params), new_state, gate._replace(is_open=~is_closed & gate.is_open)

    def eval_params(opt_state: OptState, params: Params) -> Params:
        assert optimizer.eval_params is not None
        return optimizer.eval_params(opt_state.get("optimizer", {}), params)

    average = eval_params if optimizer.eval_params else None
    return Optimizer(init, without_gate(gated), average, uses_weight=True)


def check_optimizer(where: str, optimizer: Any) -> Optimizer:
    """The optimizer, if it is one, and not its factory or one of torch.optim."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"Expected an optimizer {where}, such as adam(). Received: {truncated_repr(optimizer)}. Those of "
            f"torch.optim are functions of dwiml_func.optim; call them, as in adam()."
        )
    return optimizer


def resolve_optimizer(optimizer: Optimizer | Callable[..., Optimizer], weight_decay: Number | None) -> Optimizer:
    """The optimizer of a step: as it is given, or with the weight decay of the step, from its factory."""
    if weight_decay is None:
        if not isinstance(optimizer, Optimizer):
            received = truncated_repr(optimizer)
            raise TypeError(
                f"Expected an optimizer, such as adamw(), or its factory and weight_decay. Received: {received}"
            )
        return optimizer
    if isinstance(optimizer, Optimizer):
        raise ValueError("weight_decay requires an optimizer factory, such as dwiml_func.adam.")
    return optimizer(weight_decay=weight_decay)


def update_with(
    optimizer: Optimizer,
    grads: Grads,
    opt_state: OptState,
    params: Params,
    *,
    lr: Number,
    step: Number,
    donate: bool,
    weight: Number,
) -> tuple[dict[str, Tensor], OptState]:
    """Call `optimizer.update`, with `weight` where it takes one."""
    further = {"weight": weight} if optimizer.uses_weight else {}
    return optimizer.update(grads, opt_state, params, lr=lr, step=step, donate=donate, **further)


def update_where(
    optimizer: Optimizer,
    grads: Grads,
    opt_state: OptState,
    params: Params,
    *,
    keep_old: Tensor,
    lr: Number,
    step: Number,
    weight: Number,
) -> tuple[dict[str, Tensor], OptState]:
    """What `choose(keep_old, old, update_with(...))` gives, in the memory of the old tensors where that is possible.

    `grads` is a dict that the caller does not need again: its tensors may be replaced.
    """
    options = {"lr": lr, "step": step, "weight": weight, "donate": False, "keep_old": keep_old}
    new_params, new_state, _ = update_gated(optimizer, grads, opt_state, params, **options)
    old, new = {"params": params, "opt_state": opt_state}, {"params": new_params, "opt_state": new_state}
    chosen = commit(keep_old, old, new)
    return chosen["params"], chosen["opt_state"]


def update_gated(
    optimizer: Optimizer,
    grads: Grads,
    opt_state: OptState,
    params: Params,
    *,
    keep_old: Tensor | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], OptState, Gate]:
    """`update_with`, and which of the steps the optimizer takes.

    With `keep_old`, a () bool tensor, `update_in_place` where it can be: the result must then be given to `commit`, and
    `grads`, a dict, may be used up.
    """
    if keep_old is not None and can_update_in_place(optimizer, opt_state):
        rates = {name: options[name] for name in ("lr", "step")}
        new = update_in_place(optimizer, grads, opt_state, params, keep_old=keep_old, **rates)
        return *new, Gate(True, options["step"], options["weight"])
    if (gated := getattr(optimizer.update, "gated", None)) is not None:
        further = {} if keep_old is None else {"keep_old": keep_old}
        return gated(grads, opt_state, params, **further, **options)
    weight = options["weight"] if optimizer.uses_weight else options.pop("weight")
    return *optimizer.update(grads, opt_state, params, **options), Gate(True, options["step"], weight)


def without_gate(function: Callable[..., Any], gated: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """An optimizer's `update`, from a function that returns a gate too; `gated` is that function, or another.

    It goes with the function and not with the optimizer, of which a user may replace the update.
    """

    def update(*args: Any, **options: Any) -> tuple[dict[str, Tensor], OptState]:
        return function(*args, **options)[:2]

    update.gated = gated or function  # type: ignore[attr-defined]
    return update
