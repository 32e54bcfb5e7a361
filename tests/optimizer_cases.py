"""Tensors, and loops over updates, that the tests of optimizers share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dwiml_func.types import Optimizer

SHAPES = {"a.weight": (3, 4), "a.bias": (3,), "scale": (), "empty": (0, 3), "b.weight": (5, 2)}
NUM_STEPS = 50


@functools.cache
def _some_tensors(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def some_tensors(seed: int, dtype: torch.dtype = torch.float32, size: float | Tensor = 1.0) -> dict[str, Tensor]:
    """Tensors of all ranks; the same for the same seed."""
    return {name: tensor * size for name, tensor in _some_tensors(seed, dtype).items()}


def gradient(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The gradient of a step, whose size varies a lot."""
    return some_tensors(step + 1, dtype, 10.0 ** (step % 4 - 2))


def learning_rate(step: int) -> float:
    return 0.05 / (1 + step % 7)


def run_updates(
    optimizer: Optimizer,
    *,
    num_steps: int = NUM_STEPS,
    dtype: torch.dtype = torch.float32,
    donate: bool = False,
    grads: Callable[[int, torch.dtype], dict[str, Any]] = gradient,
) -> tuple[dict[str, Tensor], Any]:
    """Parameters and state after some updates."""
    params = some_tensors(0, dtype)
    opt_state = optimizer.init(params)
    for step in range(num_steps):
        lr = learning_rate(step)
        params, opt_state = optimizer.update(grads(step, dtype), opt_state, params, lr=lr, step=step, donate=donate)
    return params, opt_state


def run_torch(
    make: Callable[[dict[str, torch.nn.Parameter]], Sequence[torch.optim.Optimizer]],
    *,
    num_steps: int = NUM_STEPS,
    dtype: torch.dtype = torch.float32,
    grads: Callable[[int, torch.dtype], dict[str, Any]] = gradient,
    before_step: Callable[[Iterable[torch.nn.Parameter]], object] = lambda params: None,
) -> dict[str, Tensor]:
    """The parameters after the same updates by optimizers of torch. A param group may have an `lr_factor`."""
    params = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in some_tensors(0, dtype).items()}
    optimizers = make(params)
    for step in range(num_steps):
        for name, grad in grads(step, dtype).items():
            params[name].grad = grad if grad is None else grad.clone()
        before_step(params.values())
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step) * group.get("lr_factor", 1.0)
            optimizer.step()
    return {name: param.detach() for name, param in params.items()}


def evaluated(optimizer: Optimizer, opt_state: Any, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that the optimizer evaluates with."""
    return params if optimizer.eval_params is None else dict(optimizer.eval_params(opt_state, params))


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def addresses(*trees: Any) -> set[int]:
    """Where the tensors of trees lie in memory."""
    return {leaf.data_ptr() for leaf in tree_leaves(trees) if leaf.numel()}
