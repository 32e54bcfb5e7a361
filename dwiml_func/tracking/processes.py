"""Tracking by several processes, with the same lines in the same order as by one."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from dwiml_func.core.rng import Key
from dwiml_func.data.processes import receive, started
from dwiml_func.data.streamlines import Streamlines, offsets_of
from dwiml_func.tracking.space import TrackingSpace
from dwiml_func.tracking.spec import TrackingSpec
from dwiml_func.tracking.state import StepModel
from dwiml_func.tracking.track import NUM_ROWS, Tracked, check_tracking, in_order, track

__all__ = ["track_in_processes"]


def track_in_processes(
    seeds: Tensor,
    *,
    model: StepModel,
    space: TrackingSpace,
    spec: TrackingSpec,
    key: Key,
    numbers: Tensor | None = None,
    num_processes: int,
    num_blocks: int = 1,
) -> Iterator[Tracked]:
    """Track as `track` does, on CPUs, in several processes: the lines, their bytes and their order are the same.

    Each process takes every n-th group of seeds, as many as the model reads at once. The next one that is read from is
    always the one that is furthest behind; the others wait when their pipes are full, so memory is bounded.

    Args:
        seeds, model, space, spec, key, numbers, num_blocks: as in `track`; they must be picklable.
        num_processes: how many, at least 1. Each has one thread.

    Yields:
        Lines, in the order of their seeds.

    Raises:
        ValueError: as `track`.
        RuntimeError: a process failed or was killed.

    Example:
        >>> lines = track_in_processes(seeds, num_processes=4, **options)  # doctest: +SKIP
    """
    numbers = torch.arange(len(seeds)) if numbers is None else numbers
    options: dict[str, Any] = {"model": model, "space": space, "spec": spec, "key": key, "num_blocks": num_blocks}
    if num_processes == 1 or len(seeds) <= NUM_ROWS["cpu"]:
        yield from track(seeds, numbers=numbers, **options)
        return
    check_tracking(seeds, model, space, spec)
    owner = numbers // NUM_ROWS["cpu"] % num_processes
    owned = [(owner == number).nonzero()[:, 0] for number in range(num_processes)]
    shares = [(seeds[indices], numbers[indices]) for indices in owned]
    with started(_track_share, (options,), shares) as pipes:
        yield from _merged(pipes, owned, numbers)


def _merged(pipes: list[Connection], owned: list[Tensor], numbers: Tensor) -> Iterator[Tracked]:
    num_done = [0] * len(pipes)  # of each process's own seeds
    waiting: list[tuple[Tensor, Streamlines]] = []
    num_yielded = 0

    def first_missing(process: int) -> int:
        """The index of the first seed whose line is not there yet."""
        indices = owned[process]
        return int(indices[num_done[process]]) if num_done[process] < len(indices) else len(numbers)

    while num_yielded < len(numbers):
        behind = min(range(len(pipes)), key=first_missing)
        seeds, lengths, points, num_done[behind] = receive(pipes[behind])
        lines = Streamlines(torch.from_numpy(points), offsets_of(torch.from_numpy(lengths)))
        waiting.append((torch.from_numpy(seeds), lines))
        num_yielded = min(map(first_missing, range(len(pipes))))  # more than before: the one behind has moved on
        (ready, lines), waiting = in_order(waiting, int(numbers[num_yielded - 1]))
        yield Tracked(ready, lines, num_yielded)


def _track_share(options: dict[str, Any], share: tuple[Tensor, Tensor]) -> Iterator[tuple[Any, ...]]:
    """Of one process, on one thread: the numbers of seeds, lengths, points, and how many seeds are done."""
    torch.set_num_threads(1)
    seeds, numbers = share
    for tracked in track(seeds, numbers=numbers, **options):
        lines = tracked.streamlines
        yield tracked.seeds.numpy(), lines.lengths.numpy(), lines.points.numpy(), tracked.num_done
