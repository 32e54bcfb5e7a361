"""Lion."""

from __future__ import annotations

import torch

from dwiml_func.optim._kernel import check_options, is_not_zero, lerp, optimizer_from_kernel
from dwiml_func.types import Number, Optimizer

__all__ = ["lion"]


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
