"""What a loss function must be: pure, of the parameters that it is given, and of the form that a step reads.

Each loss function is tried once, with copies, before its first step. What is wrong with it is then an error and not a
training that goes silently wrong.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwiml_func._checks import check_takes, listed, truncated_repr
from dwiml_func._transforms import is_transformed, read_number
from dwiml_func.core.attributes import is_same_loss
from dwiml_func.core.loss import LossFn, LossOut
from dwiml_func.core.rng import Key, watched_generators
from dwiml_func.types import Buffers, Params

__all__ = ["check_loss_fn", "check_loss_out", "check_requires_grad", "check_scalar_loss", "uses_reentrant_checkpoints"]

_CHECKED: dict[bool, weakref.WeakValueDictionary[int, Any]] = {
    train: weakref.WeakValueDictionary() for train in (True, False)
}
"""The loss functions that were tried, by their ids: they need not be hashable."""

_REENTRANT: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def check_loss_fn(
    loss_fn: LossFn, params: Params, buffers: Buffers, batch: Any, *, key: Key, train: bool = True
) -> None:
    """Try a loss function that has not been tried yet, on copies of a state's tensors.

    Raises:
        ValueError: it does not return a valid `LossOut`; it does not use the parameters that it is given; it uses
            others that require a gradient; it writes into parameters or buffers; or a second call gives another loss.
    """
    if is_transformed():
        return
    if train and torch.is_inference_mode_enabled():
        raise ValueError("A training step needs gradients, which torch.inference_mode switches off. Leave that block.")
    if _CHECKED[train].get(id(loss_fn)) is loss_fn:
        return
    form = "(params, buffers, batch, *, key, train), as module_loss makes one"
    check_takes("loss_fn", form, loss_fn, params, buffers, batch, key=key, train=train)
    if wrong := [name for name, p in params.items() if not (p.is_floating_point() or p.is_complex())]:
        raise ValueError(f"Expected parameters that can be trained. Received: {listed(wrong)} of integers or booleans.")
    try:  # a loss may consume or change its batch
        first, second = copy.deepcopy(batch), copy.deepcopy(batch)
    except Exception:  # an iterator, a tensor with a graph: it cannot be given twice
        return
    with torch.set_grad_enabled(train):
        copies = _copies(params, requires_grad=train), _copies(buffers)
        drawn = _generator_states()
        with getattr(loss_fn, "hold", contextlib.nullcontext)():
            out = loss_fn(*copies, first, key=key, train=train)
            draws = _generator_states() != drawn
            check_loss_out(out, buffers)
            if train:
                _check_backward(loss_fn, out.loss, copies[0])
        for before, after in ((params, copies[0]), (buffers, copies[1])):
            written = [name for name in before if not _is_equal(before[name], after[name])]
            if written:
                raise ValueError(
                    f"The loss function writes into {listed(written)} of the state. Expected a loss that leaves "
                    f"parameters and buffers as they are, and returns new buffers."
                )
        drawn = _generator_states()
        again = loss_fn(_copies(params, requires_grad=train), _copies(buffers), second, key=key, train=train).loss
    if draws and _generator_states() != drawn:  # twice: other threads draw from them too
        raise ValueError(
            "The loss function draws from the global generator of Python or numpy, which no key seeds: a step would "
            "not be reproducible. Draw from torch's, which module_loss seeds from the key, or from numpy_rng(key)."
        )
    if not is_same_loss(out.loss, again):
        raise ValueError(
            f"Called twice with the same parameters, batch and key, the loss function gave {out.loss.item():.9g} and "
            f"{again.item():.9g}. Take all random numbers from the key (module_loss seeds torch's "
            f"global generators from it) and keep nothing between calls."
        )
    with contextlib.suppress(TypeError):  # an object without weak references is tried again
        _CHECKED[train][id(loss_fn)] = loss_fn


def check_scalar_loss(loss: Tensor) -> None:
    """Raise a ValueError unless a loss is a () tensor."""
    if loss.dim() != 0:
        raise ValueError(f"Expected a scalar loss, a mean over points. Received: a tensor of shape {tuple(loss.shape)}")


def check_requires_grad(loss: Tensor) -> None:
    """Raise a ValueError unless a loss has a gradient."""
    if not loss.requires_grad:
        raise ValueError("Expected a loss that depends on the parameters. Received: one without a gradient.")


def check_loss_out(out: Any, buffers: Mapping[str, Tensor]) -> None:
    """Check the form of what a loss function returned."""
    if not isinstance(out, LossOut):
        raise ValueError(f"Expected a loss function that returns LossOut. Received: {type(out).__name__}")
    if not isinstance(out.loss, Tensor):
        raise ValueError(f"Expected a loss that is a () tensor. Received: {truncated_repr(out.loss)}")
    _check_scalar("a scalar loss, a mean over points", out.loss)
    _check_weight("a weight", out.weight)
    for name, mean in out.aux.items():
        for part in mean if isinstance(mean, tuple) else (mean,):
            _check_scalar(f"the auxiliary metric {name!r} to be a () tensor, a mean over points", part)
        if isinstance(mean, tuple):
            _check_weight(f"the auxiliary metric {name!r} with a weight", mean[1])
    if missing := [name for name in buffers if name not in out.buffers]:
        raise ValueError(
            f"Expected a loss function that returns all buffers it is given, changed or not. Missing: {listed(missing)}"
        )
    for name, old in buffers.items():
        if (new := out.buffers[name]).shape != old.shape or new.dtype != old.dtype:
            raise ValueError(
                f"Expected buffers that keep their shapes and dtypes, which checkpoints are restored to. Received: "
                f"{name} of {new.dtype} {tuple(new.shape)} in place of {old.dtype} {tuple(old.shape)}. If that happens "
                f"once, call the module on a batch before init_state."
            )


def _check_weight(what: str, weight: Any) -> None:
    _check_scalar(f"{what} that is a number of points", weight)
    if not isinstance(weight := read_number(weight), Tensor) and not 0 <= weight <= sys.float_info.max:
        received = truncated_repr(weight)
        raise ValueError(f"Expected {what} that is a number of points, finite and at least 0. Received: {received}")


def _generator_states() -> tuple[Any, ...]:
    """Of the global generators of Python and numpy."""
    name, numbers, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), name, np.asarray(numbers).tobytes(), *rest


def _check_scalar(expected: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"Expected {expected}. Received: a tensor of shape {tuple(value.shape)}")
        if value.is_complex():
            raise ValueError(f"Expected {expected}. Received: a complex tensor.")
    elif not isinstance(value, int | float) and not hasattr(value, "__float__"):
        raise ValueError(f"Expected {expected}. Received: {truncated_repr(value)}")


def uses_reentrant_checkpoints(loss_fn: LossFn) -> bool:
    """Whether a loss function that was tried has blocks of `torch.utils.checkpoint` with `use_reentrant=True`.

    They put gradients into `.grad` while they are computed again, and `torch.autograd.grad` passes them over.
    """
    return bool(_REENTRANT) and _REENTRANT.get(id(loss_fn)) is loss_fn


def _check_backward(loss_fn: LossFn, loss: Tensor, leaves: Mapping[str, Tensor]) -> None:
    if any(leaf.grad is not None for leaf in leaves.values()):
        raise ValueError(
            "The loss function calls backward(), whose gradients no step would use: a step computes them itself. Leave "
            "it out, or take gradients within a loss by torch.autograd.grad."
        )
    nodes = list(_nodes(loss))
    is_reentrant = any("CheckpointFunctionBackward" in type(node).__name__ for node in nodes)
    for node in nodes:
        if getattr(node, "_saved_sparse", False):  # of an embedding
            own = [getattr(each, "variable", None) for each, _ in node.next_functions]
            sparse = [name for name, leaf in leaves.items() if any(leaf is each for each in own)]
            raise ValueError(f"Expected dense gradients. Received: a sparse one of {listed(sparse)}. Use sparse=False.")
    if is_reentrant:
        with contextlib.suppress(TypeError):
            _REENTRANT[id(loss_fn)] = loss_fn
    _check_leaves(loss, leaves, is_reentrant=is_reentrant)
    with watched_generators() as has_drawn:
        loss.backward(inputs=None if is_reentrant else list(leaves.values()))
        if has_drawn():
            raise ValueError(
                "The gradient of the loss draws random numbers of its own, so it is that of another loss. Give "
                "torch.utils.checkpoint preserve_rng_state=True, and keep what a forward has drawn for its backward."
            )


def _check_leaves(loss: Tensor, leaves: Mapping[str, Tensor], *, is_reentrant: bool) -> None:
    check_requires_grad(loss)
    if is_reentrant:  # what such a block uses is known only when it is computed again
        return
    reached = {id(leaf): leaf for node in _nodes(loss) if (leaf := getattr(node, "variable", None)) is not None}
    own = {id(tensor) for tensor in leaves.values()}
    if not reached.keys() & own:
        raise ValueError(
            "Expected a loss of the parameters that it is given. Received: one that depends on other tensors only. Use "
            "the model that the loss is handed, not a module of the enclosing script."
        )
    # Other leaves than parameters are inputs that the loss differentiates, as for a gradient penalty.
    foreign = [leaf for number, leaf in reached.items() if number not in own and isinstance(leaf, torch.nn.Parameter)]
    if foreign := [tuple(parameter.shape) for parameter in foreign]:
        raise ValueError(
            f"The loss depends on parameters that require a gradient and are not in the state, of shapes "
            f"{listed(map(str, foreign))}: they would never be trained. Put their module into the one that the "
            f"state is made from, or detach them."
        )


def _nodes(loss: Tensor) -> Iterator[Any]:
    """The nodes of the loss's graph; a parameter alone has one."""
    waiting: list[Any] = [torch.autograd.graph.get_gradient_edge(loss).node] if loss.requires_grad else []
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        following = [each for each, _ in node.next_functions if each is not None and each not in seen]
        seen.update(following)
        waiting.extend(following)


def _copies(tensors: Mapping[str, Tensor], *, requires_grad: bool = False) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_(requires_grad) for name, tensor in tensors.items()}


def _is_equal(old: Tensor, new: Tensor) -> bool:
    """Whether two tensors are bitwise equal, NaN included."""
    if old.device.type == "meta":  # no values
        return True
    return torch.equal(old, new) or bool(((old == new) | (old.isnan() & new.isnan())).all())
