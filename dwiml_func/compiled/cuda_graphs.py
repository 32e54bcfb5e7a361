"""A whole step as one CUDA graph for each shape of batches, replayed on tensors that stay in place.

A CUDA graph repeats its kernels on the addresses of its capture. So batches and numbers are copied into tensors of its
own, and the state stays in the tensors that it has at the capture: what the step computes again, such as buffers, is
written back into them. Learning rate, step and weight decay are among the numbers, and random numbers follow torch's
generators, which are seeded before each replay; nothing that changes from step to step is frozen.

The kernels are those of the step as it is, without torch.compile. The first batch of a shape runs without a graph,
which lets libraries make their plans and handles. The second does too, and waiting for the device is an error there: a
capture that fails can leave torch's generators and allocator unusable. The third is captured. All give bitwise
identical results.
"""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dwiml_func.compiled.direct import Leaves, leaves_of
from dwiml_func.core.rng import without_seeds

__all__ = ["Capture", "OnCuda", "Replays"]

_Results = tuple[Any, Any, Any, tuple[str, ...], Tensor]
"""Parameters, buffers, optimizer state; names and values of the sums."""

Capture = Callable[[Callable[[], None]], Callable[[], object]]
"""Records what a function launches, and returns the function that repeats it."""

_WARM_UPS = 2  # steps of a kind before its capture; waits are errors in the last


class OnCuda:
    """Captures CUDA graphs, all on one stream and in one pool of memory.

    Only one of them runs at a time, and none reads what another has left in the pool: a replay may overwrite it.

    Args:
        generators: those that a step draws from beside torch's own, asked for at each capture.
    """

    def __init__(self, generators: Callable[[], Iterable[torch.Generator]] = tuple) -> None:
        self._generators = generators
        self._options: dict[str, Any] = {}
        self._newest: Any = None  # a pool whose graphs are all gone cannot be used again

    def __call__(self, step: Callable[[], None]) -> Callable[[], object]:
        """Record a CUDA graph. It does not run yet."""
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device was found")
        if not self._options:
            self._options = {"pool": torch.cuda.graph_pool_handle(), "stream": torch.cuda.Stream()}
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators():
            graph.register_generator_state(generator)
        # Other threads may pin memory meanwhile, which "global" would forbid them. Where torch cannot end a capture, it
        # leaves its stream as the current one.
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local", **self._options):
                step()
        finally:
            torch.cuda.set_stream(before)
        self._newest = graph
        return graph.replay


