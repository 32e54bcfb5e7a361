"""RMSprop."""

from __future__ import annotations

import torch

from dwiml_func.optim._kernel import check_options, is_not_zero, lerp, optimizer_from_kernel
from dwiml_func.types import Number, Optimizer

__all__ = ["rmsprop"]


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
