"""Optimizers as pairs of pure functions, in the arithmetic of `torch.optim`, to the bit.

The kernels are written out of place on torch's horizontally fused (`_foreach_`) operations, so that an update needs no
copy of the old values, costs a handful of calls whatever the number of tensors, and can be differentiated through.
With `donate=True` the same operations run in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from dwiml_func.state import OptState, Params

__all__ = ["Optimizer", "adam", "adamw", "radam", "sgd"]

Tensors = tuple[Tensor, ...] | list[Tensor]
Kernel = Callable[[Tensors, Tensors, dict[str, Tensors], float, int, bool], tuple[Tensors, dict[str, Tensors]]]
"""(grads, params, moments, lr, step, donate) -> (new params, new moments), all lists in one order of names."""


class Optimizer(NamedTuple):
    """An optimizer: two pure functions.

    Args:
        init: `init(params) -> opt_state`, moments of zeros.
        update: `update(grads, opt_state, params, *, lr, step, donate=False) -> (params, opt_state)`. `step` is the
            number of updates done before this one. With `donate=True` the memory of `opt_state` and `params` is reused.

    Example:
        >>> params = {"w": torch.ones(2)}
        >>> optimizer = sgd()
        >>> params, _ = optimizer.update({"w": torch.ones(2)}, optimizer.init(params), params, lr=0.25, step=0)
        >>> params["w"]
        tensor([0.7500, 0.7500])
    """

    init: Callable[[Params], OptState]
    update: Callable[..., tuple[dict[str, Tensor], OptState]]


def sgd(*, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False) -> Optimizer:
    """Stochastic gradient descent, as `torch.optim.SGD`.

    Args:
        momentum: factor of the running sum of gradients; 0 keeps none.
        weight_decay: L2 penalty, added to the gradient.
        nesterov: look ahead along the momentum (Sutskever et al., 2013).

    Returns:
        The optimizer.

    Raises:
        ValueError: a value out of range, or nesterov without momentum.

    Example:
        >>> sgd(momentum=0.9).init({"w": torch.ones(2)})
        {'momentum_buffer': {'w': tensor([0., 0.])}}
    """
    _check(momentum=momentum, weight_decay=weight_decay)
    if nesterov and momentum == 0:
        raise ValueError("Expected a momentum above 0 with nesterov=True. Received: momentum=0")

    def kernel(grads, params, moments, lr, step, donate):
        if weight_decay:
            grads = torch._foreach_add(grads, params, alpha=weight_decay)
        if momentum:
            buffers = moments["momentum_buffer"]
            if step == 0:  # torch starts from the first gradient; 0 * momentum + grad would turn -0.0 into 0.0
                buffers = torch._foreach_clone(grads)
            else:
                buffers = _foreach("mul", donate, buffers, momentum)
                torch._foreach_add_(buffers, grads)
            moments = {"momentum_buffer": buffers}
            grads = torch._foreach_add(grads, buffers, alpha=momentum) if nesterov else buffers
        return _foreach("add", donate, params, grads, alpha=-lr), moments

    return _optimizer(("momentum_buffer",) if momentum else (), kernel)


def adam(*, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0) -> Optimizer:
    """Adam (Kingma and Ba, 2015, arXiv:1412.6980), as `torch.optim.Adam`.

    Args:
        beta1: decay of the running mean of gradients.
        beta2: decay of the running mean of their squares.
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient.

    Returns:
        The optimizer.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> sorted(adam().init({"w": torch.ones(2)}))
        ['exp_avg', 'exp_avg_sq']
    """
    _check(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    def kernel(grads, params, moments, lr, step, donate):
        if weight_decay:
            grads = torch._foreach_add(grads, params, alpha=weight_decay)
        return _adam_kernel(grads, params, moments, lr, step, donate, beta1, beta2, eps)

    return _optimizer(("exp_avg", "exp_avg_sq"), kernel)


def adamw(*, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019, arXiv:1711.05101), as `torch.optim.AdamW`.

    Args:
        beta1: decay of the running mean of gradients.
        beta2: decay of the running mean of their squares.
        eps: added to the denominator.
        weight_decay: parameters shrink by the factor 1 - lr * weight_decay at each update.

    Returns:
        The optimizer.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> sorted(adamw().init({"w": torch.ones(2)}))
        ['exp_avg', 'exp_avg_sq']
    """
    _check(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    def kernel(grads, params, moments, lr, step, donate):
        if weight_decay:
            params = _foreach("mul", donate, params, 1 - lr * weight_decay)
        return _adam_kernel(grads, params, moments, lr, step, donate, beta1, beta2, eps)

    return _optimizer(("exp_avg", "exp_avg_sq"), kernel)


def radam(*, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0) -> Optimizer:
    """Rectified Adam (Liu et al., 2020, arXiv:1908.03265), as `torch.optim.RAdam`.

    Args:
        beta1: decay of the running mean of gradients.
        beta2: decay of the running mean of their squares.
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient.

    Returns:
        The optimizer.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> sorted(radam().init({"w": torch.ones(2)}))
        ['exp_avg', 'exp_avg_sq']
    """
    _check(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    def kernel(grads, params, moments, lr, step, donate):
        if weight_decay:
            grads = torch._foreach_add(grads, params, alpha=weight_decay)
        means, squares = _update_moments(grads, moments, donate, beta1, beta2)
        count = step + 1
        correction1, correction2 = 1 - beta1**count, 1 - beta2**count
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * count * beta2**count / correction2
        changes = torch._foreach_mul(torch._foreach_div(means, correction1), lr)
        if rho > 5.0:  # the variance of the adaptive rate is tractable: section 3.3 of the paper
            rectify = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
            rates = torch._foreach_reciprocal(torch._foreach_add(torch._foreach_sqrt(squares), eps))
            changes = torch._foreach_mul(changes, torch._foreach_mul(rates, correction2**0.5))
            changes = torch._foreach_mul(changes, rectify)
        params = _foreach("add", donate, params, changes, alpha=-1.0)
        return params, {"exp_avg": means, "exp_avg_sq": squares}

    return _optimizer(("exp_avg", "exp_avg_sq"), kernel)


def _adam_kernel(
    grads: Tensors,
    params: Tensors,
    moments: dict[str, Tensors],
    lr: float,
    step: int,
    donate: bool,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[Tensors, dict[str, Tensors]]:
    means, squares = _update_moments(grads, moments, donate, beta1, beta2)
    step_size = lr / (1 - beta1 ** (step + 1))
    roots = torch._foreach_div(torch._foreach_sqrt(squares), (1 - beta2 ** (step + 1)) ** 0.5)
    torch._foreach_add_(roots, eps)
    params = _foreach("addcdiv", donate, params, means, roots, value=-step_size)
    return params, {"exp_avg": means, "exp_avg_sq": squares}


def _update_moments(
    grads: Tensors, moments: dict[str, Tensors], donate: bool, beta1: float, beta2: float
) -> tuple[Tensors, Tensors]:
    means = _foreach("lerp", donate, moments["exp_avg"], grads, 1 - beta1)
    squares = _foreach("mul", donate, moments["exp_avg_sq"], beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    return means, squares


def _foreach(name: str, donate: bool, tensors: Tensors, *args: object, **kwargs: object) -> Tensors:
    """Run a `_foreach_` operation: in place on donated memory, out of place otherwise."""
    if donate:
        getattr(torch, f"_foreach_{name}_")(tensors, *args, **kwargs)
        return tensors
    return getattr(torch, f"_foreach_{name}")(tensors, *args, **kwargs)


def _optimizer(kinds: Iterable[str], kernel: Kernel) -> Optimizer:
    kinds = tuple(kinds)

    def init(params: Params) -> OptState:
        return {kind: {name: torch.zeros_like(p) for name, p in params.items()} for kind in kinds}

    def update(
        grads: Params, opt_state: OptState, params: Params, *, lr: float, step: int, donate: bool = False
    ) -> tuple[dict[str, Tensor], OptState]:
        names = list(params)
        moments: dict[str, Tensors] = {kind: [opt_state[kind][name] for name in names] for kind in kinds}
        ordered = [grads[name] for name in names]
        values, moments = kernel(ordered, [params[name] for name in names], moments, lr, step, donate)
        new_state = {kind: dict(zip(names, moments[kind], strict=True)) for kind in kinds}
        return dict(zip(names, values, strict=True)), new_state

    return Optimizer(init, update)


def _check(**values: float) -> None:
    for name, value in values.items():
        is_decay_rate = name in ("beta1", "beta2")
        if not (0 <= value < 1 if is_decay_rate else 0 <= value < float("inf")):
            expected = "0 <= value < 1" if is_decay_rate else "a finite value of at least 0"
            raise ValueError(f"Expected {name} with {expected}. Received: {name}={value}")
