"""Optimizers that keep a second, slower copy of the parameters: moving average and lookahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dwiml_func._trees import choose
from dwiml_func.optim._foreach import arithmetic_for
from dwiml_func.optim._kernel import check_count, lerp
from dwiml_func.optim.chain import check_optimizer, update_gated, without_gate
from dwiml_func.optim.in_place import separable
from dwiml_func.types import Gate, Grads, Number, Optimizer, OptState, Params

__all__ = ["ema", "lookahead"]


def ema(optimizer: Optimizer, decay: float = 0.999) -> Optimizer:
    """Keep an exponential moving average of the parameters, to evaluate with.

    Args:
        optimizer: updates the parameters, which the average does not change.
        decay: weight of the old average in the new one.

    Returns:
        An optimizer. Its state is `{"average": ..., "optimizer": ...}`, and `eval_params` gives the average. The start
        does not count: as in Adam, the average is corrected for its bias, so that update i of n has the weight
        decay ** (n - i) * (1 - decay) / (1 - decay ** n). An average that starts later in a run (`step` is not 0)
        starts from the parameters of that moment. Steps that a link of `optimizer` leaves out, such as the
        micro-batches of `accumulate`, do not count. It averages what `optimizer` itself would evaluate with.

    Raises:
        ValueError: `decay` is not in [0, 1).

    Example:
        >>> from dwiml_func.optim import sgd
        >>> optimizer = ema(sgd(), 0.5)
        >>> params = {"w": torch.zeros(1)}
        >>> state = optimizer.init(params)
        >>> for step in range(2):
        ...     params, state = optimizer.update({"w": -torch.ones(1)}, state, params, lr=1.0, step=step)
        >>> params["w"], optimizer.eval_params(state, params)["w"]  # (0.25 * 1 + 0.5 * 2) / 0.75
        (tensor([2.]), tensor([1.6667]))
    """
    check_optimizer("within ema", optimizer)
    if not 0 <= decay < 1:
        raise ValueError(f"Expected decay with 0 <= value < 1. Received: decay={decay}")

    def init(params: Params) -> OptState:
        return {"average": {name: p.clone() for name, p in params.items()}, **_inner_state(optimizer.init(params))}

    def gated(
        grads: Grads, opt_state: OptState, params: Params, *, donate: bool = False, weight: Number = 1, **options: Any
    ) -> tuple[dict[str, Tensor], OptState, Gate]:
        new_params, state, gate = update_gated(
            *(optimizer, grads, opt_state.get("optimizer", {}), params), donate=donate, weight=weight, **options
        )
        if gate.is_open is False:
            return new_params, {"average": opt_state["average"], **_inner_state(state)}, gate
        current = new_params if optimizer.eval_params is None else optimizer.eval_params(state, new_params)
        new, old = [current[name] for name in params], [opt_state["average"][name] for name in params]
        count = gate.step.to(torch.float64) + 1 if isinstance(gate.step, Tensor) else gate.step + 1
        share = (1 - decay) / (1 - decay**count)
        average = lerp(arithmetic_for([*new, *old], share), old, new, share, reuse=donate and gate.is_open is True)
        averages = choose(gate.is_open, dict(zip(params, average, strict=True)), opt_state["average"])
        return new_params, {"average": averages, **_inner_state(state)}, gate

    return _optimizer(init, gated, "average", optimizer)


def lookahead(optimizer: Optimizer, num_steps: int = 5, alpha: float = 0.5) -> Optimizer:
    """Lookahead (Zhang et al., 2019, arXiv:1907.08610): k steps forward, one step back.

    Args:
        optimizer: updates the fast weights, which are the parameters.
        num_steps: updates of the fast weights between two of the slow weights; k in the paper.
        alpha: step of the slow weights towards the fast ones, which then restart from the slow ones.

    Returns:
        An optimizer. Its state is `{"slow": ..., "optimizer": ...}`, and `eval_params` gives the slow weights. The
        state of `optimizer` goes through a restart unchanged.

    Raises:
        ValueError: `num_steps` is below 1, `alpha` is not in (0, 1], or `optimizer` has an `eval_params` of its own.

    Example:
        >>> from dwiml_func.optim import sgd
        >>> optimizer = lookahead(sgd(), num_steps=2, alpha=0.5)
        >>> params = {"w": torch.zeros(1)}
        >>> state = optimizer.init(params)
        >>> for step in range(2):
        ...     params, state = optimizer.update({"w": -torch.ones(1)}, state, params, lr=1.0, step=step)
        ...     print(params["w"])
        tensor([1.])
        tensor([1.])
    """
    check_optimizer("within lookahead", optimizer)
    check_count("num_steps", num_steps)
    if not 0 < alpha <= 1:
        raise ValueError(f"Expected alpha with 0 < alpha <= 1. Received: alpha={alpha}")
    if optimizer.eval_params is not None:
        raise ValueError(
            "Expected an optimizer that evaluates with its parameters inside lookahead, which restarts them. Received: "
            "one that has an average of its own. Use ema(lookahead(...)) for both."
        )

    def init(params: Params) -> OptState:
        return {"slow": {name: p.clone() for name, p in params.items()}, **_inner_state(optimizer.init(params))}

    def gated(
        grads: Grads, opt_state: OptState, params: Params, *, donate: bool = False, weight: Number = 1, **options: Any
    ) -> tuple[dict[str, Tensor], OptState, Gate]:
        fast, state, gate = update_gated(
            *(optimizer, grads, opt_state.get("optimizer", {}), params), donate=donate, weight=weight, **options
        )
        slow = opt_state["slow"]
        restarts: bool | Tensor = gate.is_open & ((gate.step + 1) % num_steps == 0)
        if isinstance(restarts, Tensor) or restarts:
            new, old = [fast[name] for name in params], [slow[name] for name in params]
            stepped = lerp(arithmetic_for([*new, *old]), old, new, alpha, reuse=donate and restarts is True)
            if isinstance(restarts, Tensor):
                stepped = [torch.where(restarts, s, o) for s, o in zip(stepped, old, strict=True)]
                new = [torch.where(restarts, s, n) for s, n in zip(stepped, new, strict=True)]
            else:
                new = [s.clone() for s in stepped]  # memory of their own: donated updates write into it
            slow, fast = dict(zip(params, stepped, strict=True)), dict(zip(params, new, strict=True))
        return fast, {"slow": slow, **_inner_state(state)}, gate

    return _optimizer(init, gated, "slow", optimizer)


def _optimizer(init: Callable[[Params], OptState], gated: Callable[..., Any], kind: str, inner: Optimizer) -> Optimizer:
    update = separable(without_gate(gated), inner)
    return Optimizer(init, update, lambda opt_state, _: opt_state[kind], inner.uses_weight)


def _inner_state(state: OptState) -> OptState:
    return {"optimizer": state} if state else {}
