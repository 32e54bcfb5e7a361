"""Gradients by either of torch's two autodiff backends."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dwiml_func._checks import one_line
from dwiml_func._transforms import is_transformed
from dwiml_func.core.loss import LossFn, LossOut
from dwiml_func.core.loss_check import check_loss_fn, check_requires_grad, check_scalar_loss, uses_reentrant_checkpoints
from dwiml_func.core.rng import Key
from dwiml_func.types import Buffers, Params

__all__ = ["AutodiffBackend", "ValueAndGrad", "is_differentiated", "value_and_grad"]

AutodiffBackend = Literal["autograd", "func"]
"""`"autograd"`: torch.autograd.grad on detached leaves; its result cannot be differentiated. `"func"`:
torch.func.grad_and_value, which composes with torch.func.grad, vmap, jacrev and with autograd around it, and costs
more, since it always builds a graph of the backward pass."""


class ValueAndGrad(Protocol):
    """A function with the signature of `value_and_grad`, for `train_step`."""

    def __call__(
        self,
        loss_fn: LossFn,
        params: Params,
        buffers: Buffers,
        batch: Any,
        *,
        key: Key,
        backend: AutodiffBackend | None = None,
    ) -> tuple[LossOut, dict[str, Any]]: ...


def value_and_grad(
    loss_fn: LossFn, params: Params, buffers: Buffers, batch: Any, *, key: Key, backend: AutodiffBackend | None = None
) -> tuple[LossOut, dict[str, Any]]:
    """Evaluate a loss in training mode, and its gradient with respect to the parameters.

    Args:
        loss_fn: the loss.
        params: tensors to differentiate with respect to, by name.
        buffers: other tensors, by name.
        batch: what the loss takes.
        key: for the random numbers of the model.
        backend: the autodiff backend. None takes "func" under a transform of torch.func and for parameters with a
            graph, so that gradients of gradients are right, and "autograd" otherwise.

    Returns:
        The loss's output, detached, and gradients by name. That of a parameter on which the loss does not depend is
        None with "autograd" and zeros with "func", since transforms of torch.func return tensors only.

    Raises:
        ValueError: the loss depends on no parameter or is not a scalar, or the backend is unknown.

    Example:
        >>> def loss_fn(params, buffers, batch, *, key, train):
        ...     return LossOut((params["w"] * batch).sum(), 1, buffers, {})
        >>> _, grads = value_and_grad(loss_fn, {"w": torch.ones(2)}, {}, torch.tensor([2.0, 3.0]), key=Key(0))
        >>> grads["w"]
        tensor([2., 3.])
    """
    if backend is None:
        backend = "func" if is_differentiated(params) else "autograd"
    check_loss_fn(loss_fn, params, buffers, batch, key=key)
    hold = nullcontext if torch.compiler.is_compiling() else getattr(loss_fn, "hold", nullcontext)
    with hold():
        return _value_and_grad(loss_fn, params, buffers, batch, key, backend)


def _value_and_grad(
    loss_fn: LossFn, params: Params, buffers: Buffers, batch: Any, key: Key, backend: AutodiffBackend
) -> tuple[LossOut, dict[str, Any]]:
    if backend == "autograd":
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
        with torch.enable_grad():
            out = loss_fn(leaves, buffers, batch, key=key, train=True)
        check_scalar_loss(out.loss)
        check_requires_grad(out.loss)
        tensors = list(leaves.values())
        if uses_reentrant_checkpoints(loss_fn):
            out.loss.backward()
            grads = [tensor.grad for tensor in tensors]
        else:
            grads = torch.autograd.grad(out.loss, tensors, allow_unused=True)
        aux = {
            name: (_detached(mean[0]), _detached(mean[1])) if isinstance(mean, tuple) else _detached(mean)
            for name, mean in out.aux.items()
        }
        detached = LossOut(out.loss.detach(), out.weight, {name: _detached(b) for name, b in out.buffers.items()}, aux)
        return detached, dict(zip(leaves, grads, strict=True))
    if backend == "func":
        plain_weight: list[int] = []  # grad_and_value returns only tensors

        def scalar_and_rest(values: dict[str, Tensor]) -> tuple[Tensor, tuple[Any, ...]]:
            out = loss_fn(values, buffers, batch, key=key, train=True)
            check_scalar_loss(out.loss)
            check_requires_grad(out.loss)
            if not isinstance(out.weight, Tensor):
                plain_weight.append(out.weight)
                out = out._replace(weight=out.loss.detach())
            return out.loss, (out.weight, out.buffers, out.aux)

        try:
            grads, (loss, (weight, new_buffers, aux)) = torch.func.grad_and_value(scalar_and_rest, has_aux=True)(
                dict(params)
            )
        except (RuntimeError, NotImplementedError) as error:
            if not any(word in str(error) for word in ("torch.func", "functorch", "storage")):
                raise
            raise ValueError(
                f"torch.func cannot differentiate the loss ({one_line(error, max_length=120)}). "
                f"Use backend='autograd', and lr and params without a graph, or leave out what torch.func lacks "
                f"(checkpoints, hooks)."
            ) from error
        return LossOut(loss, plain_weight[0] if plain_weight else weight, new_buffers, aux), grads
    raise ValueError(f"Expected backend 'autograd' or 'func'. Received: {backend!r}")


def is_differentiated(params: Params, lr: float | Tensor = 0.0) -> bool:
    """Whether a step is itself differentiated or mapped: under torch.func, or with arguments that have a graph."""
    if torch.compiler.is_compiling():
        return False
    if is_transformed() or (isinstance(lr, Tensor) and lr.requires_grad):
        return True
    return any(tensor.requires_grad for tensor in params.values())


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor
