"""Schedule-free optimizers (Defazio et al., 2024, arXiv:2405.15682): an average takes the place of a schedule.

In the paper's names: gradients are taken at y = (1 - beta) z + beta x, the gradient steps move z, and x is the average
of all z, to evaluate with. The parameters are y, the state holds z, and x follows from both. As in the authors'
`schedulefree` package, a step has the weight max(lr so far) ** 2 in the average, so that warm-up steps count less.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dwiml_func._transforms import read_number
from dwiml_func.optim._foreach import arithmetic_for
from dwiml_func.optim._kernel import Kernel, apply_kernel, check_options, is_not_zero, lerp, scalar
from dwiml_func.optim.in_place import separable
from dwiml_func.types import Grads, Number, Optimizer, OptState, Params

__all__ = ["schedule_free_adamw", "schedule_free_sgd"]


def schedule_free_sgd(*, momentum: float = 0.9, weight_decay: Number = 0.0) -> Optimizer:
    """Schedule-free stochastic gradient descent (Defazio et al., 2024, arXiv:2405.15682).

    Args:
        momentum: weight of the average x in the point where gradients are taken; beta in the paper.
        weight_decay: L2 penalty, added to the gradient.

    Returns:
        An optimizer, for a constant learning rate or a warm-up. Evaluate with its `eval_params`, the average x.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> params, optimizer = {"w": torch.ones(1)}, schedule_free_sgd()
        >>> state = optimizer.init(params)
        >>> for step in range(2):
        ...     params, state = optimizer.update({"w": torch.ones(1)}, state, params, lr=0.5, step=step)
        >>> params["w"], optimizer.eval_params(state, params)["w"]  # z is 0.5, then 0: their mean is x
        (tensor([0.2250]), tensor([0.2500]))
    """
    check_options(weight_decay=weight_decay)

    def kernel(run, grads, params, opt_state, lr, step, donate, *, share):
        return _move(run, grads, params, opt_state["z"], lr, donate, share, momentum, weight_decay)

    return _schedule_free(("z",), kernel, "momentum", momentum, weight_decay)


def schedule_free_adamw(
    *, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: Number = 0.0
) -> Optimizer:
    """Schedule-free AdamW (Defazio et al., 2024, arXiv:2405.15682, algorithm 1).

    Args:
        beta1: weight of the average x in the point where gradients are taken.
        beta2: decay of the running mean of squared gradients.
        eps: added to the denominator.
        weight_decay: decay towards zero, decoupled from the gradient's scale and taken at the parameters y.

    Returns:
        An optimizer, for a constant learning rate or a warm-up. Evaluate with its `eval_params`, the average x.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> sorted(schedule_free_adamw().init({"w": torch.ones(2)}))
        ['exp_avg_sq', 'lr_max', 'weight_sum', 'z']
    """
    check_options(beta2=beta2, eps=eps, weight_decay=weight_decay)

    def kernel(run, grads, params, opt_state, lr, step, donate, *, share):
        squares = run("mul", opt_state["exp_avg_sq"], beta2, reuse=donate)
        squares = run("addcmul", squares, grads, grads, 1 - beta2, reuse=True)
        roots = run("sqrt", run("div", squares, 1 - beta2 ** (step + 1)))
        directions = run("div", grads, run("add", roots, eps, reuse=True))
        params, state = _move(run, directions, params, opt_state["z"], lr, donate, share, beta1, weight_decay)
        return params, {**state, "exp_avg_sq": squares}

    return _schedule_free(("z", "exp_avg_sq"), kernel, "beta1", beta1, weight_decay)


def _move(run, directions, params, z, lr, donate, share, beta, weight_decay):
    if is_not_zero(weight_decay):
        directions = run("add", directions, params, alpha=weight_decay)
    params = lerp(run, params, z, share, reuse=donate)
    params = run("add", params, directions, alpha=lr * (beta * (1 - share) - 1), reuse=True)
    return params, {"z": run("add", z, directions, alpha=-lr, reuse=donate)}


def _schedule_free(
    kinds: tuple[str, ...], kernel: Callable[..., Any], name: str, beta: float, weight_decay: Number
) -> Optimizer:
    if not 0 < beta < 1:  # at 0, the average could not be found again from y and z
        raise ValueError(f"Expected {name} with 0 < value < 1. Received: {name}={beta}")

    def init(params: Params) -> OptState:
        start = {"z": torch.clone, "exp_avg_sq": torch.zeros_like}
        state: dict[str, Any] = {kind: {name: start[kind](p) for name, p in params.items()} for kind in kinds}
        like = next(iter(params.values()))
        return state | {number: scalar(like, 0.0, torch.float64) for number in ("lr_max", "weight_sum")}

    def update(
        grads: Grads, opt_state: OptState, params: Params, *, lr: Number, step: Number, donate: bool = False
    ) -> tuple[dict[str, Tensor], OptState]:
        old_max, old_sum = read_number(opt_state["lr_max"]), read_number(opt_state["weight_sum"])
        if isinstance(lr, Tensor) or isinstance(old_max, Tensor):
            like = opt_state["lr_max"]  # a number is not copied to the device, which would wait
            now, before = (x.to(like) if isinstance(x, Tensor) else like.new_full((), x) for x in (lr, old_max))
            lr_max = torch.maximum(now, before)
            weight_sum = opt_state["weight_sum"] + lr_max**2
            share = torch.where(weight_sum > 0, lr_max**2 / torch.where(weight_sum > 0, weight_sum, 1.0), 0.0)
        else:
            lr_max = max(lr, old_max)
            weight_sum = old_sum + lr_max**2
            share = lr_max**2 / weight_sum if weight_sum else 0.0
        bound: Kernel = functools.partial(kernel, share=share)
        new_params, new_state = apply_kernel(
            *(bound, kinds, grads, opt_state, params, weight_decay, share),
            lr=lr,
            step=step,
            donate=donate,
            uses_step=False,
        )
        numbers = {"lr_max": lr_max, "weight_sum": weight_sum}
        return new_params, new_state | {
            name: number if isinstance(number, Tensor) else torch.full_like(opt_state[name], number)
            for name, number in numbers.items()
        }

    def eval_params(opt_state: OptState, params: Params) -> Params:
        y, z = list(params.values()), [opt_state["z"][name] for name in params]
        return dict(zip(params, arithmetic_for([*y, *z])("lerp", y, z, 1 - 1 / beta), strict=True))

    return Optimizer(init, separable(update), eval_params)
