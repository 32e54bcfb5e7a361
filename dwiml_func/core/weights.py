"""The weights of a run, back in a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dwiml_func._checks import at_most_three
from dwiml_func.core.layout import memory_problems
from dwiml_func.core.state import TrainState, check_not_donated
from dwiml_func.optim.state_check import check_opt_state
from dwiml_func.types import Optimizer

__all__ = ["load_into", "with_eval_params"]


def with_eval_params(state: TrainState, optimizer: Optimizer | None) -> TrainState:
    """The state with the parameters that its optimizer evaluates with, such as an average, in place of its own."""
    if optimizer is None or optimizer.eval_params is None:
        return state
    check_opt_state(optimizer, state.opt_state, state.params)
    return state.replace(params=optimizer.eval_params(state.opt_state, state.params))


def load_into(
    module: torch.nn.Module,
    state: TrainState,
    *,
    params: Mapping[str, Tensor] | None = None,
    optimizer: Optimizer | None = None,
) -> None:
    """Write a run's parameters and buffers into a module, in place.

    It is the inverse of `init_state`: tied weights stay tied, buffers that are not persistent and frozen parameters are
    written too, and the module keeps its device, its mode and its `requires_grad` flags.

    Args:
        module: the module that the run was made from, or one with the same names and shapes.
        state: the run.
        params: parameters to write in place of `state.params`. None takes the run's own.
        optimizer: the run's optimizer; writes the parameters that it evaluates with, such as an average.

    Raises:
        ValueError: names, shapes or dtypes differ, or both `params` and `optimizer` are given. Nothing is written then.
        RuntimeError: the state was donated to a step.

    Example:
        >>> from dwiml_func import init_state, sgd
        >>> model = torch.nn.Linear(2, 1)
        >>> state = init_state(model, sgd(), seed=0)
        >>> load_into(model, state.replace(params={name: p * 0 for name, p in state.params.items()}))
        >>> float(model.weight.detach().abs().sum())
        0.0
    """
    check_not_donated(state)
    if params is not None and optimizer is not None:
        raise ValueError("Expected params or optimizer, which says what parameters to write. Received: both.")
    state = with_eval_params(state, optimizer)
    tensors = {**(state.params if params is None else params), **state.buffers}
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if problems := list(_differences(own, tensors)):
        raise ValueError(
            f"The state does not fit the module {type(module).__name__}: {at_most_three(problems)}. "
            f"Expected the module that the run was made from. Nothing was written."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _differences(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    yield from (f"the module has no {name}" for name in tensors if name not in own)
    yield from memory_problems(own)
    for name, tensor in own.items():
        if name not in tensors:
            yield f"the state has no {name}"
        elif tensor.is_meta:
            yield f"{name} is on the meta device, where nothing can be written (see module.to_empty)"
        elif tensor.is_inference() and not torch.is_inference_mode_enabled():
            yield f"{name} was made in torch.inference_mode, outside of which it cannot be written"
        elif any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            yield f"{name} is expanded: its elements share memory"
        elif tensors[name].shape != tensor.shape:
            yield f"{name} has shape {tuple(tensors[name].shape)} in the state and {tuple(tensor.shape)} in the module"
        elif tensors[name].dtype != tensor.dtype:
            yield f"{name} is {tensors[name].dtype} in the state and {tensor.dtype} in the module"
