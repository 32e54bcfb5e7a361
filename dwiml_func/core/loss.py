"""Losses as pure functions of parameters, buffers, batch and key, and the door from `torch.nn.Module` to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dwiml_func.core.autocast import autocast_forward
from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.types import Buffers, Params

__all__ = ["LossFn", "LossOut", "module_loss"]


class LossOut(NamedTuple):
    """What a loss function returns.

    Args:
        loss: () tensor, the mean over what `weight` counts.
        weight: number of points behind the mean.
        buffers: the buffers after the batch, by name.
        aux: further () means, e.g. `{"angular_error": ...}`; nothing is differentiated. A mean over another number of
            points than `weight` is a pair of () tensors, (mean, its own weight).

    Example:
        >>> LossOut(torch.tensor(0.5), 10, {}, {}).weight
        10
    """

    loss: Tensor
    weight: Tensor | int
    buffers: Buffers
    aux: Mapping[str, Tensor | tuple[Tensor, Tensor]]


class LossFn(Protocol):
    """A loss function: pure, and all its randomness comes from `key`.

    Example:
        >>> def loss_fn(params, buffers, batch, *, key, train):
        ...     x, y = batch
        ...     return LossOut(((x @ params["w"] - y) ** 2).mean(), len(y), buffers, {})
    """

    def __call__(self, params: Params, buffers: Buffers, batch: Any, *, key: Key, train: bool) -> LossOut: ...


_Number = Tensor | float

BatchLoss = Callable[[Any, Any], tuple[Any, ...]]
"""`compute_batch_loss(model, batch)`: returns (loss, weight) or (loss, weight, aux)."""


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
            given parameters and buffers. Returns the mean loss, the number of points behind it and, optionally, a dict
            of further means, each alone or as a pair (mean, weight), tensors or numbers.
        stochastic: whether the model may draw random numbers. True seeds torch's generators from the key and restores
            them afterwards (some 10 microseconds); False leaves them alone, for models that draw nothing.
        autocast: torch.bfloat16 runs `model(...)` in mixed precision, see `autocast_forward`: what `compute_batch_loss`
            makes of its results is computed in float32, and parameters, gradients and loss stay in it. None: as it is.

    Returns:
        A loss function for `train_step` and `eval_step`. Not to be called from several threads at once.

    Raises:
        ValueError: (when called) `compute_batch_loss` returned something else, names do not match the module's, or the
            model filled a buffer that was registered as None: no state holds such a buffer. (At once) `autocast` is
            another dtype.

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
    views = {train: _StatelessModule(module, train, autocast) for train in (True, False)}

    def loss_fn(params: Params, buffers: Buffers, batch: Any, *, key: Key, train: bool) -> LossOut:
        # In-place updates of buffers (batch normalisation) must not reach the caller's tensors.
        tensors = {**params, **{name: tensor.clone() for name, tensor in buffers.items()}}
        if stochastic and not torch.compiler.is_compiling():  # a compiled step is seeded around its graph
            with torch_rng(key):
                out = views[train](tensors, compute_batch_loss, batch)
        else:
            out = views[train](tensors, compute_batch_loss, batch)
        if not (isinstance(out, tuple) and len(out) in (2, 3)):
            raise ValueError(
                f"Expected compute_batch_loss to return (loss, weight) or (loss, weight, aux). "
                f"Received: {type(out).__name__}"
            )
        aux = out[2] if len(out) == 3 else {}
        new_buffers = {name: tensors[name].detach() for name in buffers}
        return LossOut(out[0], out[1], new_buffers, {name: _detached(mean, out[0]) for name, mean in aux.items()})

    loss_fn.stochastic = stochastic  # type: ignore[attr-defined]  # for `jit_step`, which seeds around its graph
    return loss_fn


def _detached(mean: _Number | tuple[_Number, _Number], loss: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """A further mean as tensors, also of numbers: torch.func hands tensors through, and nothing else."""
    if isinstance(mean, tuple):
        value, weight = (_detached_number(part, loss) for part in mean)
        return value, weight
    return _detached_number(mean, loss)


def _detached_number(number: _Number, loss: Tensor) -> Tensor:
    return number.detach() if isinstance(number, Tensor) else loss.new_full((), number, dtype=torch.float64)


class _StatelessModule:
    """A private copy of a module's structure, run with tensors that are handed in.

    It does what `torch.func.functional_call` does, with the look-up of names done once: on a small model that call
    costs as much as the forward pass.
    """

    def __init__(self, module: torch.nn.Module, train: bool, autocast: torch.dtype | None) -> None:
        tensors = list(chain(module.parameters(), module.buffers()))
        # The copy shares the tensors (they are never read through it) and, with them, which of them are tied.
        self._module = copy.deepcopy(module, memo={id(tensor): tensor for tensor in tensors})
        self._module.train(train)
        if autocast is not None:
            self._module.forward = autocast_forward(self._module, autocast)
        self._slots = [
            *_slots(self._module, "_parameters", self._module.named_parameters()),
            *_slots(self._module, "_buffers", self._module.named_buffers()),
        ]
        self._names = {name for name, _, _ in self._slots}
        self._none_slots = [
            (submodule._buffers, leaf)
            for submodule in self._module.modules()
            for leaf, tensor in submodule._buffers.items()
            if tensor is None
        ]

    def __call__(self, tensors: dict[str, Tensor], function: BatchLoss, batch: Any) -> Any:
        if tensors.keys() != self._names:
            raise ValueError(
                f"Parameters and buffers do not fit the module. Missing: {sorted(self._names - tensors.keys())}. "
                f"Unexpected: {sorted(tensors.keys() - self._names)}."
            )
        originals = [slot[leaf] for _, slot, leaf in self._slots]
        try:
            for name, slot, leaf in self._slots:
                slot[leaf] = tensors[name]
            result = function(self._module, batch)
            for name, slot, leaf in self._slots:
                tensors[name] = slot[leaf]  # a module may assign a buffer instead of changing it in place
            filled = [leaf for slot, leaf in self._none_slots if slot[leaf] is not None]
            if filled:
                raise ValueError(
                    f"The model filled the buffers {filled}, which are None in the module. Expected tensors from the "
                    f"start: register them with a value, so that the state holds them."
                )
            return result
        finally:
            for (_, slot, leaf), original in zip(self._slots, originals, strict=True):
                slot[leaf] = original
            for slot, leaf in self._none_slots:
                slot[leaf] = None


def _slots(module: torch.nn.Module, kind: str, named: Any) -> list[tuple[str, dict[str, Tensor], str]]:
    """Every place that holds a tensor, with the name of the tensor; tied tensors have several places and one name."""
    name_of = {id(tensor): name for name, tensor in named}
    return [
        (name_of[id(tensor)], getattr(submodule, kind), leaf)
        for submodule in module.modules()
        for leaf, tensor in getattr(submodule, kind).items()
        if tensor is not None
    ]
