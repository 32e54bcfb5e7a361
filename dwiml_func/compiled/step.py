"""A training step as one graph of torch.compile: gradients, clipping, optimizer and metrics.

What changes from step to step enters as tensors, so that one graph serves all steps. What is fixed (the loss and what
it closes over, the optimizer, clipping) is read once, when the graph is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor

from dwiml_func.compiled.cuda_graphs import Replays
from dwiml_func.compiled.direct import DirectCall, DirectCalls, Leaves, leaves_of
from dwiml_func.compiled.fold import END, fold_alike
from dwiml_func.compiled.function import CompiledFunction
from dwiml_func.compiled.step_graph import make_graph, merged
from dwiml_func.compiled.sums import VectorSums, add_vectors, vector_of
from dwiml_func.core.gradients import is_differentiated
from dwiml_func.core.loss import LossFn
from dwiml_func.core.loss_check import check_loss_fn
from dwiml_func.core.non_finite import (
    NON_FINITE,
    SKIPPED,
    NonFinite,
    check_not_skipped_too_often,
    check_policy,
    choose_policy,
    raise_if_not_finite,
)
from dwiml_func.core.rng import Key, Stream, fold_in, torch_rng
from dwiml_func.core.state import TrainState, advance, check_can_donate, check_not_donated
from dwiml_func.core.step import train_step
from dwiml_func.optim.schedules import as_rate
from dwiml_func.optim.state_check import check_opt_state
from dwiml_func.optim.transformations import check_clip_norm
from dwiml_func.types import Metrics, Optimizer, Sum

__all__ = ["JitStep", "jit_step"]


def jit_step(
    *,
    loss_fn: LossFn,
    optimizer: Optimizer | Callable[..., Optimizer],
    clip_grad: float | None = None,
    donate: bool = False,
    non_finite: NonFinite | None = None,
    dynamic: bool = False,
    max_compilations: int = 8,
    backend: str = "inductor",
    options: Mapping[str, Any] | None = None,
    cuda_graphs: bool = False,
) -> JitStep:
    """Make a training step that runs as one compiled graph.

    Args:
        loss_fn, optimizer, clip_grad, donate, non_finite: as for `train_step`, with the random numbers of an eager
            step. The loss is traced, so it may neither read values of tensors nor use its key. A batch's numbers that
            change from batch to batch are () tensors to it, so that they are not compiled again.
        dynamic: whether the first size of each tensor in a batch may vary from batch to batch within one graph. False
            compiles a graph for each combination of shapes.
        max_compilations: largest number of graphs; a batch that needs one more turns compilation off.
        backend: a backend of torch.compile.
        options: settings of inductor, as for torch.compile. Steps of fixed sizes on the CPU have `cpp_wrapper` where
            they can.
        cuda_graphs: capture the step as it is, without torch.compile, as a CUDA graph for each combination of shapes
            that comes for the third time, up to `max_compilations`; needs `donate`. Later steps are one replay, on the
            first state's tensors, buffers included. Steps with and without a graph are bitwise identical. Where there
            can be none, the step warns once, with the reason (`cuda_graphs_reason`).

    Returns:
        The step. It compiles at its first call, and for a batch that fits no graph yet. If the step cannot be compiled
        as a whole, or torch lacks what that needs (2.13 has it), it warns once, with the reason, and every
        call is one of `train_step`. So is a call that is differentiated or mapped.

    Example:
        >>> import torch
        >>> from dwiml_func import init_state, module_loss, sgd
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: ((model(x) - 1.0).square().mean(), len(x)))
        >>> step = jit_step(loss_fn=loss_fn, optimizer=sgd(), backend="eager")
        >>> state = init_state(model, sgd(), seed=0)
        >>> for _ in range(3):
        ...     state, metrics = step(state, torch.ones(4, 2), lr=0.1)
        >>> state.step, sorted(metrics), step.num_compilations
        (3, ['grad_norm', 'loss', 'unclipped_grad_norm'], 1)
    """
    check_policy(non_finite)
    if clip_grad is not None:
        check_clip_norm(clip_grad)
    eager = partial(
        train_step, loss_fn=loss_fn, optimizer=optimizer, clip_grad=clip_grad, donate=donate, non_finite=non_finite
    )
    if cuda_graphs and not donate:
        raise ValueError("Expected donate=True with cuda_graphs=True: a graph writes into the tensors of its state.")
    settings: dict[str, Any] = {"max_compilations": max_compilations, "backend": backend, "options": options}
    return JitStep(eager, cuda_graphs=cuda_graphs, dynamic=dynamic, **settings)


class JitStep:
    """A compiled step of `jit_step`: `step(state, batch, lr=lr)`. `eager` is the step without its `graph`."""

    def __init__(self, eager: partial[Any], *, cuda_graphs: bool, **settings: Any) -> None:
        self.eager = eager
        function = make_graph(**eager.keywords)
        self._replays = Replays(function, max_graphs=settings["max_compilations"]) if cuda_graphs else None
        self.graph = CompiledFunction(function, **settings)
        self._direct = DirectCalls()
        self._donate, self._non_finite = eager.keywords["donate"], eager.keywords["non_finite"]
        self._is_stochastic = getattr(eager.keywords["loss_fn"], "stochastic", True)

    @property
    def num_compilations(self) -> int:
        """Graphs compiled so far."""
        return self.graph.num_compilations

    @property
    def compile_seconds(self) -> float:
        """Time of the calls that compiled them."""
        return self.graph.compile_seconds

    @property
    def eager_reason(self) -> str | None:
        """Why steps run without a graph; None where they run compiled."""
        return self.graph.eager_reason

    @property
    def num_cuda_graphs(self) -> int:
        """CUDA graphs captured so far."""
        return 0 if self._replays is None else self._replays.num_graphs

    @property
    def cuda_graphs_reason(self) -> str | None:
        """Why steps run without CUDA graphs where those were asked for; None where they are replayed."""
        return None if self._replays is None else self._replays.reason

    def __call__(
        self, state: TrainState, batch: Any, *, lr: float | Tensor, weight_decay: float | Tensor | None = None
    ) -> tuple[TrainState, Metrics]:
        """Take one optimizer step, see `train_step`."""
        check_not_donated(state)
        if self._donate and not state.batch:  # once an epoch
            check_can_donate(state)
        lr, decay = as_rate(lr), () if weight_decay is None else (as_rate(weight_decay),)
        leaves = self._leaves(state, batch, len(decay))
        direct = self._find(leaves, lr, *decay)
        if leaves is None or direct is None:
            return self._step(state, batch, leaves, lr, decay)
        numbers = self._numbers(state, lr, *decay)
        with self._seeded(state.key, state.epoch, state.batch):
            new, values = direct(leaves.batch, leaves.state, numbers)
        params, buffers, opt_state = state.params, state.buffers, state.opt_state
        if direct.new_state is not None:
            params, buffers, opt_state = leaves.rebuild(new)
        return self._finish(state, batch, params, buffers, opt_state, direct.names, values, direct.policy)

    def fold(
        self,
        state: TrainState,
        batches: Iterable[Any],
        *,
        lr: float | Tensor,
        weight_decay: float | Tensor | None = None,
    ) -> TrainState:
        """The state after a step on each batch, in order: bitwise identical to calls one by one.

        `epoch_fn` calls it. Batches of equal shapes in a row are taken in one loop around the graph.
        """
        rest = iter(batches)
        given = (lr,) if weight_decay is None else (lr, weight_decay)
        numbers = tuple(number for number in given if not isinstance(number, Tensor))
        batch = next(rest, END)
        while batch is not END:
            state, metrics = self(state, batch, lr=lr, weight_decay=weight_decay)
            if isinstance(is_bad := metrics.get(SKIPPED, Sum(0.0, 0.0)).total, float) and is_bad:
                check_not_skipped_too_often(state)
            can_be_alike = self._replays is None and len(numbers) == len(given)
            leaves = self._leaves(state, batch, len(numbers) - 1) if can_be_alike else None
            direct = self._find(leaves)
            is_read = direct is not None and direct.policy != "defer"
            if leaves is None or direct is None or not is_read or leaves.state[0].device.type != "cpu":
                batch = next(rest, END)
            else:
                seeded = partial(self._seeded, state.key, state.epoch)
                state, batch = fold_alike(*(state, rest), leaves=leaves, direct=direct, numbers=numbers, seeded=seeded)
        return state

    def _step(
        self,
        state: TrainState,
        batch: Any,
        leaves: Leaves | None,
        lr: float | Tensor,
        decay: tuple[float | Tensor, ...],
    ) -> tuple[TrainState, Metrics]:
        """A step through torch.compile or a CUDA graph, or an eager one."""
        eager = partial(self.eager, state, batch, lr=lr, weight_decay=decay[0] if decay else None)
        if self.eager_reason is not None or any(is_differentiated(state.params, number) for number in (lr, *decay)):
            return eager()
        key = fold_in(state.key, Stream.TRAIN_STEP, state.epoch, state.batch)
        check_loss_fn(self.eager.keywords["loss_fn"], state.params, state.buffers, batch, key=key)
        check_opt_state(self.eager.keywords["optimizer"], state.opt_state, state.params)
        numbers = self._numbers(state, lr, *decay)
        with self._seeded(state.key, state.epoch, state.batch):
            if self._replays is not None:
                results, heard = self._replays(batch, leaves, numbers), None
            else:
                parts = {"params": state.params, "buffers": state.buffers, "opt_state": state.opt_state}
                results, heard = self.graph.hear(batch, **parts, numbers=numbers)
        if results is None:
            return eager()
        params, buffers, opt_state, names, values = results
        if self._replays is None:  # the graph may have written into these tensors
            params, opt_state = merged(state.params, params), merged(state.opt_state, opt_state)
        policy = choose_policy(self._non_finite, state.opt_state, values)
        if leaves is not None and heard is not None and (new := leaves_of(batch, (params, buffers, opt_state), None)):
            self._direct.learn(leaves, new, numbers, heard, values=values, names=names, policy=policy)
        return self._finish(state, batch, params, buffers, opt_state, names, values, policy)

    def _leaves(self, state: TrainState, batch: Any, num_decays: int) -> Leaves | None:
        return leaves_of(batch, (state.params, state.buffers, state.opt_state), num_decays)

    def _find(self, leaves: Leaves | None, *numbers: float | Tensor) -> DirectCall | None:
        """The graph for these leaves, where it can be called directly."""
        if leaves is None or self._replays is not None or self.graph.eager_reason is not None:
            return None
        if any(isinstance(number, Tensor) and number.requires_grad for number in numbers):
            return None
        return self._direct.find(leaves)

    def _numbers(self, state: TrainState, lr: float | Tensor, *decay: float | Tensor) -> Tensor:
        device = next(iter(state.params.values())).device
        blocked = state.sums[NON_FINITE].weight if NON_FINITE in state.sums else 0.0
        return vector_of(device, lr, state.step, blocked, *decay)

    def _seeded(self, key: Key, epoch: int, batch: int) -> AbstractContextManager[None]:
        """Torch's generators as an eager step has them."""
        return torch_rng(fold_in(key, Stream.TRAIN_STEP, epoch, batch)) if self._is_stochastic else nullcontext()

    def _finish(
        self,
        state: TrainState,
        batch: Any,
        params: Any,
        buffers: Any,
        opt_state: Any,
        names: tuple[str, ...],
        values: Tensor,
        policy: NonFinite,
    ) -> tuple[TrainState, Metrics]:
        if policy == "defer":  # nothing is read before the epoch ends
            metrics = VectorSums((NON_FINITE, *names), values[2:])
            new = advance(state, params, buffers, opt_state, {}, donate=self._donate)
            return new.replace(sums=add_vectors(state.sums, metrics)), metrics
        numbers = values.tolist() if values.device.type == "cpu" else values
        if policy == "raise":
            raise_if_not_finite(state, batch, float(numbers[0]), float(numbers[1]))
        metrics = {name: Sum(numbers[2 * i], numbers[2 * i + 1]) for i, name in enumerate(names, start=2)}
        return advance(state, params, buffers, opt_state, metrics, donate=self._donate), metrics
