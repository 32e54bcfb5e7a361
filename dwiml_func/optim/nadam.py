"""Adam with Nesterov momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from dwiml_func._transforms import read_number
from dwiml_func.optim._foreach import arithmetic_for
from dwiml_func.optim._kernel import check_options, is_not_zero, optimizer_from_kernel, scalar
from dwiml_func.optim.optimizers import ADAM_STATE, update_averages
from dwiml_func.types import Number, Optimizer

__all__ = ["nadam"]


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
