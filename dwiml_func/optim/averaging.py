"""Optimizers that keep a second, slower copy of the parameters: moving average and lookahead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dwiml_func.optim._foreach import arithmetic_for
from dwiml_func.optim._kernel import check_count, lerp
from dwiml_func.optim.chain import check_optimizer
from dwiml_func.types import Grads, Number, Optimizer, OptState, Params

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
        starts from the parameters of that moment. It averages what `optimizer` itself would evaluate with.

    Raises:
        ValueError: `decay` is not in [0, 1).

    Note:
        Accumulation belongs outside, `chain(accumulate(4), ema(adam(), 0.999))`: else micro-batches count as updates.

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

    def update(
        grads: Grads,
        opt_state: OptState,
        params: Params,
        *,
        lr: Number,
        step: Any,
        donate: bool = False,
        **further: Any,
    ) -> tuple[dict[str, Tensor], OptState]:
        new_params, state = optimizer.update(
            grads, opt_state.get("optimizer", {}), params, lr=lr, step=step, donate=donate, **further
        )
        current = new_params if optimizer.eval_params is None else optimizer.eval_params(state, new_params)
        new, old = [current[name] for name in params], [opt_state["average"][name] for name in params]
        count = step.to(torch.float64) + 1 if isinstance(step, Tensor) else step + 1
        share = (1 - decay) / (1 - decay**count)
        average = lerp(arithmetic_for([*new, *old], share), old, new, share, reuse=donate)
        return new_params, {"average": dict(zip(params, average, strict=True)), **_inner_state(state)}

    return Optimizer(init, update, lambda opt_state, params: opt_state["average"], optimizer.uses_weight)


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

    def update(
        grads: Grads,
        opt_state: OptState,
        params: Params,
        *,
        lr: Number,
        step: Any,
        donate: bool = False,
        **further: Any,
    ) -> tuple[dict[str, Tensor], OptState]:
        fast, state = optimizer.update(
            grads, opt_state.get("optimizer", {}), params, lr=lr, step=step, donate=donate, **further
        )
        slow = opt_state["slow"]
        restarts = (step + 1) % num_steps == 0
        if isinstance(restarts, Tensor) or restarts:
            new, old = [fast[name] for name in params], [slow[name] for name in params]
            stepped = lerp(arithmetic_for([*new, *old]), old, new, alpha, reuse=donate and restarts is True)
            if isinstance(restarts, Tensor):
                stepped = [torch.where(restarts, s, o) for s, o in zip(stepped, old, strict=True)]
                new = [torch.where(restarts, s, n) for s, n in zip(stepped, new, strict=True)]
            else:
                new = [s.clone() for s in stepped]  # memory of their own: donated updates write into it
            slow, fast = dict(zip(params, stepped, strict=True)), dict(zip(params, new, strict=True))
        return fast, {"slow": slow, **_inner_state(state)}

    return Optimizer(init, update, lambda opt_state, params: opt_state["slow"], optimizer.uses_weight)


def _inner_state(state: OptState) -> OptState:
    return {"optimizer": state} if state else {}
