"""A whole step as one CUDA graph for each shape of batches, replayed on tensors that stay in place.

A CUDA graph repeats its kernels on the addresses of its capture. So batches and numbers are copied into tensors of its
own, and the state stays in the tensors that it has at the capture: what the step computes anew, such as buffers, is
written back into them. Learning rate, step and weight decay are among the numbers, and random numbers follow torch's
generators, which are seeded before each replay; nothing that changes from step to step is frozen.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dwiml_func.compiled.direct import DirectCall, Leaves

__all__ = ["Capture", "Replays", "capture_on_cuda"]

Capture = Callable[[Callable[[], None]], Callable[[], object]]
"""Records what a function launches, and returns the function that repeats it."""


def capture_on_cuda(step: Callable[[], None]) -> Callable[[], object]:
    """Record a CUDA graph. It does not run yet."""
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device was found")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Replays:
    """The captured graphs of one step, of one state.

    Attributes:
        num_graphs: graphs captured so far.
        reason: why no more are captured and all steps run without; None while they are replayed.
    """

    def __init__(self, *, max_graphs: int, capture: Capture = capture_on_cuda) -> None:
        self.num_graphs = 0
        self.reason: str | None = None
        self._capture, self._max_graphs = capture, max_graphs
        self._replays: dict[Any, _Replay] = {}
        self._last: Callable[[], Tensor | None] = lambda: None

    def __call__(self, direct: DirectCall, leaves: Leaves, numbers: Tensor) -> tuple[list[Tensor], Tensor]:
        """The leaves of the next state, and the values: what `direct` gives."""
        if self.reason is not None:
            return direct(leaves.batch, leaves.state, numbers)
        if leaves.state[0] is not self._last():
            self._replays.clear()  # their tensors may be those of a state that is still in use
        replay = self._replays.get(leaves.kind)
        if replay is None or not replay.fits(leaves.state):
            replay = self._new(direct, leaves, numbers)
        new, values = (replay or direct)(leaves.batch, leaves.state, numbers)
        self.follow(new)
        return new, values

    def follow(self, state: list[Tensor]) -> None:
        """Note the leaves of the state that the step returned, as the only one that graphs may write into."""
        self._last = weakref.ref(state[0])

    def _new(self, direct: DirectCall, leaves: Leaves, numbers: Tensor) -> _Replay | None:
        if self.num_graphs >= self._max_graphs:
            return self._stop(f"more than {self._max_graphs} graphs would be needed")
        try:
            replay = _Replay(direct, leaves, numbers, self._capture)
        except Exception as error:
            return self._stop(str(error).strip().partition("\n")[0] or type(error).__name__)
        self.num_graphs += 1
        self._replays[leaves.kind] = replay
        return replay

    def _stop(self, reason: str) -> None:
        self.reason = reason
        self._replays.clear()
        logging.getLogger(__name__).warning("Training steps run without CUDA graphs from now on: %s", reason)


class _Replay:
    def __init__(self, direct: DirectCall, leaves: Leaves, numbers: Tensor, capture: Capture) -> None:
        self.state = list(leaves.state)
        for place in direct.moved:  # the step does not write into these itself, and others may hold them
            self.state[place] = leaves.state[place].clone()
        self._batch, self._numbers = [tensor.clone() for tensor in leaves.batch], numbers.clone()
        self._values, self._moved = numbers, set(direct.moved)

        def step() -> None:
            new, self._values = direct(self._batch, self.state, self._numbers)
            for place in direct.moved:
                self.state[place].copy_(new[place])

        self._replay = capture(step)

    def fits(self, state: list[Tensor]) -> bool:
        """Whether a state has the tensors that the graph writes into; others can be copied."""
        return all(place in self._moved or own is state[place] for place, own in enumerate(self.state))

    def __call__(self, batch: list[Tensor], state: list[Tensor], numbers: Tensor) -> tuple[list[Tensor], Tensor]:
        pairs = [(self._numbers, numbers), *zip(self._batch, batch, strict=True)]
        pairs += [(self.state[place], state[place]) for place in self._moved if self.state[place] is not state[place]]
        for own, given in pairs:
            own.copy_(given, non_blocking=True)
        self._replay()
        return self.state, self._values.clone()
