"""Tracking by several processes, with the same lines in the same order as by one."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from dwiml_func.core.rng import Key
from dwiml_func.data.streamlines import Streamlines, offsets_of
from dwiml_func.tracking.space import TrackingSpace
from dwiml_func.tracking.spec import TrackingSpec
from dwiml_func.tracking.state import StepModel
from dwiml_func.tracking.track import NUM_ROWS, Tracked, check_tracking, track

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
    context = multiprocessing.get_context("spawn")
    processes, pipes, owned = [], [], [(owner == number).nonzero()[:, 0] for number in range(num_processes)]
    try:
        for indices in owned:
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, seeds[indices], numbers[indices], options)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            sender.close()  # this process's copy: when the other one ends, the pipe has an end
            processes.append(process)
            pipes.append(receiver)
        yield from _merged(pipes, owned, numbers)
    finally:
        for process, pipe in zip(processes, pipes, strict=False):
            pipe.close()
            process.terminate()
            process.join()


def _merged(pipes: list[Connection], owned: list[Tensor], numbers: Tensor) -> Iterator[Tracked]:
    num_done = [0] * len(pipes)  # of each process's own seeds
    waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # numbers of seeds, lengths, points
    num_yielded = 0

    def first_missing(process: int) -> int:
        """The index of the first seed whose line is not there yet."""
        indices = owned[process]
        return int(indices[num_done[process]]) if num_done[process] < len(indices) else len(numbers)

    while num_yielded < len(numbers):
        behind = min(range(len(pipes)), key=first_missing)
        received = _receive(pipes[behind])
        num_done[behind] = received[3]
        waiting.append(received[:3])
        num_complete = min(map(first_missing, range(len(pipes))))  # more than before: the one behind has moved on
        seeds, lengths, points = (torch.cat(parts) for parts in zip(*waiting, strict=True))
        lines, order = Streamlines(points, offsets_of(lengths)), seeds.argsort()
        is_ready = seeds[order] <= numbers[num_complete - 1]
        later = lines.select(order[~is_ready])
        waiting = [(seeds[order[~is_ready]], later.lengths, later.points)]
        num_yielded = num_complete
        yield Tracked(seeds[order[is_ready]], lines.select(order[is_ready]), num_yielded)


def _receive(pipe: Connection) -> tuple[Tensor, Tensor, Tensor, int]:
    try:
        received = pipe.recv()
    except EOFError:
        raise RuntimeError("A tracking process was killed. Is the memory full? Track with fewer processes.") from None
    if isinstance(received, str):
        raise RuntimeError(f"A tracking process failed:\n{received}")
    seeds, lengths, points, num_done = received
    return torch.from_numpy(seeds), torch.from_numpy(lengths), torch.from_numpy(points), num_done


def _work(pipe: Connection, seeds: Tensor, numbers: Tensor, options: dict[str, Any]) -> None:
    """Of one process: send lines as arrays, which need no shared memory."""
    torch.set_num_threads(1)
    with suppress(BrokenPipeError, KeyboardInterrupt):  # the reader ended, and reports it
        try:
            for tracked in track(seeds, numbers=numbers, **options):
                lines = tracked.streamlines
                arrays = (tracked.seeds.numpy(), lines.lengths.numpy(), lines.points.numpy())
                pipe.send((*arrays, tracked.num_done))
        except (BrokenPipeError, KeyboardInterrupt):
            raise
        except Exception:
            pipe.send(traceback.format_exc())
