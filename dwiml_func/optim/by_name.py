"""Options of an optimizer by parameter name: groups, masks and frozen parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from dwiml_func._checks import truncated_repr
from dwiml_func.optim._kernel import check_options
from dwiml_func.optim.chain import update_gated, without_gate
from dwiml_func.optim.in_place import separable
from dwiml_func.optim.name_patterns import check_patterns, first_matches
from dwiml_func.types import Gate, Grads, Number, Optimizer, OptState, Params

__all__ = ["by_name"]


class _Group(NamedTuple):
    key: str
    optimizer: Optimizer
    lr_factor: Number | None


def by_name(
    make: Callable[..., Optimizer], options: Mapping[str, Mapping[str, Any] | None], **defaults: Any
) -> Optimizer:
    """Give some parameters other options than the rest, as the param groups of `torch.optim`.

    Args:
        make: makes an optimizer from options, such as `adamw`.
        options: options by pattern. A pattern is alternatives joined by `|`, each with the wildcards `*`, `?` and
            `[...]`; `*` also matches dots. The first pattern that matches a parameter's name counts. Options are the
            keyword arguments of `make`, and `lr`: a FACTOR of the learning rate of the step, so that schedules act on
            all groups. None freezes the parameters: they have no optimizer state and stay the same tensors. (Their
            gradients still count in the norm of a `clip_by_global_norm` before; `requires_grad_(False)` on the
            module's parameter avoids that, and computes no gradient.)
        **defaults: options of all parameters, which a pattern's own options replace. They may include `lr`.

    Returns:
        An optimizer. Its state is a dict of each group's state: `"0"` for the first pattern, `"1"` for the second, and
        `"defaults"` for the parameters that no pattern matches.

    Raises:
        TypeError: `make` does not know an option, or options are neither a mapping nor None.
        ValueError: a value is out of range; at `init`, a pattern matches no parameter, or all are frozen.

    Example:
        >>> import torch
        >>> from dwiml_func.optim import adamw
        >>> groups = {"*.bias|*norm*": dict(weight_decay=0), "getter.*": dict(lr=0.1), "encoder.*": None}
        >>> optimizer = by_name(adamw, groups, weight_decay=0.1)
        >>> params = {name: torch.ones(1) for name in ("rnn.weight", "rnn.bias", "getter.weight", "encoder.weight")}
        >>> grads = {name: torch.zeros(1) for name in params}
        >>> params, state = optimizer.update(grads, optimizer.init(params), params, lr=0.5, step=0)
        >>> {name: round(float(tensor), 4) for name, tensor in params.items()}
        {'rnn.weight': 0.95, 'rnn.bias': 1.0, 'getter.weight': 0.995, 'encoder.weight': 1.0}
        >>> sorted(state)
        ['0', '1', 'defaults']
    """
    if not isinstance(options, Mapping) or not callable(make):
        raise TypeError(
            f"Expected a function that makes an optimizer, and options by pattern, as in "
            f"by_name(adamw, {{'*.bias': dict(weight_decay=0)}}). Received: "
            f"{truncated_repr(options if callable(make) else make)}"
        )
    patterns = tuple(options)
    groups: list[_Group | None] = []
    for number, (pattern, own) in enumerate(options.items()):
        if not (own is None or isinstance(own, Mapping)):
            raise TypeError(
                f"Expected a dict of options for the pattern {pattern!r}, or None to freeze its parameters. "
                f"Received: {truncated_repr(own)}"
            )
        groups.append(None if own is None else _group(str(number), make, {**defaults, **own}))
    groups.append(_group("defaults", make, defaults))

    def split(params: Params) -> list[tuple[_Group, dict[str, Tensor]]]:
        parts: list[dict[str, Tensor]] = [{} for _ in groups]
        for name, number in zip(params, first_matches(patterns, tuple(params)), strict=True):
            parts[-1 if number is None else number][name] = params[name]
        return [(group, part) for group, part in zip(groups, parts, strict=True) if group is not None and part]

    def init(params: Params) -> OptState:
        check_patterns(patterns, params)
        if params and not split(params):
            raise ValueError("Expected a parameter that is trained. Received: patterns that freeze all of them.")
        states = {group.key: group.optimizer.init(part) for group, part in split(params)}
        return {key: state for key, state in states.items() if state}

    def update_all(
        grads: Grads,
        opt_state: OptState,
        params: Params,
        *,
        lr: Number,
        weight: Number = 1,
        **options: Any,
    ) -> tuple[dict[str, Tensor], OptState, list[Gate]]:
        new_params, new_state = dict(params), dict(opt_state)
        gates: list[Gate] = []
        for (key, optimizer, factor), part in split(params):
            own_lr = lr if factor is None else lr * factor
            own = optimizer, dict(grads), opt_state.get(key, {}), part  # a group may use its gradients up
            updated, state, gate = update_gated(*own, lr=own_lr, weight=weight, **options)
            new_params.update(updated)
            gates.append(gate)
            if state:
                new_state[key] = state
        return new_params, new_state, gates

    def gated(*args: Any, **options: Any) -> tuple[dict[str, Tensor], OptState, Gate]:
        new_params, new_state, gates = update_all(*args, **options)
        return new_params, new_state, _together(gates) if gates else Gate(True, options["step"], options["weight"])

    def eval_params(opt_state: OptState, params: Params) -> Params:
        averaged = dict(params)
        for (key, optimizer, _), part in split(params):
            if optimizer.eval_params is not None:
                averaged.update(optimizer.eval_params(opt_state.get(key, {}), part))
        return averaged

    optimizers = [group.optimizer for group in groups if group is not None]
    return Optimizer(
        init,
        separable(without_gate(update_all, gated), *optimizers),
        eval_params if any(optimizer.eval_params for optimizer in optimizers) else None,
        any(optimizer.uses_weight for optimizer in optimizers),
    )


def _together(gates: list[Gate]) -> Gate:
    """The gate of all groups, for an average of all: they must take the same steps."""
    first, *others = gates
    for gate in others:
        if gate.is_open is not first.is_open or gate.step is not first.step:
            break
    else:
        return first
    if any(isinstance(value, Tensor) for gate in gates for value in gate) or len({gate[:2] for gate in gates}) > 1:
        raise ValueError(
            "Expected groups that take the same steps. Received: groups with an accumulate or a skip_not_finite each. "
            "Put it around, as in chain(accumulate(4), ema(by_name(adam, ...)))."
        )
    return first


def _group(key: str, make: Callable[..., Optimizer], options: Mapping[str, Any]) -> _Group:
    options = dict(options)
    lr_factor = options.pop("lr", None)
    if lr_factor is not None:
        check_options(lr=lr_factor)
    return _Group(key, make(**options), lr_factor)
