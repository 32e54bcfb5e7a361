"""Losses: pure functions of parameters, buffers, batch and key, also made from a `torch.nn.Module`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dwiml_func._checks import truncated_repr
from dwiml_func.core.attributes import AttributeCheck
from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.core.stateless import StatelessModule, copy_structure
from dwiml_func.types import Buffers, Params

__all__ = ["LossFn", "LossOut", "module_loss"]


class LossOut(NamedTuple):
    """What a loss function returns.

    Args:
        loss: () tensor, a mean over points.
        weight: number of points averaged.
        buffers: the buffers after the batch, by name.
        aux: auxiliary metrics, () means such as `{"angular_error": ...}`, without gradient. A mean over another number
            of points than `weight` is a pair of () tensors, (mean, weight).

    Example:
        >>> LossOut(torch.tensor(0.5), 10, {}, {}).weight
        10
    """

    loss: Tensor
    weight: Tensor | int
    buffers: Buffers
    aux: Mapping[str, Tensor | tuple[Tensor, Tensor]]


class LossFn(Protocol):
    """A loss function: pure; all its random numbers come from `key`.

    Example:
        >>> def loss_fn(params, buffers, batch, *, key, train):
        ...     x, y = batch
        ...     return LossOut(((x @ params["w"] - y) ** 2).mean(), len(y), buffers, {})
    """

    def __call__(self, params: Params, buffers: Buffers, batch: Any, *, key: Key, train: bool) -> LossOut: ...


_Number = Tensor | float

BatchLoss = Callable[[Any, Any], tuple[Any, ...]]
"""`compute_batch_loss(model, batch)` returns (loss, weight) or (loss, weight, aux)."""


def module_loss(
    module: torch.nn.Module,
    compute_batch_loss: BatchLoss,
    *,
    stochastic: bool = True,
    autocast: torch.dtype | None = None,
) -> LossFn:
    """Make a pure loss function from a module and an ordinary PyTorch loss.

    Args:
        module: the model. Its structure is copied; neither its tensors nor its training flag are touched.
        compute_batch_loss: called as `compute_batch_loss(model, batch)`, where `model` behaves like `module` with the
            given parameters and buffers. Returns the mean loss, the number of points averaged and, optionally, a dict
            of auxiliary metrics, each a mean or a pair (mean, weight) of tensors or numbers.
        stochastic: whether the model uses random numbers. True seeds torch's generators from the key and restores
            them afterwards (some 10 microseconds); False leaves them alone.
        autocast: torch.bfloat16 runs `model(...)` in mixed precision, see `autocast_forward`. The rest of
            `compute_batch_loss`, parameters, gradients and loss stay in float32. None: no mixed precision.

    Returns:
        A loss function for `train_step` and `eval_step`. Threads may call it side by side: each has its own copy of the
        module's structure. While one draws random numbers, the others wait with theirs.

    Raises:
        ValueError: (when called) `compute_batch_loss` returned something else, names do not match the module's, or the
            model filled a buffer that was registered as None, which no state holds. (At once) `autocast` is another
            dtype.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> def compute_batch_loss(model, batch):
        ...     x, y = batch
        ...     return ((model(x) - y) ** 2).mean(), len(y)
        >>> loss_fn = module_loss(model, compute_batch_loss)
        >>> batch = (torch.ones(4, 2), torch.zeros(4, 1))
        >>> loss_fn(dict(model.named_parameters()), {}, batch, key=Key(0), train=False).weight
        4
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"Expected a torch.nn.Module. Received: {type(module).__name__}")
    if not callable(compute_batch_loss) or type(compute_batch_loss).__module__.startswith("torch.nn"):
        raise TypeError(
            f"Expected a function compute_batch_loss(model, batch) that returns (loss, weight). Received: "
            f"{truncated_repr(compute_batch_loss)}. Call the model and a criterion such as torch.nn.MSELoss() in it."
        )
    views = _Views(module, autocast)
    attributes = AttributeCheck()

    def loss_fn(params: Params, buffers: Buffers, batch: Any, *, key: Key, train: bool) -> LossOut:
        view = views.here()[train]
        # In-place updates of buffers (batch normalisation) must not reach the caller's tensors.
        tensors = {**params, **{name: t.clone() if name in view.buffer_names else t for name, t in buffers.items()}}
        if stochastic and not torch.compiler.is_compiling():  # a compiled step seeds around its graph
            with torch_rng(key):
                out = view(tensors, compute_batch_loss, batch)
        else:
            out = view(tensors, compute_batch_loss, batch)
        if not (isinstance(out, tuple) and len(out) in (2, 3)):
            raise ValueError(
                f"Expected compute_batch_loss to return (loss, weight) or (loss, weight, aux). "
                f"Received: {type(out).__name__}"
            )
        if not isinstance(out[0], Tensor):
            raise ValueError(f"Expected a loss that is a () tensor. Received: {truncated_repr(out[0])}")
        if view.changed or not train:
            rerun = partial(view.rerun, {**params, **buffers}, compute_batch_loss, batch)
            attributes.check(train, view.changed, rerun=rerun, loss=out[0], key=key)
        aux = _checked_aux(out[2]) if len(out) == 3 else {}
        new_buffers = {name: tensors[name].detach() for name in buffers}
        return LossOut(out[0], out[1], new_buffers, {name: _detached(mean, out[0]) for name, mean in aux.items()})

    loss_fn.stochastic = stochastic  # type: ignore[attr-defined]  # for `jit_step`, which seeds around its graph
    loss_fn.hold = lambda: views.here()[True].hold()  # type: ignore[attr-defined]  # for `value_and_grad`
    return loss_fn


