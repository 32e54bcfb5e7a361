"""Threads that evaluate the shards of a batch side by side, each operation of torch on one thread.

Which thread evaluates a shard cannot change its numbers, and sums are added afterwards, in the order of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from dwiml_func._transforms import is_transformed
from dwiml_func.core.rng import watched_generators, without_seeds

__all__ = ["ShardThreads"]

T = TypeVar("T")


class ShardThreads:
    """Threads for functions of which some seed torch's generators, of which there is one for all threads.

    They run without seeds. Where something has drawn a random number, the results are thrown away, and from then on
    the functions seed the generators, one thread at a time; what draws none still runs side by side.
    """

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, "shard", torch.set_num_threads, (1,))
        self._needs_seeds = False

    def run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """The functions' results, in order; the error of the first that fails."""
        if is_transformed() or len(functions) < 2:  # a transform of torch.func belongs to its thread
            return [function() for function in functions]
        if not self._needs_seeds:
            with watched_generators() as has_drawn:
                try:
                    results = self._side_by_side(functions, has_seeds=False)
                except Exception:  # also a model's that was found to draw without a seed; a real error comes again
                    results = None
                if results is not None and not has_drawn():
                    return results
            self._needs_seeds = True
        return self._side_by_side(functions, has_seeds=True)

    def _side_by_side(self, functions: Sequence[Callable[[], T]], *, has_seeds: bool) -> list[T]:
        is_enabled = torch.is_grad_enabled()

        def call(function: Callable[[], T]) -> T:
            with torch.set_grad_enabled(is_enabled):
                if has_seeds:
                    return function()
                with without_seeds():
                    return function()

        futures = [self._pool.submit(call, function) for function in functions]
        wait(futures)
        return [future.result() for future in futures]