class Replays:
    """The captured graphs of one step, of one state. Each has torch's settings of the time when it was captured.

    Args:
        function: `(batch, params, buffers, opt_state, numbers)` to the new state's parts, names and values, as from
            `make_graph`. It may write into the parts that it is given, once it has computed all else.
        max_graphs: largest number of graphs at a time; batches of further shapes run without.
        capture: see `Capture`; None captures CUDA graphs.

    Attributes:
        num_graphs: graphs captured so far.
        reason: why some or all steps run without a graph; None while all can have one.
    """

    def __init__(
        self, function: Callable[..., tuple[Any, ...]], *, max_graphs: int, capture: Capture | None = None
    ) -> None:
        self.num_graphs = 0
        self.reason: str | None = None
        self._function, self._capture, self._max_graphs = function, capture or OnCuda(), max_graphs
        self._is_stopped = self._fails = False
        self._replays: dict[Any, _Replay] = {}
        self._seen: Counter[Any] = Counter()
        self._last: Callable[[], Tensor | None] = lambda: None

    def __call__(self, batch: Any, leaves: Leaves | None, numbers: Tensor) -> _Results | None:
        """Take a step; None where the function cannot take any."""
        if leaves is None:
            return self._warn("Training steps run", "the batch has parts other than tensors, numbers and texts")
        if self._fails:
            return None
        places = [id(tensor) for tensor in leaves.batch]  # the same tensor twice is one of the graph's own
        kind = leaves.kind, tuple([t.dtype for t in leaves.batch]), tuple(map(places.index, places)), numbers.device
        if is_other_run := leaves.state[0] is not self._last():
            self._replays.clear()  # their tensors may be those of a state that is still in use
        replay = self._replays.get(kind)
        if replay is None or not replay.fits(leaves.state):
            replay = self._new(kind, batch, leaves, numbers, is_first=is_other_run)
        if replay is not None:
            results = replay(leaves, numbers)
        elif (results := self._run(batch, leaves, numbers, is_last=self._seen[kind] == _WARM_UPS)) is None:
            return None
        self._last = weakref.ref(next(iter(results[0].values())))
        return results

    def _new(self, kind: Any, batch: Any, leaves: Leaves, numbers: Tensor, *, is_first: bool) -> _Replay | None:
        self._seen[kind] += 1
        # A first state may have tensors that nothing can write into, such as one buffer for all members.
        if self._seen[kind] <= _WARM_UPS or self._is_stopped or is_first:
            return None
        if len(self._replays) >= self._max_graphs:
            return self._warn("Some training steps run", f"more than {self._max_graphs} would be needed")
        try:
            replay = _Replay(self._function, batch, leaves, numbers, self._capture)
        except Exception as error:
            return self._stop(error)
        self.num_graphs += 1
        self._replays[kind] = replay
        return replay

    def _run(self, batch: Any, leaves: Leaves, numbers: Tensor, *, is_last: bool) -> _Results | None:
        """A step without a graph."""
        try:
            if not is_last or self._is_stopped:
                return _call(self._function, batch, leaves, numbers)
            with _no_waits(numbers.device):
                return _call(self._function, batch, leaves, numbers)
        except Exception as error:
            self._fails = self._seen.total() == 1  # it uses its key, for example
            if self._is_stopped or not (is_last or self._fails):
                raise
            self._stop(error)
        return None if self._fails else _call(self._function, batch, leaves, numbers)

    def _stop(self, error: Exception) -> None:
        self._is_stopped = True
        self._replays.clear()
        self._warn("Training steps run", str(error).strip().partition("\n")[0] or type(error).__name__)

    def _warn(self, what: str, reason: str) -> None:
        if self.reason != reason:
            self.reason = reason
            logging.getLogger(__name__).warning("%s without CUDA graphs from now on: %s", what, reason)


class _Replay:
    def __init__(
        self, function: Callable[..., Any], batch: Any, leaves: Leaves, numbers: Tensor, capture: Capture
    ) -> None:
        if any(tensor.device != numbers.device for tensor in (*leaves.batch, *leaves.state)):
            raise RuntimeError(f"tensors of the batch or of the state are not on {numbers.device}")
        clones = {id(tensor): tensor.detach().clone() for tensor in leaves.batch}  # not all of what they are views of
        own = copy.deepcopy(batch, clones)
        static = leaves_of(own, leaves.rebuild(leaves.state), None)
        assert static is not None
        self._state, self._batch, self._numbers = static.state, static.batch, numbers.clone()
        self._moved: list[int] = []
        self._names, self._values = (), numbers

        def step() -> None:
            *parts, self._names, self._values = _call(function, own, static, self._numbers)
            new = leaves_of(own, parts, None)
            if new is None or new.structures != static.structures:
                raise RuntimeError("the state gets another structure")
            pairs = zip(self._state, new.state, strict=True)
            self._moved = [place for place, (old, tensor) in enumerate(pairs) if tensor is not old]
            for place in self._moved:
                self._state[place].copy_(new.state[place])

        with torch.cuda.device_of(numbers):
            self._replay = capture(step)

    def fits(self, state: list[Tensor]) -> bool:
        """Whether a state has the tensors that the graph writes into; others can be copied."""
        return all(place in self._moved or own is state[place] for place, own in enumerate(self._state))

    def __call__(self, leaves: Leaves, numbers: Tensor) -> _Results:
        own = [self._numbers, *self._batch, *self._state]
        given = [numbers, *leaves.batch, *leaves.state]
        for mine, new in zip(own, given, strict=True):
            if mine is not new:
                mine.copy_(new, non_blocking=True)
        self._replay()
        return *leaves.rebuild(self._state), self._names, self._values.clone()


def _call(function: Callable[..., Any], batch: Any, leaves: Leaves, numbers: Tensor) -> _Results:
    with without_seeds():
        return function(batch, *leaves.rebuild(leaves.state), numbers)


@contextmanager
def _no_waits(device: torch.device) -> Iterator[None]:
    """Make it an error to wait for a CUDA device."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
