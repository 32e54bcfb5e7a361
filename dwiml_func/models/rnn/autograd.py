"""The kernels as a `torch.autograd.Function`, for first gradients by `torch.autograd` and by `torch.func`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from dwiml_func.models.derivatives import push_forward, vjp
from dwiml_func.models.rnn.kernels import KERNELS
from dwiml_func.models.rnn.scan import State, Weights, plain_scan

__all__ = ["kernel_scan"]


def kernel_scan(
    rnn_key: str, x: Tensor, batch_sizes: Sequence[int], weights: Weights, state: State
) -> tuple[Tensor, State]:
    """What `plain_scan` computes, several times faster with a gradient, on any device and in any floating dtype.

    The kernels serve first gradients by `torch.autograd` and `torch.func`. `vmap`, forward mode and gradients of
    gradients run `plain_scan` inside, at its cost.
    """
    results = cast(tuple[Tensor, ...], _Forward.apply(_Run(rnn_key, batch_sizes), x, *weights, *state))
    return results[0], results[1 : 1 + len(state)]


class _Run:
    """The arguments that are no tensors, in an object that torch.func's tree functions treat as a leaf."""

    def __init__(self, rnn_key: str, batch_sizes: Sequence[int]) -> None:
        self.rnn_key = rnn_key
        self.batch_sizes = list(batch_sizes)
        self.kernel = KERNELS[rnn_key]
        self.num_grads = 3 if rnn_key == "lstm" else 2  # those of the outputs and of the last state

    def plain(self, x: Tensor, *weights_and_state: Tensor) -> tuple[Tensor, ...]:
        """The outputs and the last state, in plain operations."""
        weights, state = cast(Weights, weights_and_state[:4]), weights_and_state[4:]
        outputs, last = plain_scan(self.rnn_key, x, self.batch_sizes, weights, state)
        return outputs, *last

    def plain_gradients(self, *grads_and_inputs: Tensor) -> tuple[Tensor, ...]:
        """From the gradients of the outputs and of the last state to those of the inputs, in plain operations."""
        _, pull = vjp(self.plain, *grads_and_inputs[self.num_grads :])
        return pull(grads_and_inputs[: self.num_grads])


class _Forward(Function):
    """(run, x, 4 weights, state) to (outputs, last state, 2 activations)."""

    @staticmethod
    def forward(run: _Run, x: Tensor, *weights_and_state: Tensor) -> tuple[Tensor, ...]:
        weights, state = cast(Weights, weights_and_state[:4]), weights_and_state[4:]
        outputs, last, activations = run.kernel.forward(x, run.batch_sizes, weights, state)
        return outputs, *last, *activations

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.run, *tensors = inputs
        outputs, activations = output[0], output[-2:]
        ctx.mark_non_differentiable(*activations)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, outputs, *activations)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        grads = grads[:-2]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        inputs = ctx.saved_tensors
        like = (inputs[-3], *inputs[5:-3])
        grads = tuple(torch.zeros_like(y) if grad is None else grad for grad, y in zip(grads, like, strict=True))
        wants = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2:6])
        return None, *cast(tuple, _Backward.apply(ctx.run, wants, *grads, *inputs))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple:
        results = push_forward(ctx.run.plain, ctx.saved_tensors, tangents[1:])
        return *results, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        run, *tensors = args
        results = torch.vmap(run.plain, in_dims[1:])(*tensors)
        nothing = results[0].new_empty(0)  # the backward of vmap does not read the activations
        return (*results, nothing, nothing), (*(0 for _ in results), None, None)


class _Backward(Function):
    """(run, wants, gradients of outputs and last state, x, 4 weights, state, outputs, 2 activations) to gradients."""

    # It is a separate Function because under `torch.func` a backward runs with gradients enabled, and the kernel writes
    # in place. Its derivatives are those of the gradient as a function of the first gradients and of the inputs,
    # through the plain scan; outputs and activations get none.

    @staticmethod
    def forward(run: _Run, wants: tuple[bool, bool], *tensors: Tensor) -> tuple[Tensor | None, ...]:
        grads, (x, *weights_and_state) = tensors[: run.num_grads], tensors[run.num_grads : -3]
        outputs, *activations = tensors[-3:]
        weights, state = cast(Weights, tuple(weights_and_state[:4])), tuple(weights_and_state[4:])
        gradients = run.kernel.backward(
            x, run.batch_sizes, weights, state, outputs, tuple(activations), grads[0], grads[1:], *wants
        )
        return gradients.x, *(gradients.weights or (None,) * 4), *gradients.state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.run, _, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.given = [number for number, result in enumerate(output) if result is not None]
        ctx.save_for_backward(*tensors[:-3])
        ctx.save_for_forward(*tensors[:-3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        results, pull = vjp(ctx.run.plain_gradients, *ctx.saved_tensors)
        cotangents = (torch.zeros_like(y) if grad is None else grad for grad, y in zip(grads, results, strict=True))
        return None, None, *pull(tuple(cotangents)), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple:
        results = push_forward(ctx.run.plain_gradients, ctx.saved_tensors, tangents[2:-3])
        return tuple(result if number in ctx.given else None for number, result in enumerate(results))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        run, _, *tensors = args
        results = torch.vmap(run.plain_gradients, in_dims[2:-3])(*tensors[:-3])
        return results, (0,) * len(results)