class _Views:
    """A module as a function, in training and in evaluation, for each thread that calls it."""

    def __init__(self, module: torch.nn.Module, autocast: torch.dtype | None) -> None:
        self._module, self._autocast = copy_structure(module), autocast
        self._thread, self._first, self._others = threading.get_ident(), self._make(), threading.local()

    def here(self) -> dict[bool, StatelessModule]:
        """Those of this thread."""
        if torch.compiler.is_compiling() or threading.get_ident() == self._thread:
            return self._first
        if not hasattr(self._others, "views"):
            self._others.views = self._make()
        return self._others.views

    def _make(self) -> dict[bool, StatelessModule]:
        return {train: StatelessModule(self._module, train=train, autocast=self._autocast) for train in (True, False)}


def _checked_aux(aux: Any) -> Mapping[str, _Number | tuple[_Number, _Number]]:
    """Auxiliary metrics, if they are a mapping of names to numbers or pairs of numbers."""
    if not isinstance(aux, Mapping):
        raise ValueError(f"Expected a dict of auxiliary metrics by name. Received: {type(aux).__name__}")
    for name, mean in aux.items():
        parts = mean if isinstance(mean, tuple) else (mean,)
        if not isinstance(name, str) or len(parts) > 2 or not all(map(_is_number, parts)):
            raise ValueError(
                f"Expected auxiliary metrics that are means by name, or pairs (mean, weight), of real numbers or () "
                f"tensors. Received: {truncated_repr(name)}: {truncated_repr(mean)}"
            )
    return aux


def _is_number(value: Any) -> bool:
    if isinstance(value, int | float):
        return True
    if isinstance(value, Tensor):
        return not value.is_complex()  # its shape is checked with that of the loss
    return hasattr(value, "__float__") and getattr(value, "shape", ()) == () and not isinstance(value, complex)


def _detached(mean: _Number | tuple[_Number, _Number], loss: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """An auxiliary metric as tensors: torch.func returns nothing else."""
    if isinstance(mean, tuple):
        value, weight = (_detached_number(part, loss) for part in mean)
        return value, weight
    return _detached_number(mean, loss)


def _detached_number(number: _Number, loss: Tensor) -> Tensor:
    return number.detach() if isinstance(number, Tensor) else loss.new_full((), number, dtype=torch.float64)
