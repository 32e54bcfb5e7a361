"""Optimizers as pairs of pure functions, bitwise identical to `torch.optim` where it has them.

Each formula is written once, on lists of tensors: `_foreach.arithmetic_for` chooses torch's fused operations, in place
on donated memory, or one operation a tensor where the update is differentiated, mapped or compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwiml_func._transforms import read_number
from dwiml_func.optim._foreach import Arithmetic, Tensors, arithmetic_for
from dwiml_func.optim._kernel import check_options, is_not_zero, lerp, optimizer_from_kernel, scalar
from dwiml_func.types import Number, Optimizer

__all__ = ["adam", "adamw", "lion", "nadam", "radam", "rmsprop", "sgd"]

ADAM_STATE = {"exp_avg": torch.zeros_like, "exp_avg_sq": torch.zeros_like}


def sgd(*, momentum: float = 0.0, weight_decay: Number = 0.0, nesterov: bool = False) -> Optimizer:
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
    check_options(momentum=momentum, weight_decay=weight_decay)
    if nesterov and momentum == 0:
        raise ValueError("Expected a momentum above 0 with nesterov=True. Received: momentum=0")

    def kernel(run, grads, params, opt_state, lr, step, donate):
        if is_not_zero(weight_decay):
            grads = run("add", grads, params, alpha=weight_decay)
        if momentum:
            # torch starts from the first gradient; 0 * momentum + grad would turn -0.0 into 0.0
            is_first, old = step == 0, opt_state["momentum_buffer"]
            buffers: Tensors
            if isinstance(is_first, Tensor):
                running = run("add", run("mul", old, momentum), grads)
                buffers = [torch.where(is_first, grad, sum_) for grad, sum_ in zip(grads, running, strict=True)]
            elif is_first:
                buffers = [grad.clone() for grad in grads]
            else:
                buffers = run("add", run("mul", old, momentum, reuse=donate), grads, reuse=True)
            opt_state = {"momentum_buffer": buffers}
            grads = run("add", grads, buffers, alpha=momentum) if nesterov else buffers
        return run("add", params, grads, alpha=-lr, reuse=donate), opt_state

    kinds = {"momentum_buffer": torch.zeros_like} if momentum else {}
    return optimizer_from_kernel(kernel, kinds, weight_decay, uses_step=momentum != 0, on_reals=False)


def adam(*, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: Number = 0.0) -> Optimizer:
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
    return _adam(beta1, beta2, eps, weight_decay, is_decoupled=False)


def adamw(*, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: Number = 0.01) -> Optimizer:
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
    return _adam(beta1, beta2, eps, weight_decay, is_decoupled=True)


def radam(*, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: Number = 0.0) -> Optimizer:
    """Rectified Adam (Liu et al., 2020, arXiv:1908.03265), as `torch.optim.RAdam` with `foreach=False`.

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
    check_options(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    def kernel(run, grads, params, opt_state, lr, step, donate):
        if is_not_zero(weight_decay):
            grads = run("add", grads, params, alpha=weight_decay)
        means, squares = update_averages(run, grads, opt_state, donate, beta1, beta2)
        count = step + 1
        correction1, correction2 = 1 - beta1**count, 1 - beta2**count
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * count * beta2**count / correction2
        changes = run("mul", run("div", means, correction1), lr)
        adapts = rho > 5.0  # the variance of the adaptive rate is tractable: section 3.3 of the paper
        if isinstance(adapts, Tensor):
            rho = torch.where(adapts, rho, 6.0)  # keeps the square root below real
        if isinstance(adapts, Tensor) or adapts:
            rectify = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
            rates = run("reciprocal", run("add", run("sqrt", squares), eps))
            adapted = run("mul", run("mul", changes, run("mul", rates, correction2**0.5)), rectify)
            if isinstance(adapts, Tensor):
                adapted = [torch.where(adapts, new, old) for new, old in zip(adapted, changes, strict=True)]
            changes = adapted
        params = run("add", params, changes, alpha=-1.0, reuse=donate)
        return params, {"exp_avg": means, "exp_avg_sq": squares}

    return optimizer_from_kernel(kernel, ADAM_STATE, weight_decay, uses_step=True)


def _adam(beta1: float, beta2: float, eps: float, weight_decay: Number, *, is_decoupled: bool) -> Optimizer:
    check_options(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    def kernel(run, grads, params, opt_state, lr, step, donate):
        if is_not_zero(weight_decay) and is_decoupled:
            params = run("mul", params, 1 - lr * weight_decay, reuse=donate)
        elif is_not_zero(weight_decay):
            grads = run("add", grads, params, alpha=weight_decay)
        means, squares = update_averages(run, grads, opt_state, donate, beta1, beta2)
        step_size = lr / (1 - beta1 ** (step + 1))
        roots = run("div", run("sqrt", squares), (1 - beta2 ** (step + 1)) ** 0.5)
        roots = run("add", roots, eps, reuse=True)
        params = run("addcdiv", params, means, roots, value=-step_size, reuse=donate)
        return params, {"exp_avg": means, "exp_avg_sq": squares}

    return optimizer_from_kernel(kernel, ADAM_STATE, weight_decay, uses_step=True)


def update_averages(
    run: Arithmetic, grads: Tensors, opt_state: dict[str, Tensors], donate: bool, beta1: float, beta2: float
) -> tuple[Tensors, Tensors]:
    means = run("lerp", opt_state["exp_avg"], grads, 1 - beta1, reuse=donate)
    squares = run("mul", opt_state["exp_avg_sq"], beta2, reuse=donate)
    squares = run("addcmul", squares, grads, grads, 1 - beta2, reuse=True)
    return means, squares


def lion(*, beta1: float = 0.9, beta2: float = 0.99, weight_decay: Number = 0.0) -> Optimizer:
    """Lion, the signs of an interpolated momentum (Chen et al., 2023, arXiv:2302.06675, algorithm 2).

    Args:
        beta1: weight of the momentum, against the gradient, in the direction of the update.
        beta2: decay of the momentum.
        weight_decay: parameters shrink by the factor 1 - lr * weight_decay at each update.

    Returns:
        The optimizer. Each element moves by `lr`: the paper takes learning rates 3 to 10 times smaller than AdamW's,
        and weight decays larger by the same factor. The real and imaginary parts of a complex parameter are elements.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> params, optimizer = {"w": torch.zeros(2)}, lion()
        >>> grads = {"w": torch.tensor([3.0, -0.1])}
        >>> optimizer.update(grads, optimizer.init(params), params, lr=0.5, step=0)[0]["w"]
        tensor([-0.5000,  0.5000])
    """
    check_options(beta1=beta1, beta2=beta2, weight_decay=weight_decay)

    def kernel(run, grads, params, opt_state, lr, step, donate):
        momenta = opt_state["exp_avg"]
        directions = run("sign", lerp(run, momenta, grads, 1 - beta1), reuse=True)
        if is_not_zero(weight_decay):
            params = run("mul", params, 1 - lr * weight_decay, reuse=donate)
        params = run("add", params, directions, alpha=-lr, reuse=donate)
        return params, {"exp_avg": lerp(run, momenta, grads, 1 - beta2, reuse=donate)}

    return optimizer_from_kernel(kernel, {"exp_avg": torch.zeros_like}, weight_decay)


def nadam(
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Number = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    """Adam with Nesterov momentum (Dozat, 2016), as `torch.optim.NAdam` with `foreach=False`, its default on the CPU.

    Args:
        beta1: decay of the running mean of gradients.
        beta2: decay of the running mean of their squares.
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        momentum_decay: how fast the momentum grows to `beta1`: it is beta1 * (1 - 0.96 ** (t * momentum_decay) / 2).
        decoupled_weight_decay: whether parameters shrink by the factor 1 - lr * weight_decay instead, as in `adamw`.

    Returns:
        The optimizer.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> sorted(nadam().init({"w": torch.ones(2)}))
        ['exp_avg', 'exp_avg_sq', 'mu_product']
    """
    check_options(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, momentum_decay=momentum_decay)

    def kernel(run, grads, params, opt_state, lr, step, donate):
        if is_not_zero(weight_decay):
            if decoupled_weight_decay:
                params = run("mul", params, 1 - lr * weight_decay, reuse=donate)
            else:
                grads = run("add", grads, params, alpha=weight_decay)
        count = step + 1
        mu, next_mu = (beta1 * (1.0 - 0.5 * (0.96 ** (t * momentum_decay))) for t in (count, count + 1))
        products = run("mul", opt_state["mu_product"], mu, reuse=donate)
        means, squares = update_averages(run, grads, opt_state, donate, beta1, beta2)
        new_state = {"exp_avg": means, "exp_avg_sq": squares, "mu_product": products}
        roots = run("add", run("sqrt", run("div", squares, 1 - beta2**count)), eps, reuse=True)
        product = read_number(products[0])  # these parameters have had the same number of updates
        if isinstance(product, Tensor):
            product = product.to(torch.float64)
            run = arithmetic_for((), product)
        params = run("addcdiv", params, grads, roots, value=-lr * (1.0 - mu) / (1.0 - product), reuse=donate)
        params = run("addcdiv", params, means, roots, value=-lr * next_mu / (1.0 - product * next_mu), reuse=True)
        return params, new_state

    products = {"mu_product": lambda param: scalar(param, 1.0, torch.float32)}  # as in torch, for all dtypes
    optimizer = optimizer_from_kernel(kernel, ADAM_STATE | products, weight_decay, uses_step=True)
    return optimizer._replace(is_elementwise=False)  # mu_product has not the parameter's shape


def rmsprop(
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: Number = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
) -> Optimizer:
    """RMSprop (Tieleman and Hinton, 2012; centered: Graves, 2013, arXiv:1308.0850), as `torch.optim.RMSprop`.

    Args:
        alpha: decay of the running mean of squared gradients.
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        momentum: factor of the running sum of updates; 0 keeps none.
        centered: whether to divide by the standard deviation of gradients, and not by the root of their mean square.

    Returns:
        The optimizer.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> sorted(rmsprop(momentum=0.9, centered=True).init({"w": torch.ones(2)}))
        ['grad_avg', 'momentum_buffer', 'square_avg']
    """
    check_options(alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)

    def kernel(run, grads, params, opt_state, lr, step, donate):
        if is_not_zero(weight_decay):
            grads = run("add", grads, params, alpha=weight_decay)
        squares = run("mul", opt_state["square_avg"], alpha, reuse=donate)
        new_state = {"square_avg": run("addcmul", squares, grads, grads, 1 - alpha, reuse=True)}
        variances = new_state["square_avg"]
        if centered:
            means = new_state["grad_avg"] = lerp(run, opt_state["grad_avg"], grads, 1 - alpha, reuse=donate)
            variances = run("addcmul", variances, means, means, -1)
        roots = run("add", run("sqrt", variances), eps, reuse=True)
        if not momentum:
            return run("addcdiv", params, grads, roots, value=-lr, reuse=donate), new_state
        buffers = run("mul", opt_state["momentum_buffer"], momentum, reuse=donate)
        buffers = new_state["momentum_buffer"] = run("addcdiv", buffers, grads, roots, value=1, reuse=True)
        return run("add", params, buffers, alpha=-lr, reuse=donate), new_state

    kinds = {"square_avg": True, "grad_avg": centered, "momentum_buffer": momentum > 0}
    return optimizer_from_kernel(kernel, {kind: torch.zeros_like for kind, used in kinds.items() if used}, weight_decay)
